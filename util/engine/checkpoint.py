"""Checkpoints: written atomically, read without running code, refused if they do not fit."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.ntrenet import NTRENet
from model.weights import load_data, strange_entry
from util.config import MACHINE, TASK, Config, config_from_dict, flatten, keys_with
from util.data.folds import base_classes, novel_classes
from util.engine.build import Hardware, build_saved_model
from util.errors import UserError
from util.files import write_atomically

CONTENTS = {"config", "weights", "list_sha256", "step", "best_miou", "seconds", "model"}
"""entries of every checkpoint; see Training in util/engine/training.py"""


def save_checkpoint(path: Path, state: dict[str, Any], *, keep: Path | None = None) -> None:
    """Write ``state`` atomically: ``path`` is the old file or the new one, complete; ``keep`` gets the old one."""
    try:
        write_atomically(path, lambda file: torch.save(state, file), keep=keep)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        raise UserError(f"cannot write {path} ({error}); free some space or set run_dir elsewhere") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; code in it is never run (``weights_only``)."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; a run's checkpoint is {path / 'best.pt'}")
    try:
        state = load_data(path)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist; train.py writes them as run_dir/best.pt") from None
    except Exception as error:  # torch raises many kinds for damaged files, and for files with code in them
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint; use another one") from error
    if not isinstance(state, dict) or not state.keys() >= CONTENTS:
        raise UserError(f"{path} is not a checkpoint of this project; train.py writes them")
    if strange := strange_entry(state["model"]):
        raise UserError(f"checkpoint {path} is damaged: {strange}; use another one")
    return state


def saved_config(state: dict[str, Any], path: Path) -> Config:
    """Return the config that a checkpoint was trained with."""
    return config_from_dict(state["config"], f"checkpoint {path}")


def require_same(
    saved: Config, given: Config, path: Path, *, resume: bool = False, unknown: Collection[str] = ()
) -> None:
    """Refuse a checkpoint that was trained for something else.

    Args:
        resume: every key but MACHINE keys must be the same, not only the TASK keys.
        unknown: keys that are not compared: a converted checkpoint's 'unknown', see scripts/convert_pfenet.py.
    """
    old, new = (dict(flatten(config.model_dump())) for config in (saved, given))
    compared = new.keys() - keys_with(MACHINE) if resume else keys_with(TASK)
    if not resume and given.data.base_classes is not None:  # all folds train on the same classes
        compared -= {"data.fold"}
    different = [
        f"{k} is {old.get(k)!s:.60} there and {new[k]!s:.60} here"
        for k in new
        if k in compared and k not in unknown and old.get(k) != new[k]
    ]
    if different:
        remedy = "use the config it was trained with"
        if resume:
            remedy = f"set resume=none and another run_dir to start a new run, or {remedy}"
        raise UserError(f"checkpoint {path} does not fit this config: {'; '.join(different)}; {remedy}")


class TrainedNetwork(NamedTuple):
    """A checkpoint's network, and how it was trained."""

    model: NTRENet
    threshold: float
    """chosen on base classes; 0.5 if none was"""
    trained: dict[str, Any]
    """the sections of its config that an evaluation does not use, and its seed if it is recorded"""
    trained_on: str | None = None
    """the data set, if it is tested on another, and the fold, if that is another"""


def load_network(config: Config, hardware: Hardware, path: Path) -> TrainedNetwork:
    """Build the network of a checkpoint, which must have been trained for this config's fold and network.

    A converted checkpoint lists the keys that it does not record ('unknown'); they are taken from ``config``.
    """
    checkpoint = load_checkpoint(path)
    saved, unknown = saved_config(checkpoint, path), checkpoint.get("unknown", ())
    require_same(saved, config, path, unknown=unknown)
    model = build_saved_model(config, checkpoint, path).to(hardware.device)
    if "data.fold" in unknown:
        print(f"note: checkpoint {path} does not record its fold; it is tested on fold {config.data.fold}")
    recorded = saved.model_dump(include={"loss", "train"} if "seed" in unknown else {"loss", "train", "seed"})
    return TrainedNetwork(model, checkpoint.get("threshold", 0.5), recorded)


def load_across(config: Config, hardware: Hardware, path: Path) -> tuple[TrainedNetwork, Config]:
    """Build the network of a checkpoint that was trained on other data; no novel class may be one that it has learned.

    Returns:
        the network, and ``config`` with the checkpoint's network and input size
    """
    checkpoint = load_checkpoint(path)
    saved = saved_config(checkpoint, path)
    if "data.classes" in checkpoint.get("unknown", ()):
        raise UserError(f"checkpoint {path} does not record the classes that it was trained on; leave out --across")
    learned = {plain(saved.data.classes[c - 1]) for c in base_classes(saved.data)}
    names = [config.data.classes[c - 1] for c in novel_classes(config.data)]
    data = saved.data.dataset
    if leaked := [name for name in names if plain(name) in learned]:
        every = ", ".join([*config.data.left_out, *leaked])
        raise UserError(
            f"checkpoint {path} was trained on '{leaked[0]}' ({data}, fold {saved.data.fold}), which is novel in this"
            f" test: choose another fold of {data}, or leave out what it has learned with data.left_out='[{every}]'"
        )
    same_fold = (saved.data.fold, saved.data.num_folds) == (config.data.fold, config.data.num_folds)
    as_trained = {key: getattr(saved.data, key) for key in ("image_size", "novel_in_train")}
    network = TrainedNetwork(
        build_saved_model(saved, checkpoint, path).to(hardware.device),
        checkpoint.get("threshold", 0.5),
        saved.model_dump(include={"loss", "train", "seed"}),
        data if same_fold else f"{data} fold {saved.data.fold}",
    )
    return network, config.model_copy(update={"model": saved.model, "data": config.data.model_copy(update=as_trained)})


def plain(name: str) -> str:
    """Return a class's name as it is compared: 'Dining_table' is 'dining table'."""
    return name.casefold().replace("_", " ").replace("-", " ").strip()
