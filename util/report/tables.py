"""Runs in, tables out. A cell of a table is a row (which network), a fold and a measure; all its seeds count.

The rows and the paper's figures are data: scripts/paper.yaml. Figures are in percent.
"""

import html
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from model.backbones import BACKBONES
from util.config import COMPARED, departures, keys_with
from util.report.runs import Run

CELL = ["setting", "row", "fold", "seed"]
EXTRAS = {
    "precision": "Precision",
    "fb_iou": "FB-IoU",
    "calibrated": "mIoU, base threshold",
    "best": "mIoU, best threshold",
}
"""measures beside the folds' mIoU at 0.5"""
SHARED = {
    "code revisions": "revision",
    "evaluation lists": "test_list",
    "training lists": "train_list",
    "dtypes": "dtype",
    "numbers of episodes": "episodes",
}
"""what the runs of one table should share, beside config keys"""
LEGEND = (
    "Figures are in percent, and the mean over all seeds of a cell; nothing is picked. ± is the sample standard"
    " deviation over training seeds, in the column Mean that of the seeds' own means over folds; with † it is over the"
    " evaluation seeds of a single training. In brackets: the difference to the paper. Margin: to the row above. ‡: the"
    " backbone's weights are random. Base threshold: chosen on base classes at the end of training; best threshold: on"
    " the novel classes themselves (scripts/diagnose.py). All else is at 0.5."
)


class Score(NamedTuple):
    """A figure of one cell, or of the mean over its folds."""

    mean: float
    std: float | None
    over: str
    """the seeds that the sample standard deviation is over: 'training' or 'evaluation'"""


