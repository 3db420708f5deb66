"""Tables of runs next to the paper's figures.

A cell of a table is a network (its row) and a fold, and averages all training and evaluation seeds. The rows and the
paper's figures are data: scripts/paper.yaml. Scores are in percent.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt

from model.backbones import BACKBONES
from util.config import MACHINE, departures, flatten, keys_with
from util.files import read_json

Scores = Annotated[list[FiniteFloat], Field(min_length=1)]

MEASURES = {
    "precision": "Precision",
    "fb_iou": "FB-IoU",
    "calibrated": "mIoU, base threshold",
    "best": "mIoU, best threshold",
}
"""columns after the folds' mIoU at threshold 0.5"""
SHARED = ("revision", "test_list", "train_list", "dtype", "episodes")
"""fields that the runs of one table should share, in addition to the config's keys"""


class Run(BaseModel):
    """An evaluation and its training. A measure has one score for each evaluation seed."""

    file: str
    modified: str
    dataset: str
    backbone: str
    shots: PositiveInt
    fold: NonNegativeInt
    folds: PositiveInt
    seed: int
    """seed of the training"""
    test_seeds: list[int]
    episodes: PositiveInt
    miou: Scores
    fb_iou: Scores
    precision: Scores
    calibrated: Scores | None = None
    """mIoU at the threshold that was chosen on base classes at the end of training"""
    best: Scores | None = None
    """mIoU at the threshold that is best on the novel classes, from scripts/diagnose.py"""
    revision: str
    """git revision of the evaluation, and of the training if that was another"""
    machine: str
    dtype: str = "unknown"
    test_list: str = "unknown"
    """first 12 digits of the list's SHA-256"""
    train_list: str = "unknown"
    training_hours: float | None = None
    training_mib: float | None = None
    test_seconds: float | None = None
    test_mib: float | None = None
    remarks: list[str] = []
    config: dict[str, Any]
    """flat config ('model.bgem': true), without keys that change no figure"""


Settings = dict[str, dict[str, list[Run]]]
"""runs by setting (the title of their tables) and row"""


class Found(NamedTuple):
    """Runs at the given places, and those that cannot be counted."""

    runs: list[Run]
    pending: list[str]
    """run folders without results, and their state"""
    skipped: list[str]
    """files that cannot be read, and why"""


def collect(places: Iterable[Path]) -> Found:
    """Read each results*.json in the folders (at any depth), results files, and the lines of .jsonl files."""
    found = Found([], [], [])
    sources: dict[str, Callable[[], Run]] = {}
    for place in places:
        if place.suffix == ".jsonl":
            lines = place.read_text(encoding="utf-8").splitlines()
            sources |= {f"{place} line {n}": partial(Run.model_validate_json, line) for n, line in enumerate(lines, 1)}
            continue
        files = sorted(place.rglob("results*.json")) if place.is_dir() else [place]
        sources |= {file.as_posix(): partial(read_run, file) for file in files}
        for record in sorted(place.rglob("run.json")):
            if not any(record.parent.glob("results*.json")):
                state = "trained, not evaluated" if read_json(record).get("finished") else "unfinished"
                found.pending.append(f"{record.parent.as_posix()}: {state}")
    for name, read in sources.items():
        try:
            found.runs.append(read())
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = " ".join(str(error).split())
            found.skipped.append(f"{name}, not a results file of test.py: {type(error).__name__}: {reason}")
    return found


def read_run(path: Path) -> Run:
    """Read a results file of test.py, and run.json and diagnosis.json in the same folder if they exist."""
    results = json.loads(path.read_text(encoding="utf-8"))
    training, diagnosis = (read_json(path.with_name(name)) for name in ("run.json", "diagnosis.json"))
    config, finished = results["config"], training.get("finished") or {}
    scores = {name: results[name]["per_seed"] for name in ("miou", "fb_iou", "precision")}
    # test.py leaves out a calibrated threshold of 0.5
    calibrated = results["calibrated"]["miou"]["per_seed"] if "calibrated" in results else finished and scores["miou"]
    by_threshold = diagnosis.get("novel", {}).get("miou")
    tested = results.get("environment", {})
    environments = [tested, training or tested]
    train_list = training.get("list_sha256", {}).get(config.get("data", {}).get("train_list"))
    left_out = {*keys_with(MACHINE), "seed", "data.fold", "data.classes"}
    remarks = [] if finished else ["training unfinished" if training else "no training record"]
    remarks += [f"resumed at step {start['step']}, {start['time']}" for start in training.get("starts", [])[1:]]
    about = {
        "file": path.as_posix(),
        "modified": datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds"),
        "seed": config["seed"] if results.get("train_seed") is None else results["train_seed"],
        "test_seeds": results["seeds"] or [0],
        "calibrated": calibrated or None,
        "best": [max(by_threshold.values())] if by_threshold else None,
        "revision": ", trained at ".join(dict.fromkeys(map(revision, environments))),
        "machine": "; trained on ".join(dict.fromkeys(one.get("device") or "unknown" for one in environments)),
        "test_list": (results.get("list_sha256") or "unknown")[:12],
        "train_list": (train_list or "unknown")[:12],
        "training_hours": finished["seconds"] / 3600 if finished else None,
        "training_mib": finished.get("peak_memory_mib"),
        "test_seconds": results.get("seconds"),
        "test_mib": results.get("peak_memory_mib"),
        "remarks": remarks,
        "config": {key: value for key, value in flatten(config) if key not in left_out},
    }
    return Run.model_validate(results | scores | about)


