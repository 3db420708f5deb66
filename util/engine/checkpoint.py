"""Checkpoints: written atomically, read without running code, refused where they do not fit."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.weights import load_data, strange_entry
from util.config import MACHINE, NETWORK, TASK, Config, config_from_dict, flatten, keys_with
from util.errors import UserError
from util.files import refuse_pipe, write_atomically

FORMAT: Literal[3] = 3
"""counts the changes that earlier checkpoints do not survive; 3: the scale of the middle features is measured"""


class _Stem(BaseModel):
    source: str
    stem: Literal["standard", "deep"]
    sha256: str


class _Contents(BaseModel):
    """What every checkpoint holds; see Training in util/engine/run_state.py."""

    model_config = ConfigDict(strict=True)

    format: Literal[3]
    config: dict[str, Any]
    weights: _Stem
    list_sha256: dict[str, str]
    step: Annotated[int, Field(ge=0)]
    best_miou: float
    seconds: float
    model: dict[str, Any]
    unknown: list[str] = []
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """of the probability, chosen on base classes at the end of training; 0.5 before, and in files that lack it"""


def save_checkpoint(path: Path, state: dict[str, Any], *, keep: Path | None = None) -> None:
    """Write ``state`` so that ``path`` holds the old file or the new one, whole, whenever the machine stops.

    Args:
        keep: where the old file is found afterwards.
    Raises:
        UserError: the disk is full or the folder cannot be written; the old file stays.
    """
    try:
        write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file), keep=keep)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        raise UserError(
            f"cannot write checkpoint {path} ({error}); free some space or set run_dir elsewhere"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; its code is never run (``weights_only``).

    Raises:
        UserError: missing, truncated or damaged, or not a checkpoint of this project.
    """
    try:
        refuse_pipe(path)
        state = load_data(path)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist; train.py writes them as run_dir/best.pt") from None
    except Exception as error:  # torch raises many kinds for damaged files, and for files with code in them
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint; use another one") from error
    if isinstance(state, dict) and type(found := state.get("format")) is int and found != FORMAT:
        raise UserError(
            f"checkpoint {path} is of format {found}, this version reads format {FORMAT}; check out the revision that"
            " run.json beside it names, or train anew"
        )
    try:
        _Contents.model_validate(state)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        what = f"is not a checkpoint of this project (format {FORMAT}: {key or 'a dictionary'} is missing or strange)"
        raise UserError(f"{path} {what}; train.py writes them") from error
    if strange := strange_entry(state["model"]):
        raise UserError(f"checkpoint {path} is damaged: {strange}; use another one")
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
    compared = new.keys() - keys_with(MACHINE) if resume else keys_with(TASK, NETWORK)
    if not resume and given.data.base_classes is not None:  # all folds train on the same classes
        compared -= {"data.fold"}
    different = [
        f"{k} is {_short(old.get(k))} there and {_short(new[k])} here"
        for k in new
        if k in compared and k not in unknown and old.get(k) != new[k]
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