def ablations(paper: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return those tables of paper.yaml whose rows are networks of this project."""
    return {name: table for name, table in paper.items() if isinstance(table.get("rows"), dict)}


def switches(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config keys that define a row; all others have their defaults."""
    return {key: value for key, value in row.items() if "." in key}


def frame(runs: Sequence[Run], paper: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Make a line of each run, with its setting, the row it belongs to, and whether a newer run replaces it.

    A setting is what one table is about: data set, backbone, shots, and numbers in which the network departs from
    NTRENet and that define no row, such as a small network's channels. A row's name is its key in ``paper``. A run that
    no row there describes is a row of its own, named by the nearest one and the keys in which it differs from that.
    """
    found = pd.DataFrame([run.model_dump() for run in runs])
    if found.empty:
        return found
    named = {key: switches(row) for table in ablations(paper or {}).values() for key, row in table["rows"].items()}
    known = {key for row in named.values() for key in row}
    settings, rows = [], []
    for run in runs:
        changed = departures(run.config)
        sizes = {k: value for k, value in changed.items() if k not in known and not isinstance(value, bool | str)}
        backbone = BACKBONES[run.backbone].title if run.backbone in BACKBONES else run.backbone
        settings.append(", ".join([run.dataset, backbone, f"{run.shots}-shot", *as_text(sizes)]))
        rows.append(name_of({k: value for k, value in changed.items() if k not in sizes}, named))
    order = {key: place for place, key in enumerate(named)}
    found = found.assign(setting=settings, row=rows, place=[order.get(row, len(order)) for row in rows])
    found = found.sort_values(["setting", "place", *CELL[1:], "modified"], ignore_index=True)
    return found.assign(replaced=found.duplicated(CELL, keep="last"))


def name_of(changed: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]]) -> str:
    """Name the row with these switches, or the one with most of them and what is beside it."""
    within = [key for key, row in named.items() if row.items() <= changed.items()]
    nearest = max(within, key=lambda key: len(named[key]), default="full")
    rest = as_text({key: value for key, value in changed.items() if key not in named.get(nearest, {})})
    return ", ".join([nearest, *rest]) if nearest != "full" or not rest else ", ".join(rest)


def as_text(changed: Mapping[str, Any]) -> list[str]:
    """Write config keys as a command line has them."""
    return [f"{key}={json.dumps(value)}" for key, value in changed.items()]


def score(runs: pd.DataFrame, measure: str) -> Score:
    """Take the mean over folds of the mean over training seeds of the mean over evaluation seeds; NaN without runs.

    The standard deviation is over what every fold has in common: the training seeds, of their means over folds; if
    there is a single one, the evaluation seeds; else there is none.
    """
    values = pd.DataFrame(
        [
            (line.seed, line.fold, test_seed, value)
            for line in runs[runs[measure].notna()].itertuples()
            for test_seed, value in zip(line.test_seeds, getattr(line, measure), strict=False)
        ],
        columns=["training", "fold", "evaluation", "value"],
    )
    if values.empty:
        return Score(float("nan"), None, "training")
    each = values.groupby(["training", "fold"]).value.mean().unstack()
    over = "training" if len(each) > 1 else "evaluation"
    by_seed = each if len(each) > 1 else values.pivot_table("value", "evaluation", "fold")
    std = float(by_seed.mean(axis=1, skipna=False).std(skipna=False))
    return Score(float(each.mean().mean()), None if pd.isna(std) else std, over)


def show(runs: pd.DataFrame, measure: str, reference: float | None = None) -> str:
    """Write '65.2 ± 0.3 (-0.2)', as LEGEND says, or 'not run'."""
    found = score(runs, measure)
    if pd.isna(found.mean):
        return "not run"
    text = f"{found.mean:.1f}"
    if found.std is not None:
        text += f" ± {found.std:.1f}" + "†" * (found.over == "evaluation")
    text += "‡" * any(config.get("model.weights") == "random" for config in runs.config)
    return text + (f" ({found.mean - reference:+.1f})" if reference is not None else "")


def whole(runs: pd.DataFrame) -> bool:
    """Tell whether all folds were run, so that there is a mean."""
    return not runs.empty and runs.fold.nunique() == runs.folds.max()


def ladder(runs: pd.DataFrame, rows: Mapping[str, Mapping[str, Any]], *, beside_paper: bool = False) -> pd.DataFrame:
    """Make an ablation's table of the rows that were run, each with its margin to the one above.

    Args:
        runs: of one setting
        rows: of paper.yaml: a label each, and the paper's figures (folds, mean, and perhaps precision), which are
            compared with if ``beside_paper``
    """
    runs = runs[runs.row.isin(rows)]
    folds = runs.folds.max()
    extras = {measure: title for measure, title in EXTRAS.items() if runs[measure].notna().any()}
    if (runs.calibrated.isna() | (runs.calibrated == runs.miou)).all():  # all at 0.5
        extras.pop("calibrated", None)
    lines: list[dict[str, str]] = []
    above: float | None = None
    for key, own in ((key, runs[runs.row == key]) for key in rows if (runs.row == key).any()):
        paper = dict(enumerate(rows[key].get("paper", ()) if beside_paper else ()))
        mean = score(own, "miou").mean if whole(own) else None
        line = {"Network": str(rows[key]["label"])}
        line |= {f"Fold {fold}": show(own[own.fold == fold], "miou", paper.get(fold)) for fold in range(folds)}
        line["Mean"] = "-" if mean is None else show(own, "miou", paper.get(folds))
        if any("paper" in row for row in rows.values()):
            line["Margin"] = "" if mean is None or above is None else f"{mean - above:+.1f}"
        for measure, title in extras.items():
            comparable = whole(own) or set(own.fold) == set(runs.fold)
            reference = paper.get(folds + 1) if measure == "precision" and whole(own) else None
            line[title] = show(own, measure, reference) if comparable else "-"
        line["Seeds"] = " or ".join(map(str, sorted(set(own.groupby("fold").seed.nunique()))))
        above = mean
        lines.append(line)
    return pd.DataFrame(lines)


def follows(runs: pd.DataFrame, rows: Mapping[str, Mapping[str, Any]]) -> bool | None:
    """Tell whether our means rise along the rows as the paper's do; None where not all are there on all folds."""
    cells = [runs[runs.row == key] for key, row in rows.items() if "paper" in row]
    means = [score(own, "miou").mean for own in cells if whole(own)]
    return all(a < b for a, b in itertools.pairwise(means)) if cells and len(means) == len(cells) else None


def beside(table: Mapping[str, Any], shots: int, runs: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """Set our PFENet and NTRENet under the rows of Table 1 or 2 of the paper, and tell whether any was run."""
    lines: list[list[str]] = []
    for row in table["rows"]:
        paper = row[f"{shots}-shot"]
        source = f" [{row['reference']}]" if row["reference"] else ""
        printed = ["-" if value is None else f"{value:.1f}" for value in paper]
        lines.append([row["backbone"], row["method"] + source, *printed])
        key = {"PFENet": "pfenet", "NTRENet": "full"}.get(row["method"])
        own = runs[(runs.setting == f"{table['dataset']}, {row['backbone']}, {shots}-shot") & (runs.row == key)]
        if not own.empty:
            texts = [show(own[own.fold == fold], "miou", paper[fold]) for fold in range(4)]
            texts += [show(own, "miou", paper[4]), show(own, "fb_iou", paper[5])] if whole(own) else ["-", "-"]
            lines.append([row["backbone"], f"{row['method']}, ours", *texts])
    columns = ["Backbone", "Method", *(f"Fold {fold}" for fold in range(4)), "Mean", "FB-IoU"]
    return pd.DataFrame(lines, columns=columns), len(lines) > len(table["rows"])


def costs(runs: pd.DataFrame) -> pd.DataFrame:
    """Sum up time and memory of one setting, a line for each machine and dtype, because these are not comparable."""
    runs = runs.assign(per_1000=1000 * runs.test_seconds.astype(float) / (runs.episodes * runs.miou.map(len)))
    columns = ["training_hours", "training_mib", "per_1000", "test_mib"]
    by = runs.astype(dict.fromkeys(columns, float)).groupby(["row", "machine", "dtype"], sort=False)
    found = by.agg(
        Runs=("row", "size"),
        **{"Hours a fold": ("training_hours", "mean"), "Training MiB": ("training_mib", "max")},
        **{"s per 1000 episodes": ("per_1000", "mean"), "Test MiB": ("test_mib", "max")},
    )
    digits = dict(zip(found.columns[1:], ("{:.2f}", "{:.0f}", "{:.1f}", "{:.0f}"), strict=True))
    return found.assign(
        **{c: found[c].map(text.format).replace("nan", "-") for c, text in digits.items()}
    ).reset_index()


def differences(runs: pd.DataFrame) -> dict[str, list[str]]:
    """Return what the runs of one table should share and do not, and its values."""
    about = pd.DataFrame({what: runs[column].map(str) for what, column in SHARED.items()})
    for key in sorted(keys_with(COMPARED)):
        about[f"settings {key}"] = [f"{config[key]}"[:60] if key in config else None for config in runs.config]
    return {what: sorted(values.dropna().unique()) for what, values in about.items() if values.nunique() > 1}


def markdown(table: pd.DataFrame) -> str:
    """Write a table as Markdown."""
    shown = table.map(lambda cell: html.escape(str(cell), quote=False).replace("|", "&#124;"))
    return shown.to_markdown(index=False, tablefmt="github", disable_numparse=True)