def revision(environment: Mapping[str, Any]) -> str:
    """Return a record's git revision, shortened, and whether the tree had uncommitted changes."""
    dirty = " (dirty tree)" if environment.get("git_clean") is False else ""
    return (environment.get("git_revision") or "unknown")[:7] + dirty


def ablations(paper: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the tables of paper.yaml whose rows are networks of this project."""
    return {name: table for name, table in paper.items() if isinstance(table["rows"], dict)}


def switches(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config keys that define a row of paper.yaml; all others have their defaults."""
    return {key: value for key, value in row.items() if "." in key}


def arrange(runs: Iterable[Run], paper: Mapping[str, Any]) -> tuple[Settings, list[Run]]:
    """Group runs by setting and row; of runs with equal setting, row, fold and seed the newest counts.

    A setting is a data set, a backbone, shots, and numbers in which the network departs from NTRENet that define no row
    of paper.yaml, such as model.channels=64. A run whose other departures are no row there has a row of its own.

    Returns:
        the runs that count, and those that a newer one replaces
    """
    rows = {key: switches(row) for table in ablations(paper).values() for key, row in table["rows"].items()}
    known = {key for row in rows.values() for key in row}
    cells: dict[tuple[str, str, int, int], Run] = {}
    replaced: list[Run] = []
    for run in sorted(runs, key=lambda run: run.modified):
        changed = departures(run.config)
        sizes = {k: value for k, value in changed.items() if k not in known and not isinstance(value, bool | str)}
        own = {k: value for k, value in changed.items() if k not in sizes}
        backbone = BACKBONES[run.backbone].title if run.backbone in BACKBONES else run.backbone
        setting = ", ".join([run.dataset, backbone, f"{run.shots}-shot", *as_text(sizes)])
        row = next((key for key, row in rows.items() if row == own), ", ".join(as_text(own)))
        cell = (setting, row, run.fold, run.seed)
        replaced += [cells[cell]] if cell in cells else []
        cells[cell] = run
    settings: Settings = defaultdict(lambda: defaultdict(list))
    for cell in sorted(cells):
        settings[cell[0]][cell[1]].append(cells[cell])
    return settings, replaced


def as_text(changed: Mapping[str, Any]) -> list[str]:
    """Write config keys as on a command line."""
    return [f"{key}={json.dumps(value)}" for key, value in changed.items()]


class Score(NamedTuple):
    """A measure of one cell, or its mean over folds."""

    mean: float
    std: float | None
    over: str
    """kind of the seeds that the sample standard deviation is over: 'training' or 'evaluation'"""


def score(runs: Iterable[Run], measure: str) -> Score | None:
    """Average over folds the mean over training seeds of the mean over evaluation seeds; None without runs.

    The standard deviation is over training seeds, of each seed's mean over folds, or over evaluation seeds if there is
    a single training seed. It is None if there is one seed, or if a seed lacks a fold.
    """
    runs = [run for run in runs if getattr(run, measure) is not None]
    if not runs:
        return None
    over = "training" if len({run.seed for run in runs}) > 1 else "evaluation"
    by_seed: dict[int, dict[int, float]] = defaultdict(dict)
    for run in runs:
        values = dict(zip(run.test_seeds, getattr(run, measure), strict=False))  # 'best' is of one seed
        for seed, value in values.items() if over == "evaluation" else [(run.seed, fmean(values.values()))]:
            by_seed[seed][run.fold] = value
    folds = {run.fold for run in runs}
    mean = fmean(fmean(values[fold] for values in by_seed.values() if fold in values) for fold in folds)
    complete = len(by_seed) > 1 and all(len(values) == len(folds) for values in by_seed.values())
    return Score(mean, stdev(fmean(values.values()) for values in by_seed.values()) if complete else None, over)


def show(runs: Sequence[Run], measure: str, reference: float | None = None) -> str:
    """Write '65.2 ± 0.3 (-0.2)', as the report's legend says, or 'not run'."""
    found = score(runs, measure)
    if found is None:
        return "not run"
    text = f"{found.mean:.1f}"
    if found.std is not None:
        text += f" ± {found.std:.1f}" + "†" * (found.over == "evaluation")
    text += "‡" * any(run.config.get("model.weights") == "random" for run in runs)
    return text if reference is None else f"{text} ({found.mean - reference:+.1f})"


def whole(runs: Sequence[Run]) -> bool:
    """Return whether all folds were run, so that there is a mean over folds."""
    return len({run.fold for run in runs}) == max(run.folds for run in runs)


def of_fold(runs: Iterable[Run], fold: int) -> list[Run]:
    """Return the runs of one fold."""
    return [run for run in runs if run.fold == fold]


def ladder(
    runs: Mapping[str, list[Run]], rows: Mapping[str, Mapping[str, Any]], *, next_to_paper: bool = False
) -> list[dict[str, str]]:
    """Make the table of an ablation: the rows that were run, each with its margin to the row above.

    Args:
        runs: runs of one setting, by row
        rows: rows of paper.yaml, with the paper's figures (folds, mean, precision) to compare with if ``next_to_paper``
    """
    every = [run for key in rows for run in runs.get(key, ())]
    measures = {m: title for m, title in MEASURES.items() if any(getattr(run, m) is not None for run in every)}
    if all(run.calibrated in (None, run.miou) for run in every):  # all at 0.5
        measures.pop("calibrated", None)
    lines: list[dict[str, str]] = []
    above: Score | None = None
    for key in (key for key in rows if key in runs):
        own, folds = runs[key], max(run.folds for run in every)
        paper = dict(enumerate(rows[key].get("paper", ()) if next_to_paper else ()))
        mean = score(own, "miou") if whole(own) else None
        line = {"Network": str(rows[key]["label"])}
        line |= {f"Fold {fold}": show(of_fold(own, fold), "miou", paper.get(fold)) for fold in range(folds)}
        line["Mean"] = show(own, "miou", paper.get(folds)) if mean else "-"
        if any("paper" in row for row in rows.values()):
            line["Margin"] = f"{mean.mean - above.mean:+.1f}" if mean and above else ""
        for measure, title in measures.items():
            reference = paper.get(folds + 1) if measure == "precision" and mean else None
            line[title] = show(own, measure, reference) if mean or len({run.fold for run in every}) == 1 else "-"
        line["Seeds"] = " or ".join(map(str, sorted({len(of_fold(own, run.fold)) for run in own})))
        above = mean
        lines.append(line)
    return lines


def next_to_others(table: Mapping[str, Any], shots: int, settings: Settings) -> list[list[str]]:
    """Return Table 1 or 2 of the paper, for the backbones that were run, with our PFENet and NTRENet."""
    lines: list[list[str]] = []
    for row in table["rows"]:
        runs = settings.get(f"{table['dataset']}, {row['backbone']}, {shots}-shot", {})
        if not {"pfenet", "full"} & runs.keys():
            continue
        paper = row[f"{shots}-shot"]
        method = row["method"] + (f" [{row['reference']}]" if row["reference"] else "")
        lines.append([row["backbone"], method, *("-" if value is None else f"{value:.1f}" for value in paper)])
        if own := runs.get({"PFENet": "pfenet", "NTRENet": "full"}.get(row["method"], "")):
            cells = [show(of_fold(own, fold), "miou", paper[fold]) for fold in range(4)]
            cells += [show(own, "miou", paper[4]), show(own, "fb_iou", paper[5])] if whole(own) else ["-", "-"]
            lines.append([row["backbone"], f"{row['method']}, ours", *cells])
    return lines


def differences(runs: Iterable[Run]) -> dict[str, list[str]]:
    """Return fields and settings in which the runs of one table differ, though only row, fold and seed should."""
    values: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        of_row = departures(run.config)
        about = {name: getattr(run, name) for name in SHARED} | run.config
        for name, value in about.items():
            if name not in of_row:
                values[name].add(f"{value}"[:60])
    return {name: sorted(found) for name, found in values.items() if len(found) > 1}
