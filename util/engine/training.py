"""Training: the state of a run, its loop, and how it starts or resumes."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.losses import NTRELoss
from model.ntrenet import NTRENet, NTRENetOutput
from model.parallel import processes, rank
from model.weights import WeightsInfo
from util.config import Config
from util.data.dataset import Episode
from util.data.episodes import too_few
from util.data.folds import base_classes, novel_classes
from util.data.published import title_of
from util.data.transforms import normalize
from util.engine.build import Data, Hardware, build_loss, build_model, build_optimizer, forward, learning_rate
from util.engine.checkpoint import load_checkpoint, require_same, save_checkpoint, saved_config
from util.engine.distributed import first_process_first
from util.engine.interruption import Interruption, Stopped
from util.engine.log import LOG_EVERY, TrainingLog
from util.engine.record import revision
from util.errors import UserError, first_of

LAST, PREVIOUS, DAMAGED = "last.pt", "previous.pt", "damaged.pt"
SELECTION = {
    "miou": "the checkpoint with the highest novel-fold mIoU, as in PFENet's code",
    "last": "the last checkpoint",
}
"""which checkpoint best.pt is, for each value of ``eval.select``"""
FEW_STEPS = 300
"""steps below which a run has hardly begun to learn"""


@dataclass
class Training:
    """State of a run."""

    config: Config
    hardware: Hardware
    weights: WeightsInfo
    model: NTRENet
    loss: NTRELoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    list_sha256: dict[str, str]
    """hashes of the lists of episodes, 'train' and 'val'"""
    step: int = 0
    """steps done in the whole run; episodes and the learning rate are functions of it"""
    finished_step: int = 0
    """last step of the last completed epoch: evaluated if due, its scores written"""
    best_miou: float = -1.0
    seconds_before: float = 0.0
    """spent before this start"""
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NTRELoss.NAMES, 0.0))
    """sum of every loss term over the steps of the current epoch"""

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self.network: Callable[..., NTRENetOutput] = self.model
        """the model as a step calls it: averaging gradients over several processes, compiled, or as it is"""
        if processes() > 1:
            devices = [self.hardware.device] if self.hardware.device.type == "cuda" else None
            self.network = nn.parallel.DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)
        if self.config.train.compile:  # dropout draws from torch's own generator, so that a run resumes exactly
            self.network = torch.compile(self.network, dynamic=False, options={"fallback_random": True})

    @property
    def seconds(self) -> float:
        """Return the time of the run, evaluations included, over all resumptions."""
        return self.seconds_before + time.monotonic() - self._began

    def finish_epoch(self, end: int, miou: float) -> bool:
        """Complete the epoch that ends at step ``end``; ``miou`` is -1 if no evaluation was due.

        Returns:
            whether it is the highest so far; the later of equals, which are zeros if nothing is predicted at 0.5 yet
        """
        improved = miou >= max(self.best_miou, 0.0)
        self.best_miou = max(self.best_miou, miou)
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.finished_step = end
        return improved

    def save_best(self) -> None:
        """Write best.pt: the model alone, which is all that test.py needs."""
        if rank() == 0:
            save_checkpoint(Path(self.config.run_dir) / "best.pt", self._model_state())

    def save_last(self) -> None:
        """Write last.pt: model, bank, optimiser, random states. The checkpoint before stays, as previous.pt."""
        if rank() > 0:
            return
        random = {"cpu": torch.get_rng_state()}
        if self.hardware.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.hardware.device)
        state = self._model_state() | {
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
            "finished_step": self.finished_step,
            "sums": self.sums,
            "revision": revision(),
        }
        folder = Path(self.config.run_dir)
        save_checkpoint(folder / LAST, state, keep=folder / PREVIOUS)

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

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a checkpoint of :meth:`save_last`.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: the contents are not what it writes.
        """
        for name in ("step", "finished_step", "best_miou", "sums"):
            setattr(self, name, checkpoint[name])
        self.seconds_before = checkpoint["seconds"]
        self.model.load_state_dict(checkpoint["model"])
        self.loss.load_state_dict(checkpoint["loss"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if self.hardware.device.type == "cuda" and "cuda" in checkpoint["random"]:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"], self.hardware.device)


@contextmanager
def stoppable(training: Training, log: TrainingLog) -> Iterator[Interruption]:
    """Save the run if a signal stops it, and exit as the signal asks."""
    with Interruption() as stop:
        try:
            yield stop
        except Stopped as stopped:
            log.read(training.sums)
            training.save_last()
            if rank() == 0:
                log.bar.close()
                path = Path(training.config.run_dir) / LAST
                print(f"stopped by {stopped} after step {training.step}, saved in {path}; resume=auto continues")
            sys.exit(stopped.exit_code)


def train_epoch(
    training: Training, batches: Iterable[Episode], total_steps: int, log: TrainingLog, stop: Interruption
) -> None:
    """Train on ``batches``, one step each.

    CUDA is asynchronous and reading a value synchronises, so losses are read every ``LOG_EVERY`` steps. A loss that is
    not finite is noticed then, before anything is saved.

    Raises:
        UserError: a loss is not finite.
        Stopped: a signal asked for it, after a complete step.
    """
    config, model, optimizer, scaler = training.config, training.model, training.optimizer, training.scaler
    model.train()
    for batch in batches:
        lr = learning_rate(config, training.step, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        episodes = batch.to(training.hardware.device)
        if training.step == 0 and config.model.initialisation == "he":
            with training.hardware.autocast():
                model.measure_scale(normalize(episodes.query))
        output = forward(training.network, episodes, training.hardware)
        losses = training.loss(
            output, episodes.query_mask, episodes.support_masks, episodes.class_id, episodes.query_classes
        )
        scaler.scale(losses["total"]).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        training.step += 1
        log.note(training.step, lr, batch.names, losses)
        if training.step % LOG_EVERY == 0:
            log.read(training.sums)
            if log.checkpoint_is_due():
                training.save_last()
        if processes() == 1 or training.step % LOG_EVERY == 0:
            stop.check()
    log.read(training.sums)


def start_or_resume(config: Config, hardware: Hardware, list_sha256: dict[str, str]) -> Training:
    """Start a run, or continue the one that ``config.resume`` names.

    Raises:
        UserError: the run folder holds another run, or one already and resume is 'none'; or the checkpoint does not
            fit the config or the lists.
    """
    checkpoint, path = _checkpoint_to_resume(config, list_sha256)
    torch.manual_seed(config.seed)
    if checkpoint is None:
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
        loss=build_loss(config).to(hardware.device),
        optimizer=build_optimizer(config, model),
        scaler=torch.amp.GradScaler(hardware.device.type, enabled=hardware.precision == torch.float16),
        list_sha256=list_sha256,
    )
    if checkpoint is not None:
        try:
            training.restore(checkpoint)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {path} is damaged or of another version ({error!r:.100}); resume from another, or start"
                " a new run in another run_dir"
            ) from error
    return training


def _checkpoint_to_resume(config: Config, list_sha256: dict[str, str]) -> tuple[dict[str, Any] | None, Path]:
    last, previous = Path(config.run_dir) / LAST, Path(config.run_dir) / PREVIOUS
    exists = last.exists() or previous.exists()
    path = last if config.resume == "auto" else Path(config.resume)
    if exists and path.resolve() not in (last.resolve(), previous.resolve()):
        raise UserError(
            f"{config.run_dir} already holds a run; set resume=auto to continue it, or run_dir=... for another"
        )
    if config.resume == "none" or (config.resume == "auto" and not exists):
        return None, path
    try:
        checkpoint = load_checkpoint(path)
    except UserError as error:
        if config.resume != "auto" or not previous.exists():
            raise
        path = previous
        checkpoint = load_checkpoint(path)
        if rank() == 0:
            print(f"warning: {error}; continuing from {previous}, the checkpoint before", file=sys.stderr)
            with suppress(FileNotFoundError):  # else the next save would put it in the place of the good one
                last.replace(last.with_name(DAMAGED))
    _require_same_run(checkpoint, path, config, list_sha256)
    return checkpoint, path


def _require_same_run(checkpoint: dict[str, Any], path: Path, config: Config, list_sha256: dict[str, str]) -> None:
    """Refuse to resume a run of another config or list, and warn if the code has changed."""
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} holds a model only and cannot be resumed; resume from last.pt")
    require_same(saved_config(checkpoint, path), config, path, resume=True)
    for name, digest in list_sha256.items():
        if checkpoint["list_sha256"].get(name) != digest:
            raise UserError(
                f"list {getattr(config.data, f'{name}_list')} has changed since checkpoint {path} was written, so its"
                " episodes would be others; restore the list, or start a new run in another run_dir"
            )
    if (before := checkpoint.get("revision")) != revision() and rank() == 0:
        print(f"warning: checkpoint {path} was written by revision {before}, this is {revision()}", file=sys.stderr)


