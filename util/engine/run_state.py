"""A run in progress: what training moves forward, and what a checkpoint must hold to continue it exactly."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.losses import NTRELoss
from model.ntrenet import NTRENet, NTRENetOutput
from model.parallel import processes, rank
from model.weights import WeightsInfo
from util.config import Config, config_from_dict, read_yaml
from util.engine.build import Hardware, build_loss, build_model, build_optimizer
from util.engine.checkpoint import load_checkpoint, require_same, save_checkpoint, saved_config
from util.engine.distributed import first_process_first
from util.engine.record import revision
from util.errors import UserError

LAST, PREVIOUS, DAMAGED = "last.pt", "previous.pt", "damaged.pt"


@dataclass
class Training:
    """All that changes while a run is trained, and what it is trained with."""

    config: Config
    hardware: Hardware
    weights: WeightsInfo
    model: NTRENet
    criterion: NTRELoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    list_sha256: dict[str, str]
    """of the lists the episodes come from, 'train' and 'val'"""
    step: int = 0
    """steps done in the whole run; episodes and the learning rate are functions of it"""
    finished_step: int = 0
    """where the last epoch ended that was dealt with to the end: evaluated where due, its scores written"""
    best_miou: float = -1.0
    seconds_before: float = 0.0
    """spent before this start"""
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NTRELoss.NAMES, 0.0))
    """of every loss term over the steps of the epoch at hand"""

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self.network: Callable[..., NTRENetOutput] = self.model
        """the model as a step calls it, compiled or not; on several processes, what averages their gradients"""
        self.loss: Callable[..., dict[str, Tensor]] = self.criterion
        """the criterion as it calls it"""
        if processes() > 1:
            devices = [self.hardware.device] if self.hardware.device.type == "cuda" else None
            self.network = nn.parallel.DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)

    @property
    def seconds(self) -> float:
        """Spent so far, evaluations included, over all resumptions."""
        return self.seconds_before + time.monotonic() - self._began

    def finish_epoch(self, end: int, miou: float) -> bool:
        """Note that the epoch is dealt with up to step ``end``.

        Args:
            miou: of its evaluation; -1 where none was due.
        Returns:
            whether it is the highest so far
        """
        improved = miou > self.best_miou
        self.best_miou = max(self.best_miou, miou)
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.finished_step = end
        return improved

    def save_best(self) -> None:
        """The model alone: what test.py needs."""
        if rank() == 0:
            save_checkpoint(Path(self.config.run_dir) / "best.pt", self._model_state())

    def save_last(self) -> None:
        """Everything: model, bank, optimiser, random states. The one before stays, as ``previous.pt``."""
        if rank() == 0:
            folder = Path(self.config.run_dir)
            save_checkpoint(folder / LAST, self._whole_state(), keep=folder / PREVIOUS)

    def save_for_inspection(self, files: list[str], terms: dict[str, float]) -> Path:
        """The state before a step whose loss is not finite, with the step's episodes; never resumed from."""
        path = Path(self.config.run_dir) / "not_finite.pt"
        if rank() == 0:
            save_checkpoint(path, self._whole_state() | {"episodes": files, "losses": terms})
        return path

    def _whole_state(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if self.hardware.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.hardware.device)
        return self._model_state() | {
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
            "finished_step": self.finished_step,
            "sums": self.sums,
            "revision": revision(),
        }

    def _model_state(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(),
            "weights": self.weights._asdict(),
            "list_sha256": self.list_sha256,
            "step": self.step,
            "best_miou": self.best_miou,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
        }

    def require_place(self, epoch_steps: int, total_steps: int) -> None:
        """Raise UserError where the steps done are not those of a run of ``total_steps``, evaluated between epochs."""
        done, finished = self.step, self.finished_step
        if finished % epoch_steps or not 0 <= finished <= done <= min(finished + epoch_steps, total_steps):
            raise UserError(
                f"the checkpoint stands at step {done} with {finished} dealt with, which no run of {total_steps} steps,"
                f" {epoch_steps} an epoch, ever does: it is damaged; resume from another, or start anew with another"
                " run_dir"
            )

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue where :meth:`save_last` stood.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError, AttributeError: the contents are not what it writes.
        """
        whole = type(checkpoint["finished_step"]) is int and all(type(v) is float for v in checkpoint["sums"].values())
        if not whole or checkpoint["sums"].keys() != self.sums.keys():
            raise ValueError("strange contents")
        for name in ("step", "finished_step", "best_miou", "sums"):
            setattr(self, name, checkpoint[name])
        self.seconds_before = checkpoint["seconds"]
        self.model.load_state_dict(checkpoint["model"])
        self.criterion.load_state_dict(checkpoint["criterion"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if self.hardware.device.type == "cuda" and "cuda" in checkpoint["random"]:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"], self.hardware.device)


def start_or_resume(config: Config, hardware: Hardware, list_sha256: dict[str, str]) -> Training:
    """A fresh run, or the one that ``config.resume`` names.

    Raises:
        UserError: the run folder holds another run, or one already and resume is 'none'; or the checkpoint does not
            fit the config or the lists.
    """
    checkpoint, path = _checkpoint_to_resume(config, list_sha256)
    torch.manual_seed(config.seed)
    if checkpoint is None:
        _require_own_folder(config)
        with first_process_first():
            model, weights = build_model(config)
    else:
        weights = WeightsInfo(**checkpoint["weights"])
        model, _ = build_model(config, "random", deep_stem=weights.stem == "deep")
    model.to(hardware.device)
    training = Training(
        config=config,
        hardware=hardware,
        weights=weights,
        model=model,
        criterion=build_loss(config).to(hardware.device),
        optimizer=build_optimizer(config, model),
        scaler=torch.amp.GradScaler(hardware.device.type, enabled=hardware.precision == torch.float16),
        list_sha256=list_sha256,
    )
    if checkpoint is not None:
        try:
            training.restore(checkpoint)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"checkpoint {path} is damaged or of another version ({error!r:.100}); resume from another, or start"
                " anew with another run_dir"
            ) from error
    return training


def _require_own_folder(config: Config) -> None:
    path = Path(config.run_dir) / "config.yaml"
    if path.exists():
        require_same(config_from_dict(read_yaml(path), str(path)), config, path, resume=True)


def _checkpoint_to_resume(config: Config, list_sha256: dict[str, str]) -> tuple[dict[str, Any] | None, Path]:
    last, previous = Path(config.run_dir) / LAST, Path(config.run_dir) / PREVIOUS
    path = last if config.resume == "auto" else Path(config.resume)
    if (last.exists() or previous.exists()) and path.resolve() not in (last.resolve(), previous.resolve()):
        raise UserError(
            f"{config.run_dir} already holds a run; set resume=auto to continue it, or run_dir=... for another"
        )
    if config.resume == "none" or (config.resume == "auto" and not (last.exists() or previous.exists())):
        return None, path
    try:
        checkpoint = load_checkpoint(path)
    except UserError as error:
        if config.resume != "auto" or not previous.exists():
            raise
        path = previous
        checkpoint = load_checkpoint(path)
        if rank() == 0:
            print(f"warning: {error}; going on from {previous}, the checkpoint before", file=sys.stderr)
    _require_same_run(checkpoint, path, config, list_sha256)
    if path == previous and config.resume == "auto" and rank() == 0:
        with suppress(FileNotFoundError):
            last.replace(last.with_name(DAMAGED))  # the next save would make it the one before, in place of a good one
    return checkpoint, path


def _require_same_run(checkpoint: dict[str, Any], path: Path, config: Config, list_sha256: dict[str, str]) -> None:
    """Refuse to resume what another config or list began, and warn of other code."""
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} holds a model only and cannot be resumed; resume from last.pt")
    require_same(saved_config(checkpoint, path), config, path, resume=True)
    for name, digest in list_sha256.items():
        if checkpoint["list_sha256"].get(name) != digest:
            raise UserError(
                f"list {getattr(config.data, f'{name}_list')} has changed since checkpoint {path} was written, so its"
                " episodes would be others;"
                " restore the list, or start anew with another run_dir"
            )
    before = checkpoint.get("revision", revision())
    if before != revision() and rank() == 0:
        print(
            f"warning: checkpoint {path} was written by revision {before}, this is {revision()}; the result is of both,"
            " and run.json names them",
            file=sys.stderr,
        )
