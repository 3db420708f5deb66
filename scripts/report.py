"""Tables of your runs next to the paper's: python scripts/report.py runs/ [more] [--out report.md] [--lines F.jsonl]

Reads each results*.json (test.py --out) in the folders, and run.json (train.py) and diagnosis.json (diagnose.py --out)
in the same folder. Without --out the tables are printed. --lines writes the runs into one small .jsonl file, which can
be given instead of the folders.

The tables' rows and the paper's figures are in scripts/paper.yaml. A cell is a network (its row) and a fold, and
averages all training and evaluation seeds. A run that is no row of paper.yaml gets a row of its own in Table 3.

    python scripts/report.py --compare A.json B.json

tells how much better B is than A on one fold, if both were evaluated on the same episodes, with a 95 % interval.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from statistics import fmean, stdev
from typing import Annotated, Any, NamedTuple

import numpy as np
import yaml
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt
from tabulate import tabulate

from model.backbones import BACKBONES
from util.config import MACHINE, departures, flatten, keys_with, protocol_of
from util.errors import UserError
from util.files import read_json, require_writable, write_text

PAPER = Path(__file__).with_name("paper.yaml")
SHARED = ("revision", "test_list", "train_list", "dtype", "episodes")
"""fields that the runs of one table should share, in addition to the config's keys"""
HERE = {
    "PFENet": {"pfenet": "PFENet, here"},
    "NTRENet": {"full": "NTRENet, here, the authors' code", "printed": "NTRENet, here, as printed"},
}
"""rows of paper.yaml shown next to a method of Tables 1 and 2, with their labels"""
LEGEND = (
    "Figures are in percent and are means over all seeds of a cell; there is no best-of-n. ± is the sample standard"
    " deviation over training seeds, in the column Mean that of each seed's mean over folds; with † it is over the"
    " evaluation seeds of a single training. In brackets: the difference to the paper. Margin: to the row above, or to"
    " NTRENet if the paper does not have the row. ‡: the backbone's weights are random. AUC: the chance that"
    " a pixel of the target scores higher than one of another object. Base threshold: chosen on base"
    " classes at the end of training; everything else is at 0.5."
)
Percents = Annotated[list[FiniteFloat], Field(min_length=1)]


class Run(BaseModel):
    """An evaluation and its training. A measure has one score for each evaluation seed."""

    file: str
    modified: str
    dataset: str
    backbone: str
    shots: PositiveInt
    fold: NonNegativeInt
    folds: PositiveInt
    seed: int  # of the training
    protocol: str | None = None  # a file of configs/protocol
    trained_on: str | None = None  # another data set
    method: str | None = None  # a function or a folder of predictions, if no network of ours was evaluated
    episodes: PositiveInt
    miou: Percents
    fb_iou: Percents
    precision: Percents
    calibrated: Percents | None = None  # mIoU at the threshold that was chosen on base classes
    best: Percents | None = None  # mIoU at the best threshold, of scripts/diagnose.py
    auc: Percents | None = None  # of the target against other objects, of scripts/diagnose.py
    revision: str  # of the evaluation, and of the training if that was another
    machine: str
    dtype: str = "unknown"
    test_list: str = "unknown"  # first 12 digits of its SHA-256
    train_list: str = "unknown"
    training_hours: float | None = None
    training_mib: float | None = None
    remarks: list[str] = []
    config: dict[str, Any]  # flat ('model.bgem': true), without keys that change no figure


Settings = dict[str, dict[str, list[Run]]]  # runs by setting (the title of their tables) and row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", type=Path, nargs="*", help="folders, results files of test.py, or .jsonl files")
    parser.add_argument("--out", type=Path, metavar="F.md", help="write the report here")
    parser.add_argument("--lines", type=Path, metavar="F.jsonl", help="write the runs here, a line of JSON each")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="F.json", help="the paired difference of two results")
    args = parser.parse_args()
    if bool(args.places) == bool(args.compare):
        parser.error("give folders or files, or --compare A.json B.json")
    if args.compare:
        print(compare(*args.compare))
        return
    for path, suffix in ((args.out, ".md"), (args.lines, ".jsonl")):
        if path is not None:
            require_writable(path, suffix)
    runs, pending, skipped = collect(args.places)
    for text in skipped:
        print(f"warning: skipped {text}", file=sys.stderr)
    if not runs:
        raise UserError(
            f"no results in {', '.join(map(str, args.places))} ({len(pending)} runs without results); run"
            " 'python test.py --config C --checkpoint RUN/best.pt --out RUN/results.json' first"
        )
    if args.lines is not None:
        runs.sort(key=lambda run: run.file)  # so that a diff shows only the runs that changed
        write_text(args.lines, "".join(run.model_dump_json(exclude_none=True) + "\n" for run in runs))
        print(f"lines: {args.lines}, {len(runs)} runs")
    paper = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    settings, replaced = arrange(runs, paper)
    if args.out is None:
        print(*tables(settings, paper), sep="\n\n")
        return
    blocks = ["# NTRENet: our runs next to the paper's", *tables(settings, paper), *every_run(settings, replaced)]
    for title, texts in (("Runs without results", pending), ("Skipped files", skipped)):
        blocks += [f"## {title}", *(f"- {text}" for text in texts)] if texts else []
    write_text(args.out, "\n\n".join(blocks) + "\n")
    counts = f"{len(runs) - len(replaced)} counted, {len(replaced)} replaced by newer ones"
    print(f"{args.out}: {counts}, {len(pending)} without results, skipped files {len(skipped)}")


