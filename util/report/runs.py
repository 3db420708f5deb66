"""What a report reads: a flat record a run, made of the results of test.py and of what lies beside them.

Many runs fit one small file, a line of JSON each, from which the same tables are made.
"""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from util.config import COMPARED, Count, flatten, keys_with
from util.files import read_json, write_text

Scores = Annotated[list[FiniteFloat], Field(min_length=1)]


class Run(BaseModel):
    """An evaluation and its training. Scores are in percent, one for each test seed."""

    file: str
    modified: str
    dataset: str
    backbone: str
    shots: Count
    fold: Annotated[int, Field(ge=0)]
    folds: Count
    seed: int
    """the training's"""
    test_seeds: list[int]
    episodes: Count
    miou: Scores
    fb_iou: Scores
    precision: Scores
    calibrated: Scores | None = None
    """mIoU at the threshold that was chosen on base classes at the end of training"""
    best: Scores | None = None
    """mIoU at the threshold that is best on the novel classes themselves, as scripts/diagnose.py finds it"""
    revision: str
    """the code's, at the evaluation and, where it was another, at the training"""
    machine: str
    dtype: str = "unknown"
    test_list: str = "unknown"
    train_list: str = "unknown"
    """SHA-256 of the lists, the first 12 digits"""
    training_hours: float | None = None
    training_mib: float | None = None
    test_seconds: float | None = None
    test_mib: float | None = None
    remarks: list[str] = []
    config: dict[str, Any]
    """what tells the network, and what the runs of a table should share, by key: 'model.bgem' ..."""


class Found(NamedTuple):
    """What lies at the given places."""

    runs: list[Run]
    pending: list[str]
    """folders of runs without results, and how far they are"""
    skipped: list[str]
    """files that cannot be read, and why"""


def collect(places: Sequence[Path]) -> Found:
    """Read every results file below the folders, each once, other results files, and the lines of .jsonl files."""
    found = Found([], [], [])
    folders, lists = [[place for place in places if kind(place)] for kind in (Path.is_dir, is_list)]
    files = [file for folder in folders for file in sorted(folder.rglob("results*.json"))]
    files += [place for place in places if place not in (*folders, *lists)]
    sources: list[tuple[str, Callable[[], Run]]] = [
        (file.as_posix(), partial(read_run, file)) for file in {file.resolve(): file for file in files}.values()
    ]
    for place in lists:
        lines = place.read_text(encoding="utf-8").splitlines()
        sources += [(f"{place} line {n}", partial(Run.model_validate_json, line)) for n, line in enumerate(lines, 1)]
    for name, read in sources:
        try:
            found.runs.append(read())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            found.skipped.append(f"{name} (damaged or not ours: {reason(error)})")
    evaluated = {file.parent for file in files}
    for record in (record for folder in folders for record in sorted(folder.rglob("run.json"))):
        if record.parent not in evaluated:
            state = "trained, not evaluated" if read_json(record).get("finished") else "unfinished"
            found.pending.append(f"{record.parent.as_posix()}: {state}")
    return found


def is_list(path: Path) -> bool:
    """Tell whether a file holds a run on each line."""
    return path.suffix == ".jsonl" and path.is_file()


def read_run(path: Path) -> Run:
    """Join a results file with the run.json and the diagnosis.json beside it.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: the results file is damaged, or is not one.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    if "baselines" in results and "miou" not in results:
        raise ValueError("it holds only what needs no training; run test.py with --checkpoint as well")
    training, diagnosis = (read_json(path.with_name(name)) for name in ("run.json", "diagnosis.json"))
    shared = keys_with(COMPARED) - {"data.classes"}  # a thousand names
    finished, config, seed = training.get("finished") or {}, results["config"], results.get("train_seed")
    scores = {name: results[name]["per_seed"] for name in ("miou", "fb_iou", "precision")}
    by_threshold = diagnosis.get("novel", {}).get("miou")
    both = [results.get("environment", {}), training or results.get("environment", {})]
    lists = results.get("list_sha256"), training.get("list_sha256", {}).get(config.get("data", {}).get("train_list"))
    remarks = ["training unfinished" if training else "no training record"] if not finished else []
    remarks += [f"resumed at step {start['step']}, {start['time']}" for start in training.get("starts", [])[1:]]
    about = {
        "file": path.as_posix(),
        "modified": datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds"),
        "seed": config["seed"] if seed is None else seed,
        "test_seeds": results["seeds"] or [0],
        # a threshold of 0.5 is not repeated by test.py
        "calibrated": results["calibrated"]["miou"]["per_seed"] if "calibrated" in results else None,
        "best": [max(map(float, by_threshold.values()))] if by_threshold else None,
        "revision": ", trained at ".join(dict.fromkeys(map(revision, both))),
        "machine": "; trained on ".join(dict.fromkeys(one.get("device") or "unknown" for one in both)),
        "test_list": (lists[0] or "unknown")[:12],
        "train_list": (lists[1] or "unknown")[:12],
        "training_hours": finished["seconds"] / 3600 if finished else None,
        "training_mib": finished.get("peak_memory_mib"),
        "test_seconds": results.get("seconds"),
        "test_mib": results.get("peak_memory_mib"),
        "remarks": remarks,
        "config": {
            key: value for key, value in flatten(config) if key.startswith(("model.", "loss.")) or key in shared
        },
    }
    if finished and about["calibrated"] is None:
        about["calibrated"] = scores["miou"]
    return Run.model_validate(results | scores | about)


def revision(environment: dict[str, Any]) -> str:
    """Shorten a record's revision of the code, and say where the tree held changes."""
    return (environment.get("git_revision") or "unknown")[:7] + " (dirty tree)" * (
        environment.get("git_clean") is False
    )


def reason(error: Exception) -> str:
    """Tell the first of what is wrong, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]


def write_runs(path: Path, runs: Sequence[Run]) -> None:
    """Write a line a run, sorted by file, so that a list under version control changes where runs did."""
    ordered = sorted(runs, key=lambda run: run.file)
    write_text(path, "".join(run.model_dump_json(exclude_none=True) + "\n" for run in ordered))


def read_curve(file: str) -> pd.DataFrame:
    """Read what training wrote at each step as TensorBoard events beside a results file; empty where there are none.

    Returns:
        a column a scalar ('loss/total', 'val/miou' ...), indexed by step.
    """
    folder = Path(file).with_name("tensorboard")
    if not folder.is_dir():
        return pd.DataFrame()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second to import

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    return pd.DataFrame(scalars).sort_index()
