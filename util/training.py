"""A run in progress: what training moves forward, and what a checkpoint must hold to continue it exactly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.losses import NTRELoss
from model.ntrenet import NTRENet
from model.weights import WeightsInfo
from util.build import Hardware, build_loss, build_model, build_optimizer
from util.checkpoint import load_checkpoint, require_same, save_checkpoint, saved_config
from util.config import Config
from util.errors import UserError


@dataclass
class Training:
    config: Config
    hardware: Hardware
    weights: WeightsInfo
    model: NTRENet
    criterion: NTRELoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    list_sha256: dict[str, str]
    """of the lists the episodes come from, by path"""
    step: int = 0
    """steps done in the whole run; episodes and the learning rate are functions of it"""
    best_miou: float = -1.0
    seconds: float = 0.0
    """spent so far, evaluations included, over all resumptions"""

    def save_best(self, path: Path) -> None:
        """The model alone: what test.py needs."""
        save_checkpoint(path, self._model_state())

    def save_last(self, path: Path) -> None:
        """Everything: model, bank, optimiser, random states."""
        random = {"cpu": torch.get_rng_state()}
        if self.hardware.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.hardware.device)
        rest = {
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
        }
        save_checkpoint(path, self._model_state() | rest)

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
        """Continue where :meth:`save_last` stood."""
        self.step, self.best_miou, self.seconds = (checkpoint[key] for key in ("step", "best_miou", "seconds"))
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
        UserError: the run folder holds a run already and resume is 'none', or the checkpoint does not fit.
    """
    checkpoint = _checkpoint_to_resume(config, list_sha256)
    torch.manual_seed(config.seed)
    if checkpoint is None:
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
        training.restore(checkpoint)
    return training


def _checkpoint_to_resume(config: Config, list_sha256: dict[str, str]) -> dict[str, Any] | None:
    last = Path(config.run_dir) / "last.pt"
    path = last if config.resume == "auto" else Path(config.resume)
    if last.exists() and path.resolve() != last.resolve():
        raise UserError(
            f"{config.run_dir} already holds a run; set resume=auto to continue it, or run_dir=... for another"
        )
    if config.resume == "none" or (config.resume == "auto" and not path.exists()):
        return None
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} holds a model only and cannot be resumed; resume from last.pt")
    require_same(saved_config(checkpoint, path), config, path, resume=True)
    for name, digest in list_sha256.items():
        if checkpoint["list_sha256"].get(name) != digest:
            raise UserError(
                f"list {name} has changed since checkpoint {path} was written, so its episodes would be others;"
                " restore the list, or start anew with another run_dir"
            )
    return checkpoint