def announce(training: Training, data: Data, steps: int) -> None:
    """Say on screen what is about to run."""
    if rank() > 0:
        return
    config, (device, precision), weights = training.config, training.hardware, training.weights
    options, sampler = config.data, data.train_sampler
    for index in (data.train, data.val):
        print(f"list {index.list_path}, {len(index.items)} lines: {title_of(index.items)}")
    if data.shared:
        print(f"warning: {data.shared}")
    print(
        f"{options.dataset} fold {options.fold} of {options.num_folds}, {options.shots}-shot, {config.model.backbone}"
        f" on {device.type}, {str(precision).removeprefix('torch.')}\n"
        f"weights: {weights.source} (stem {weights.stem}, sha256 {weights.sha256[:16] or 'none'})\n"
        f"training: {len(sampler)} images of {len(base_classes(options))} base classes,"
        f" {steps} steps of {config.train.batch_size} episodes"
        f"{f', resumed at step {training.step}' if training.step else ''}\n"
        f"validation: {config.eval.episodes} episodes over {len(data.val_sampler)} images of"
        f" {first_of([options.classes[c - 1] for c in novel_classes(options)], shown=20, separator=', ')}\n"
        f"best.pt is {SELECTION[config.eval.select]}; everything is written to {config.run_dir}",
        flush=True,
    )
    if any(sampler.left_out.values()):
        left_out = ", ".join(f"{options.classes[c - 1]} {n}" for c, n in sampler.left_out.items())
        print(f"left out for novel classes in them (data.novel_in_train=drop), images of each class: {left_out}")
    images = {options.classes[c - 1]: len(photos) for c, photos in data.val_sampler.photos_of.items()}
    if few := too_few(images):
        print(f"warning: {few}")
    if steps < FEW_STEPS:
        print(
            f"warning: {steps} steps are too few to learn from (the quick start takes 584): set train.steps=600, or do"
            " without training: predict.py without --checkpoint"
        )
