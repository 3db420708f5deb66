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
from util.config import COMPARED, departures, flatten, keys_with
from util.report.runs import Run

SETTING = ["dataset", "backbone", "shots"]
CELL = [*SETTING, "row", "fold", "seed"]
EXTRAS = {
    "precision": "Precision",
    "fb_iou": "FB-IoU",
    "calibrated": "mIoU, base threshold",
    "best": "mIoU, best threshold",
}
"""measures beside the folds' mIoU at 0.5"""
LEGEND = (
    "Figures are in percent, and the mean over all seeds of a cell; nothing is picked. ± is the sample standard"
    " deviation over training seeds, in the column Mean that of the seeds' own means over folds; with † it is over the"
    " evaluation seeds of a single training. In brackets: the difference to the paper. Margin: to the row above. ‡: the"
    " backbone's weights are random. Base threshold: chosen on base classes at the end of training; best threshold: on"
    " the novel classes themselves (scripts/diagnose.py). All else is at 0.5."
)


class Score(NamedTuple):
    mean: float
    std: float | None
    over: str
    """the seeds that the sample standard deviation is over: 'training' or 'evaluation'"""


def ablations(paper: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Those tables of paper.yaml whose rows are networks of this project."""
    return {name: table for name, table in paper.items() if isinstance(table.get("rows"), dict)}


def switches(row: Mapping[str, Any]) -> dict[str, Any]:
    """The config keys that define a row; all others have their defaults."""
    return {key: value for key, value in row.items() if "." in key}


def of_runs(runs: Sequence[Run]) -> pd.DataFrame:
    """Make a line of each run."""
    columns = [*SETTING, "fold", "folds", "seed", "episodes", "modified"]
    found = pd.DataFrame([{key: getattr(run, key) for key in columns} for run in runs], columns=columns)
    for measure in ("miou", "fb_iou", "precision"):
        found[measure] = [getattr(run, measure).per_seed for run in runs]
    return found.assign(
        calibrated=[run.calibrated_miou for run in runs], best=[run.best_miou for run in runs], run=list(runs)
    )


def frame(runs: Sequence[Run], paper: Mapping[str, Any]) -> pd.DataFrame:
    """Make a line of each run, with the row it belongs to and whether a newer run of the same seed replaces it.

    A row's name is its key in ``paper``. A run that no row there describes is a row of its own, named by the nearest
    one and the keys in which it differs from that. A number in which all runs of a data set that the paper does not
    have differ from NTRENet alike, such as a small network's channels, names no row: column ``common`` holds it.
    """
    found = of_runs(runs)
    named = {key: switches(row) for table in ablations(paper).values() for key, row in table["rows"].items()}
    known = {key for row in named.values() for key in row}
    published = {table.get("dataset") for table in paper.values()}
    for (dataset, _), group in found.groupby(["dataset", "backbone"]):
        changes = [departures(run.config.model_dump()) for run in group.run]
        common = {
            key: value
            for key, value in changes[0].items()
            if dataset not in published and key not in known and not isinstance(value, bool | str)
            if all(key in changed and changed[key] == value for changed in changes)
        }
        found.loc[group.index, "common"] = ", ".join(as_text(common))
        found.loc[group.index, "row"] = [
            name_of({k: v for k, v in c.items() if k not in common}, named) for c in changes
        ]
    found["backbone"] = [BACKBONES[name].title if name in BACKBONES else name for name in found.backbone]
    found = found.sort_values([*CELL, "modified"], ignore_index=True)
    return found.assign(replaced=found.duplicated(CELL, keep="last"))


def name_of(changed: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]]) -> str:
    """The row with these switches, or the one with most of them and what is beside it."""
    within = [key for key, row in named.items() if row.items() <= changed.items()]
    nearest = max(within, key=lambda key: len(named[key]), default="full")
    rest = as_text({key: value for key, value in changed.items() if key not in named.get(nearest, {})})
    return ", ".join([nearest, *rest]) if nearest != "full" or not rest else ", ".join(rest)


def as_text(changed: Mapping[str, Any]) -> list[str]:
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
            for test_seed, value in zip(line.run.seeds or [0], getattr(line, measure), strict=False)
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
    """'65.2 ± 0.3 (-0.2)', as LEGEND says, or 'not run'."""
    found = score(runs, measure)
    if pd.isna(found.mean):
        return "not run"
    text = f"{found.mean:.1f}"
    if found.std is not None:
        text += f" ± {found.std:.1f}" + "†" * (found.over == "evaluation")
    text += "‡" * any(run.config.model.get("weights") == "random" for run in runs.run)
    return text + (f" ({signed(found.mean - reference)})" if reference is not None else "")


def signed(difference: float) -> str:
    return f"{round(difference, 1) + 0.0:+.1f}"


def whole(runs: pd.DataFrame) -> bool:
    """Whether all folds were run, so that there is a mean."""
    return not runs.empty and runs.fold.nunique() == runs.folds.max()


def ladder(runs: pd.DataFrame, rows: Mapping[str, Mapping[str, Any]], *, beside_paper: bool = False) -> pd.DataFrame:
    """Make an ablation's table of the rows that were run, each with its margin to the one above.

    Args:
        runs: of one setting
        rows: of paper.yaml: a label each, and the paper's figures (folds, mean, and perhaps precision), which are
            compared with if ``beside_paper``
    """
    runs = runs[runs.row.isin(rows)]
    extras = {measure: title for measure, title in EXTRAS.items() if runs[measure].notna().any()}
    if all(run.calibrated is None for run in runs.run):
        extras.pop("calibrated", None)  # all at 0.5
    ordered = any("paper" in row for row in rows.values())
    lines: list[dict[str, str]] = []
    above: float | None = None
    for key, row in rows.items():
        own, paper = runs[runs.row == key], dict(enumerate(row.get("paper", ()) if beside_paper else ()))
        if own.empty:
            continue
        folds = runs.folds.max()
        mean = score(own, "miou") if whole(own) else None
        line = {"Network": str(row["label"])}
        line |= {f"Fold {fold}": show(own[own.fold == fold], "miou", paper.get(fold)) for fold in range(folds)}
        line["Mean"] = show(own, "miou", paper.get(folds)) if mean else "-"
        if ordered:
            line["Margin"] = signed(mean.mean - above) if mean and above is not None else ""
        for measure, title in extras.items():
            comparable = whole(own) or set(own.fold) == set(runs.fold)
            reference = paper.get(folds + 1) if measure == "precision" and whole(own) else None
            line[title] = show(own, measure, reference) if comparable else "-"
        line["Seeds"] = " or ".join(map(str, sorted(set(own.groupby("fold").seed.nunique()))))
        above = mean.mean if mean else None
        lines.append(line)
    return pd.DataFrame(lines)


def verdict(runs: pd.DataFrame, rows: Mapping[str, Mapping[str, Any]]) -> tuple[bool | None, str]:
    """Say whether our means rise along the rows as the paper's do, None if not all are there, and by how much."""
    found = {row["label"]: runs[runs.row == key] for key, row in rows.items() if "paper" in row}
    scores = {label: score(own, "miou") for label, own in found.items() if whole(own)}
    if not found or len(scores) < len(found):
        return None, f"cannot be judged ({', '.join(x for x in found if x not in scores)}: not run on all folds)"
    steps, holds = [], True
    for (_, before), (label, after) in itertools.pairwise(scores.items()):
        rise, stds = after.mean - before.mean, [s.std for s in (before, after) if s.std is not None]
        size = (
            f"{'beyond' if abs(rise) > max(stds) else 'within'} the deviation, {max(stds):.1f}" if stds else "one seed"
        )
        steps.append(f"{label} {signed(rise)} ({size})")
        holds &= rise > 0
    return holds, f"{'holds' if holds else 'does not hold'}: {'; '.join(steps)}"


def beside(table: Mapping[str, Any], shots: int, runs: pd.DataFrame) -> pd.DataFrame:
    """Set our PFENet and NTRENet under the rows of Table 1 or 2 of the paper.

    Args:
        runs: of the table's data set and this number of shots
    """
    lines = []
    columns = [*(f"Fold {fold}" for fold in range(4)), "Mean", "FB-IoU"]
    for row in table["rows"]:
        source = f" [{row['reference']}]" if row["reference"] else ""
        values = row[f"{shots}-shot"]
        texts = ["-" if value is None else f"{value:.1f}" for value in values]
        lines.append([row["backbone"], row["method"] + source, *texts])
        key = {"PFENet": "pfenet", "NTRENet": "full"}.get(row["method"], "")
        own = runs[(runs.row == key) & (runs.backbone == row["backbone"])]
        if not own.empty:
            texts = [show(own[own.fold == fold], "miou", values[fold]) for fold in range(4)]
            texts += [
                show(own, m, v) if whole(own) else "-" for m, v in zip(("miou", "fb_iou"), values[4:], strict=True)
            ]
            lines.append([row["backbone"], f"{row['method']}, ours", *texts])
    return pd.DataFrame(lines, columns=["Backbone", "Method", *columns])


def costs(runs: pd.DataFrame) -> pd.DataFrame:
    """Time and memory, a line for each machine and dtype, because these are not comparable."""
    trained = [run.training and run.training.finished for run in runs.run]
    about = runs[[*SETTING, "row"]].assign(
        device=[devices(run) for run in runs.run],
        dtype=[run.dtype or "-" for run in runs.run],
        hours=[cost.seconds / 3600 if cost else None for cost in trained],
        training=[cost.peak_memory_mib if cost else None for cost in trained],
        seconds=[1000 * (run.seconds or float("nan")) / len(run.miou.per_seed) / run.episodes for run in runs.run],
        evaluation=[run.peak_memory_mib for run in runs.run],
    )
    by = about.astype({name: float for name in ("hours", "training", "seconds", "evaluation")}).groupby(
        [*SETTING, "row", "device", "dtype"], as_index=False
    )
    found = by.agg(
        runs=("row", "size"),
        **{"training, hours a fold": ("hours", "mean"), "training, peak MiB": ("training", "max")},
        **{"evaluation, s per 1000 episodes": ("seconds", "mean"), "evaluation, peak MiB": ("evaluation", "max")},
    )
    for column, digits in zip(found.columns[-4:], (2, 0, 1, 0), strict=True):
        found[column] = ["-" if pd.isna(value) else f"{value:.{digits}f}" for value in found[column]]
    return found


def devices(run: Run) -> str:
    """The machine of the training, and that of the evaluation where it is another."""
    both = [run.training and run.training.device, run.environment.device]
    return "; evaluation: ".join(dict.fromkeys(device for device in both if device)) or "-"


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What runs of one table should share and do not, and its values."""
    compared = keys_with(COMPARED)
    about = pd.DataFrame(
        [
            {
                "code revisions": run.revisions,
                "evaluation lists": (run.list_sha256 or "unknown")[:12],
                "training lists": ((run.training and run.training.train_list_sha256) or "unknown")[:12],
                "dtypes": run.dtype or "unknown",
                "numbers of episodes": str(run.episodes),
                "evaluation geometries": str(run.config.eval.get("geometry", "unknown")),
            }
            | {f"settings {k}": f"{v}"[:60] for k, v in flatten(run.config.model_dump()) if k in compared}
            for run in runs
        ]
    )
    return {what: sorted(values.dropna().unique()) for what, values in about.items() if values.nunique() > 1}


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    shown = table.map(lambda cell: html.escape(str(cell), quote=False).replace("|", "&#124;"))
    return shown.to_markdown(index=False, tablefmt="github", disable_numparse=True)