# ---------------------------------------------------------------- reading runs


def collect(places: Iterable[Path]) -> tuple[list[Run], list[str], list[str]]:
    """Read each results*.json in the folders (at any depth), results files, and the lines of .jsonl files.

    Returns:
        the runs, the run folders without results, and the files that cannot be read, each with the reason
    """
    runs, pending, skipped = list[Run](), list[str](), list[str]()
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
                pending.append(f"{record.parent.as_posix()}: {state}")
    for name, read in sources.items():
        try:
            runs.append(read())
        except (OSError, ValueError, LookupError, TypeError) as error:
            skipped.append(f"{name}, not a results file of test.py: {' '.join(str(error).split())}")
    return runs, pending, skipped


def read_run(path: Path) -> Run:
    """Read a results file of test.py, and run.json and diagnosis.json in the same folder if they exist."""
    results = json.loads(path.read_text(encoding="utf-8"))
    # another method is not of the training whose folder it is in
    names = () if results.get("method") else ("run.json", "diagnosis.json")
    training, diagnosis = [read_json(path.with_name(name)) for name in names] or ({}, {})
    novel = diagnosis.get("novel")
    auc = novel and novel["auc"]["other objects"]
    config, finished = results["config"], training.get("finished") or {}
    scores = {name: results[name]["per_seed"] for name in ("miou", "fb_iou", "precision")}
    # test.py leaves out a calibrated threshold of 0.5
    calibrated = results["calibrated"]["miou"]["per_seed"] if "calibrated" in results else finished and scores["miou"]
    tested = results.get("environment", {})
    environments = [tested, training or tested]
    train_list = training.get("list_sha256", {}).get(config.get("data", {}).get("train_list"))
    left_out = {*keys_with(MACHINE), "seed", "data.fold", "data.classes"}
    about = {
        "file": path.as_posix(),
        "modified": datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds"),
        "seed": config["seed"] if results.get("train_seed") is None else results["train_seed"],
        "calibrated": calibrated or None,
        "best": novel and [max(novel["miou"].values())],
        "auc": None if auc is None else [auc],
        "revision": ", trained at ".join(dict.fromkeys(map(revision, environments))),
        "machine": "; trained on ".join(dict.fromkeys(one.get("device") or "unknown" for one in environments)),
        "test_list": (results.get("list_sha256") or "unknown")[:12],
        "train_list": (train_list or "unknown")[:12],
        "training_hours": finished["seconds"] / 3600 if finished else None,
        "training_mib": finished.get("peak_memory_mib"),
        "protocol": protocol_of(dict(flatten(config))),
        "remarks": [] if finished else ["training unfinished" if training else "no training record"],
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


def arrange(runs: Iterable[Run], paper: Mapping[str, Any]) -> tuple[Settings, list[Run]]:
    """Group runs by setting and row; of runs with equal setting, row, fold and seed the newest counts.

    A setting is a data set, a backbone, shots, the network's channels if they are not the default, and the protocol. A
    run whose departures from the default network define no row of paper.yaml has a row that is named by them. Methods
    that are not ours, and tests on another data set, have settings of their own. Replaced runs are returned too.
    """
    rows = {key: row for table in ablations(paper).values() for key, row in table["rows"].items()}
    switches = {key: {name: value for name, value in row.items() if "." in name} for key, row in rows.items()}
    cells: dict[tuple[str, str, int, int], Run] = {}
    replaced: list[Run] = []
    for run in sorted(runs, key=lambda run: run.modified):
        changed = departures(run.config)
        channels = changed.pop("model.channels", None)
        backbone = BACKBONES[run.backbone].title if run.backbone in BACKBONES else run.backbone
        dataset = f"{run.dataset} trained on {run.trained_on}" if run.trained_on else run.dataset
        setting = f"{dataset}, {backbone}, {run.shots}-shot" + (f", model.channels={channels}" if channels else "")
        own_name = "+ " + ", ".join(f"{key}={json.dumps(value)}" for key, value in changed.items())
        row = next((key for key, switched in switches.items() if switched == changed), own_name)
        if run.method is not None:
            setting, row = f"{run.dataset}, other methods, {run.shots}-shot", run.method
        setting += f", protocol {run.protocol}" if run.protocol else ""
        cell = (setting, row, run.fold, run.seed)
        replaced += [cells[cell]] if cell in cells else []
        cells[cell] = run
    settings: Settings = defaultdict(lambda: defaultdict(list))
    for cell in sorted(cells):
        settings[cell[0]][cell[1]].append(cells[cell])
    return settings, replaced


# ---------------------------------------------------------------- two runs


def compare(first: Path, second: Path) -> str:
    """Compare two results files of test.py episode by episode."""
    from util.engine.metrics import interval, resampled_miou  # imports torch, which the tables do not need

    a, b = (counted(path) for path in (first, second))
    if a["episodes_sha256"] != b["episodes_sha256"]:
        named = ("dataset", "fold", "shots", "protocol", "list_sha256", "episodes", "seeds")
        why = [f"{name} is {a[name]} in one and {b[name]} in the other" for name in named if a[name] != b[name]]
        raise UserError(f"{first} and {second} are of different episodes: {(why or ['other images were drawn'])[0]}")
    if (a["counts"][..., 2:].sum(-1) != b["counts"][..., 2:].sum(-1)).any():
        raise UserError(f"{first} and {second} are of the same episodes, but of other masks or mask sizes")
    samples = [100 * resampled_miou(one["counts"], one["episode_classes"], len(one["per_class"])) for one in (a, b)]
    means = [one["miou"]["mean"] for one in (a, b)]
    lines = [
        [str(first), f"{means[0]:.1f}", "{:.1f} to {:.1f}".format(*interval(samples[0]))],
        [str(second), f"{means[1]:.1f}", "{:.1f} to {:.1f}".format(*interval(samples[1]))],
        ["difference", f"{means[1] - means[0]:+.1f}", "{:+.1f} to {:+.1f}".format(*interval(samples[1] - samples[0]))],
    ]
    count = len(a["episode_classes"].ravel())
    title = f"{a['dataset']}, fold {a['fold']} of {a['folds']} alone, {a['shots']}-shot, {count} episodes"
    return f"{title}\n" + tabulate(lines, ["", "mIoU", "95 % interval"], "plain", disable_numparse=True)


def counted(path: Path) -> dict[str, Any]:
    """Read a results file of test.py, with its counts (S, N, 4) and classes (S, N) of S seeds as arrays."""
    results = read_json(path)
    if "miou" not in results or "counts" not in results:
        raise UserError(f"{path} holds no counts of episodes; make it with test.py --out, of a checkpoint or a method")
    rows = [row.split() for row in results["counts"]["method" if results["method"] else "network"]]
    seeds = len(results["miou"]["per_seed"])
    return results | {
        "counts": np.array(rows, int).reshape(seeds, -1, 4),
        "episode_classes": np.reshape(results["episode_classes"], (seeds, -1)),
    }


# ---------------------------------------------------------------- cells


class Score(NamedTuple):
    """A measure of one cell, or its mean over folds; its deviation is over seeds of 'training' or 'evaluation'."""

    mean: float
    std: float | None
    over: str


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
        values = getattr(run, measure)
        for seed, value in [(run.seed, fmean(values))] if over == "training" else enumerate(values):
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
    return [run for run in runs if run.fold == fold]


# ---------------------------------------------------------------- tables


def tables(settings: Settings, paper: Mapping[str, Any]) -> Iterator[str]:
    """Yield the ablations of each setting, the differences between their runs, and Tables 1 and 2."""
    names = {key for table in ablations(paper).values() for key in table["rows"]}
    for setting, runs in settings.items():
        yield f"## {setting}"
        others = {key: {"label": key} for key in runs if key not in names}
        for name, table in ablations(paper).items():
            rows = table["rows"] | (others if name == "table3" else {})
            # NTRENet is a row of each ablation; alone, it is shown in Table 3
            if runs.keys() & rows.keys() - ({"full"} if name != "table3" else set()):
                yield f"### {table['title']}"
                yield markdown(ladder(runs, rows, next_to_paper=setting == table.get("setting")))
        for name, values in differences(chain.from_iterable(runs.values())).items():
            yield f"> **Warning:** these runs differ in {name}: {'; '.join(values)}."
    for table in (paper["table1"], paper["table2"]):
        for shots in (1, 5):
            if lines := next_to_others(table, shots, settings):
                yield f"## {table['title']}, {shots}-shot: {table['dataset']}"
                yield markdown(lines, ["Backbone", "Method", *(f"Fold {n}" for n in range(4)), "Mean", "FB-IoU"])
    yield LEGEND


def ladder(
    runs: Mapping[str, list[Run]], rows: Mapping[str, Mapping[str, Any]], *, next_to_paper: bool = False
) -> list[dict[str, str]]:
    """Make the table of an ablation from the runs of one setting: the rows that were run, each with its margin."""
    every = [run for key in rows for run in runs.get(key, ())]
    folds, one_fold = max(run.folds for run in every), len({run.fold for run in every}) == 1
    measures = {"precision": "Precision", "fb_iou": "FB-IoU"}
    if any(run.calibrated not in (None, run.miou) for run in every):
        measures["calibrated"] = "mIoU, base threshold"
    if any(run.best for run in every):
        measures |= {"best": "mIoU, best threshold", "auc": "AUC, other objects"}
    lines: list[dict[str, str]] = []
    means: dict[str, Score | None] = {}
    above: Score | None = None
    for key in (key for key in rows if key in runs):
        own, in_paper = runs[key], "paper" in rows[key]
        paper = dict(enumerate(rows[key]["paper"] if in_paper and next_to_paper else ()))
        mean = means[key] = score(own, "miou") if whole(own) else None
        line = {"Network": str(rows[key]["label"])}
        line |= {f"Fold {fold}": show(of_fold(own, fold), "miou", paper.get(fold)) for fold in range(folds)}
        line["Mean"] = show(own, "miou", paper.get(folds)) if mean else "-"
        if any("paper" in row for row in rows.values()):
            other = above if in_paper else means.get("full")
            line["Margin"] = f"{mean.mean - other.mean:+.1f}" if mean and other else ""
        for measure, title in measures.items():
            reference = paper.get(folds + 1) if measure == "precision" and mean else None
            line[title] = show(own, measure, reference) if mean or one_fold else "-"
        line["Seeds"] = " or ".join(map(str, sorted({len(of_fold(own, run.fold)) for run in own})))
        above = mean
        lines.append(line)
    return lines


def next_to_others(table: Mapping[str, Any], shots: int, settings: Settings) -> list[list[str]]:
    """Return Table 1 or 2 of the paper, for the backbones that were run, with the rows in ``HERE``."""
    lines: list[list[str]] = []
    for row in table["rows"]:
        runs = settings.get(f"{table['dataset']}, {row['backbone']}, {shots}-shot, protocol pfenet", {})
        if not any(key in runs for labels in HERE.values() for key in labels):
            continue
        paper = row[f"{shots}-shot"]
        method = row["method"] + (f" [{row['reference']}]" if row["reference"] else "")
        lines.append([row["backbone"], method, *("-" if value is None else f"{value:.1f}" for value in paper)])
        for key, name in HERE.get(row["method"], {}).items():
            if own := runs.get(key):
                cells = [show(of_fold(own, fold), "miou", paper[fold]) for fold in range(4)]
                cells += [show(own, "miou", paper[4]), show(own, "fb_iou", paper[5])] if whole(own) else ["-", "-"]
                lines.append([row["backbone"], name, *cells])
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


def every_run(settings: Settings, replaced: list[Run]) -> Iterator[str]:
    """Yield a table of all runs, whether they count or not, with the time and memory of their trainings."""
    placed = [(name, run) for rows in settings.values() for name, runs in rows.items() for run in runs]
    placed += [("replaced by a newer run", run) for run in replaced]
    columns = ["File", "Network", "Fold", "Seed", "mIoU", "Training hours", "Training MiB", "Machine", "Revision"]
    lines = []
    for name, run in placed:
        hours = "-" if run.training_hours is None else f"{run.training_hours:.2f}"
        mib = "-" if run.training_mib is None else f"{run.training_mib:.0f}"
        line = [run.file, name, run.fold, run.seed, f"{fmean(run.miou):.1f}", hours, mib, run.machine, run.revision]
        lines.append([*line, run.test_list, run.modified[:16], ", ".join(run.remarks)])
    yield "## Every run"
    yield "A training's time includes its validation. Memory is the highest peak of a process, or of its GPU."
    yield markdown(lines, [*columns, "List", "Written", "Remarks"])


def markdown(lines: Any, columns: Any = "keys") -> str:
    return tabulate(lines, columns, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    run_command(main)
