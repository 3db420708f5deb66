"""Checkpoints: written atomically, read without running code, refused where they do not fit."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from util.config import Config, config_from_dict, flatten
from util.errors import UserError

FORMAT = 1

FIXED_IN_TEST = (
    "data.dataset",
    "data.classes",
    "data.fold_scheme",
    "data.folds",
    "data.fold",
    "data.image_size",
    "model.backbone",
    "model.bgem",
    "model.doem",
    "model.elimination",
    "model.prototype_channels",
    "model.fem_scales",
)
"""what a checkpoint was trained for; the number of shots, paths and machine settings are free"""

FREE_IN_RESUME = (
    "run_dir",
    "resume",
    "device",
    "workers",
    "data.root",
    "eval.every",
    "eval.batch_size",
    "eval.cache_gib",
)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that ``path`` holds the old file or the new one, whole, whenever the machine stops.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write checkpoint {path} ({error}); free some space or set run_dir elsewhere"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; its code is never run (``weights_only``).

    Raises:
        UserError: missing, truncated or damaged, or not a checkpoint of this project.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist; train.py writes them as run_dir/best.pt") from None
    except Exception as error:  # torch raises many kinds for damaged files, and for files with code in them
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint; use another one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "model" not in state or "config" not in state:
        raise UserError(f"{path} is not a checkpoint of this project (format {FORMAT}); train.py writes them")
    return state


def saved_config(state: dict[str, Any], path: Path) -> Config:
    """The config a checkpoint was trained with."""
    return config_from_dict(state["config"], f"checkpoint {path}")


def require_same(
    saved: Config, given: Config, path: Path, *, resume: bool = False, unknown: Collection[str] = ()
) -> None:
    """Refuse a checkpoint that was trained for something else.

    Args:
        resume: every key but machine settings must be the same, not only what the network and fold depend on.
        unknown: keys that are not compared: a converted checkpoint's 'unknown', see scripts/convert_pfenet.py.
    Raises:
        UserError: naming every key that differs, with both values.
    """
    old, new = (dict(flatten(config.model_dump())) for config in (saved, given))
    keys = [k for k in new if k not in FREE_IN_RESUME] if resume else FIXED_IN_TEST
    different = [
        f"{k} is {_short(old.get(k))} there and {_short(new[k])} here"
        for k in keys
        if k not in unknown and old.get(k) != new[k]
    ]
    if different:
        remedy = (
            "set resume=none and another run_dir to start anew, or use the config it was trained with"
            if resume
            else "use the config it was trained with"
        )
        raise UserError(f"checkpoint {path} does not fit this config: {'; '.join(different)}; {remedy}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
