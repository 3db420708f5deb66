"""The tables of scripts/report.py: runs in, tables out. Reading, drawing and writing stand there.

A cell is (data set, backbone, shots, variant, fold). All its training seeds count, none is chosen. Figures in percent.
"""

import functools
import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from model import backbones as registry
from util.config import COMPARED, Count, departures, flatten, keys_with, read_yaml

BACKBONES = {name: entry.title for name, entry in registry.BACKBONES.items()}
"""as the paper writes them"""
LADDER = {
    "pfenet": ("baseline", False, False, False),
    "bgem": ("+ BGEM", True, False, False),
    "bgem_doem": ("+ DOEM", True, True, False),
    "full": ("+ PCL", True, True, True),
}
"""Table 3: variant, what it adds, and whether BGEM, DOEM and PCL are on"""
NEGATIVES = {"negatives_non_target": "non-target", "negatives_bg": "BG", "full": "DO"}
"""Table 4, from worst to best in the paper"""
ELIMINATIONS = {
    "full": "once (single)",
    "printed": "once, eq. 8 and 9 as printed (printed)",
    "per_scale": "at each FEM scale (per_scale)",
    "authors": "the authors' code (authors)",
    "base_learner": "once, with a base learner (base_learner)",
}
"""forms of the full network beside the default"""
CHANNELS = 640
"""D of the full network"""
NOT_RUN, NO_MEAN = "not run", "-"
ROUNDING = 0.1
"""a printed mean and the mean of four printed folds: each is at most 0.05 off"""

ABLATIONS = Path(__file__).resolve().parents[2] / "configs/ablation"
"""a file a variant"""
OF_DOEM = ("model.do_average", "model.fem_prior", "model.do_similarity")
"""keys that say how DOEM works"""


class Part(BaseModel):
    """Of a file that test.py or train.py wrote; keys that a report does not need are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True)


class Switches(Part):
    weights: str
    bgem: bool
    doem: bool
    prototype_channels: int
    elimination: Literal["single", "per_scale", "authors"] = "single"
    do_average: Literal["image", "region"] = "region"
    fem_prior: bool = False
    do_similarity: bool = False
    base_learner: bool = False


class Loss(Part):
    pcl: bool
    pcl_negatives: Literal["do", "bg", "non_target"]


class RunConfig(Part):
    data: dict[str, Any]
    model: Switches
    loss: Loss
    seed: int


class Scored(Part):
    per_seed: Annotated[list[FiniteFloat], Field(min_length=1)]


class Environment(Part):
    device: str | None = None
    git_revision: str | None = None
    git_clean: bool | None = None


class Results(Part):
    """results.json, as test.py writes it."""

    dataset: str
    fold: Annotated[int, Field(ge=0)]
    folds: Count
    shots: Count
    backbone: str
    episodes: Count
    seeds: list[int]
    unit: Literal["percent"]
    miou: Scored
    fb_iou: Scored
    precision: Scored
    config: RunConfig
    train_seed: int | None = None
    list_sha256: str | None = None
    seconds: FiniteFloat | None = None
    peak_memory_mib: FiniteFloat | None = None
    dtype: str | None = None
    environment: Environment = Environment()

    @model_validator(mode="after")
    def _check(self) -> "Results":
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds}")
        if any(len(s.per_seed) != max(len(self.seeds), 1) for s in (self.miou, self.fb_iou, self.precision)):
            raise ValueError("per_seed does not fit seeds")
        return self


class Cost(Part):
    steps: int
    seconds: FiniteFloat
    peak_memory_mib: FiniteFloat


class Start(Part):
    """One start of a run: the first, or a resumption."""

    time: str
    step: int


class Record(Environment):
    """run.json, as train.py writes it; ``finished`` is there once the training has ended."""

    list_sha256: dict[str, str] = {}
    starts: list[Start] = []
    finished: Cost | None = None


class CurvePoint(Part):
    """A line of metrics.jsonl; unlike everything else its scores are fractions."""

    step: int
    miou: float
    loss: dict[str, float]


class Setting(NamedTuple):
    dataset: str
    backbone: str
    shots: int

    def __str__(self) -> str:
        return f"{self.dataset}, {backbone_name(self.backbone)}, {self.shots}-shot"


def backbone_name(key: str) -> str:
    return BACKBONES.get(key, key)


@dataclass(frozen=True)
class Run:
    """A results file and what its folder tells about the training."""

    file: str
    modified: float
    """seconds since 1970"""
    results: Results
    line: dict[str, Any] = field(default_factory=dict)
    record: Record | None = None
    trained: RunConfig | None = None
    curve: list[CurvePoint] = field(default_factory=list)

    @property
    def setting(self) -> Setting:
        return Setting(self.results.dataset, self.results.backbone, self.results.shots)

    @property
    def variant(self) -> str:
        return variant_of(self.results.config)

    @property
    def seed(self) -> int:
        return self.results.config.seed if self.results.train_seed is None else self.results.train_seed

    @property
    def random_weights(self) -> bool:
        return self.results.config.model.weights == "random"

    @property
    def revisions(self) -> list[str]:
        """Of the evaluation and of the training, each once."""
        sources = [self.results.environment, *([self.record] if self.record else [])]
        names = [(s.git_revision or "unknown")[:7] + " (dirty tree)" * (s.git_clean is False) for s in sources]
        return list(dict.fromkeys(names))


Group = dict[int, list[Run]]
"""runs of a variant in a setting, by fold"""
Groups = dict[tuple[Setting, str], Group]


class Score(NamedTuple):
    mean: float
    std: float | None
    over: Literal["training", "evaluation"] | None
    """which seeds the sample standard deviation is over"""
    seeds: int


@dataclass(frozen=True)
class Line:
    """A row to be: the paper's values (folds, mean, FB-IoU or precision), or our runs and what they compare with."""

    lead: Sequence[str]
    paper: list[float | None] | None = None
    group: Group = field(default_factory=dict)
    reference: list[float | None] | None = None


class Row(NamedTuple):
    cells: list[str]
    ours: bool


@dataclass(frozen=True)
class Table:
    title: str
    """'' where a heading says it"""
    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


class Order(NamedTuple):
    holds: bool | None
    """None: not all means are there"""
    sentence: str


def variant_of(config: RunConfig) -> str:
    """'full' for NTRENet, else the file of ABLATIONS that sets what the run sets, or channels_* for another D.

    'other' is what no file sets, and so what no table shows.
    """
    changed = departures(config.model_dump())
    if not config.model.doem:
        changed = {key: value for key, value in changed.items() if key not in OF_DOEM}
    if changed.keys() == {"model.prototype_channels"}:
        return f"channels_{config.model.prototype_channels}"
    return next((name for name, changes in variants().items() if changes == changed), "other")


@functools.cache
def variants() -> dict[str, dict[str, Any]]:
    """What each variant sets in model and loss."""
    return {"full": {}} | {path.stem: departures(read_yaml(path)) for path in sorted(ABLATIONS.glob("*.yaml"))}


def newest(runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """Runs that count, and those that a newer file of the same cell and training seed replaces.

    Of variant 'other' none is replaced: they need not be the same network.
    """
    counted: dict[tuple[Any, ...], Run] = {}
    replaced = []
    for run in sorted(runs, key=lambda r: (r.modified, r.file)):
        own = run.file if run.variant == "other" else ""
        key = (run.setting, run.variant, run.results.fold, run.seed, own)
        replaced += [counted[key]] if key in counted else []
        counted[key] = run
    return sorted(counted.values(), key=lambda r: (r.setting, r.variant, r.results.fold, r.seed)), replaced


def group_runs(runs: Iterable[Run]) -> Groups:
    groups: Groups = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[run.setting, run.variant][run.results.fold].append(run)
    return {key: dict(group) for key, group in groups.items()}


def score(cells: Sequence[list[Run]], metric: str) -> Score:
    """Mean over folds (``cells``, one list of runs each) of the mean over training, then evaluation seeds.

    The standard deviation is over what every fold has in common: the training seeds, of the mean over folds; if
    each fold has a single one, the evaluation seeds; else there is none.
    """
    values = [[getattr(run.results, metric).per_seed for run in cell] for cell in cells]
    by_run = [[statistics.fmean(seeds) for seeds in cell] for cell in values]
    mean = statistics.fmean(statistics.fmean(cell) for cell in by_run)
    training = {tuple(run.seed for run in cell) for cell in cells}
    evaluation = {tuple(run.results.seeds) for cell in cells for run in cell}
    if len(training) == 1 and len(by_run[0]) > 1:
        std = statistics.stdev(map(statistics.fmean, zip(*by_run, strict=True)))
        return Score(mean, std, "training", len(by_run[0]))
    single = all(len(cell) == 1 for cell in cells)
    if single and len(evaluation) == 1 and len(values[0][0]) > 1:
        by_seed = zip(*(cell[0] for cell in values), strict=True)
        return Score(mean, statistics.stdev(map(statistics.fmean, by_seed)), "evaluation", len(values[0][0]))
    return Score(mean, None, None, 1)


def make_table(
    title: str, lead: Sequence[str], lines: Sequence[Line], folds: int, extra: str | None = None, bold: bool = False
) -> Table:
    """Rows of the folds' mIoU, their mean, and the mean ``extra`` metric ('fb_iou', 'precision').

    Without all folds there is no mean. Where our runs know a single fold and the paper no row, ``extra`` is of it.

    Args:
        bold: mark the best of our rows in each column.
    """
    present = sorted({fold for line in lines for fold in line.group})
    alone = present if len(present) == 1 and not any(line.paper for line in lines) else None
    ours = [fold_scores(line.group, folds, extra, alone) if line.paper is None else [] for line in lines]
    columns = [*lead, *(f"Fold {f}" for f in range(folds)), "Mean"]
    if extra is not None:
        columns.append({"fb_iou": "FB-IoU", "precision": "Precision"}[extra] + (f", fold {alone[0]}" if alone else ""))
    best = []
    for column in zip(*(scores for scores in ours if scores), strict=True):
        means = [s.mean for s in column if s is not None]
        best.append(max(means) if bold and len(means) > 1 else None)

    rows, notes = [], []
    for line, scores in zip(lines, ours, strict=True):
        if line.paper is not None:
            values = line.paper[: len(columns) - len(lead)]
            rows.append(Row([*line.lead, *("-" if v is None else f"{v:.1f}" for v in values)], ours=False))
            notes += disagreement(line.lead, values)
            continue
        reference = line.reference or [None] * len(scores)
        texts = []
        for i, (s, compare, top) in enumerate(zip(scores, reference, best, strict=False)):
            cell = [line.group[i]] if i in line.group else list(line.group.values()) if i >= folds else []
            texts.append(show(s, cell, compare, top) if s else NOT_RUN if i < folds or not line.group else NO_MEAN)
        rows.append(Row([*line.lead, *texts], ours=True))
    runs = [run for line in lines for cell in line.group.values() for run in cell]
    return Table(title, columns, rows, [*notes, *legend(rows, lines, runs)], runs)


def fold_scores(group: Group, folds: int, extra: str | None, alone: list[int] | None) -> list[Score | None]:
    """mIoU of each fold, of all folds, and ``extra`` of all folds or of those in ``alone``."""
    scores = [score([group[f]], "miou") if f in group else None for f in range(folds)]
    whole = [group[f] for f in range(folds)] if set(group) >= set(range(folds)) else []
    scores.append(score(whole, "miou") if whole else None)
    if extra is not None:
        cells = [group[f] for f in alone if f in group] if alone else whole
        scores.append(score(cells, extra) if cells else None)
    return scores


def show(value: Score, cells: list[list[Run]], compare: float | None, top: float | None) -> str:
    """'65.2 ± 0.3 (-0.2)': † the deviation is over evaluation seeds, ‡ random backbone, bold the best."""
    text = f"{value.mean:.1f}"
    if value.std is not None:
        text += f" ± {value.std:.1f}" + ("†" if value.over == "evaluation" else "")
    text += "‡" if any(run.random_weights for cell in cells for run in cell) else ""
    text += "" if compare is None else f" ({signed(value.mean - compare)})"
    return f"**{text}**" if value.mean == top else text


def signed(difference: float) -> str:
    return f"{round(difference, 1) + 0.0:+.1f}"


def disagreement(lead: Sequence[str], values: Sequence[float | None]) -> list[str]:
    """A note where the paper's own mean is not the mean of its folds, rounding allowed for."""
    *folds, mean = values[:5]
    known = [v for v in folds if v is not None]
    if mean is None or len(known) < 4 or abs(statistics.fmean(known) - mean) <= ROUNDING + 1e-9:
        return []
    return [
        f"{name_of(lead)}: the paper prints the mean {mean:.1f}; its four folds have {statistics.fmean(known):.2f}."
    ]


def legend(rows: list[Row], lines: Sequence[Line], runs: list[Run]) -> list[str]:
    """What the marks of a table mean, only those that stand in it, and how many episodes and seeds ours have."""
    if not runs:
        return []
    shown = [cell for row in rows if row.ours for cell in row.cells]
    seeds = sorted({len(cell) for line in lines for cell in line.group.values()})
    marks = {
        f"±: sample standard deviation over training seeds ({either(seeds)} in a cell).": any(
            "±" in cell and "†" not in cell for cell in shown
        ),
        "†: sample standard deviation over the evaluation seeds of a single training seed.": any(
            "†" in cell for cell in shown
        ),
        "No ±: one training and one evaluation seed, or folds with different seeds.": any(
            re.search(r"\d\.\d", cell) and "±" not in cell for cell in shown
        ),
        "‡: the backbone's weights are random.": any("‡" in cell for cell in shown),
        "In brackets: the difference to the paper.": any(line.reference and line.group for line in lines),
        "Bold: the best of ours in its column.": any("**" in cell for cell in shown),
        f"Ours: {either({run.results.episodes for run in runs})} episodes an evaluation seed.": True,
    }
    notes = [text for text, stands in marks.items() if stands]
    for line in lines:
        episodes = {fold: {run.results.episodes for run in cell} for fold, cell in sorted(line.group.items())}
        if len(set().union(*episodes.values())) > 1:
            parts = (f"fold {fold} {either(counts)}" for fold, counts in episodes.items())
            notes.append(f"{name_of(line.lead)}: different numbers of episodes in one row: {', '.join(parts)}.")
    return notes


def either(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(numbers))))


def name_of(lead: Sequence[str]) -> str:
    """A row's name in a note; the check marks of Table 3 count up to 'BGEM, DOEM, PCL'."""
    words = [module if word == "✓" else word for module, word in zip(("BGEM", "DOEM", "PCL"), lead, strict=False)]
    return ", ".join(filter(None, [*words, *lead[3:]]))


def folds_of(groups: Groups, dataset: str) -> int:
    """Number of folds of a data set; the paper's have 4."""
    counts = [r.results.folds for (s, _), g in groups.items() if s.dataset == dataset for c in g.values() for r in c]
    return max(counts, default=4)


def overview(title: str, groups: Groups, dataset: str, shots: int, paper: list[dict[str, Any]]) -> Table:
    """Tables 1 and 2 at one number of shots: the paper's methods by backbone, ours under PFENet and NTRENet."""
    mine = {s.backbone for s, v in groups if (s.dataset, s.shots) == (dataset, shots) and v in ("pfenet", "full")}
    printed = list(dict.fromkeys(row["backbone"] for row in paper))
    names = {backbone_name(backbone): backbone for backbone in (*BACKBONES, *sorted(mine))}
    lines = []
    for name in dict.fromkeys([*printed, *(n for n, b in names.items() if b in mine)]):
        values = {row["method"]: row for row in paper if row["backbone"] == name}
        setting = Setting(dataset, names[name], shots)
        ours = {"PFENet": groups.get((setting, "pfenet"), {}), "NTRENet": groups.get((setting, "full"), {})}
        others = [method for method in values if method != "NTRENet"]
        unlisted = ["PFENet"] if ours["PFENet"] and "PFENet" not in values else []
        for method in [*others, *unlisted, "NTRENet"]:
            row = values.get(method)
            reference = row[f"{shots}-shot"] if row else None
            if row:
                source = f" [{row['reference']}]" if row["reference"] else ""
                lines.append(Line([name, method + source], paper=reference))
            if method == "NTRENet" or ours.get(method):
                lines.append(Line([name, f"{method}, ours"], group=ours[method], reference=reference))
    return make_table(title, ["Backbone", "Method"], lines, folds_of(groups, dataset), "fb_iou")


def ladder(title: str, groups: Groups, setting: Setting, paper: dict[str, list[float | None]] | None) -> Table:
    """Table 3: which module brings what."""
    lines: list[Line] = []
    for variant, (_, *switches) in LADDER.items():
        marks = ["✓" if on else "" for on in switches]
        lines += with_paper(marks, groups.get((setting, variant), {}), paper.get(variant) if paper else None)
    return make_table(
        title, ["BGEM", "DOEM", "PCL", "From"], lines, folds_of(groups, setting.dataset), "precision", bold=True
    )


def negatives(title: str, groups: Groups, setting: Setting, paper: dict[str, list[float | None]] | None) -> Table:
    """Table 4: what the contrastive loss pushes away."""
    lines = []
    for variant, name in NEGATIVES.items():
        lines += with_paper([name], groups.get((setting, variant), {}), paper.get(variant) if paper else None)
    return make_table(title, ["Negatives", "From"], lines, folds_of(groups, setting.dataset), bold=True)


def with_paper(lead: list[str], group: Group, paper: list[float | None] | None) -> list[Line]:
    """The paper's row where there is one, and ours under it."""
    printed = [] if paper is None else [Line([*lead, "paper"], paper=paper)]
    return [*printed, Line([*lead, "ours"], group=group, reference=paper)]


def by_channels(groups: Groups, setting: Setting) -> dict[int, Group]:
    """Figure 6: runs by D, ascending; the full network is D = 640."""
    found = {CHANNELS: groups.get((setting, "full"), {})} | {
        int(variant.removeprefix("channels_")): group
        for (where, variant), group in groups.items()
        if where == setting and variant.startswith("channels_")
    }
    return dict(sorted((d, group) for d, group in found.items() if group))


def channels(title: str, groups: Groups, setting: Setting, paper: list[float | None] | None) -> Table:
    """Figure 6 in figures; of the paper's only D = 640 is known."""
    lines = []
    for d, group in by_channels(groups, setting).items():
        lines += with_paper([str(d)], group, paper if d == CHANNELS else None)
    return make_table(title, ["D", "From"], lines, folds_of(groups, setting.dataset), bold=True)


def elimination(title: str, groups: Groups, setting: Setting) -> Table:
    shown = {v: groups[setting, v] for v in ELIMINATIONS if v == "full" or groups.get((setting, v))}
    lines = [Line([ELIMINATIONS[v], "ours"], group=group) for v, group in shown.items()]
    return make_table(title, ["Elimination", "From"], lines, folds_of(groups, setting.dataset), "precision", bold=True)


def order(groups: Groups, setting: Setting, steps: dict[str, str]) -> Order:
    """Whether our means rise strictly along ``steps`` (variant: name), each step's difference, and its size.

    On the folds that all rows have; only with all folds it is a statement on the paper's order.
    """
    rows = [groups.get((setting, variant), {}) for variant in steps]
    folds = folds_of(groups, setting.dataset)
    common = sorted(set.intersection(*(set(row) for row in rows)))
    if not any(rows):
        return Order(None, "Not run.")
    if not common:
        missing = [name for name, row in zip(steps.values(), rows, strict=True) if not row]
        lacking = f"no runs of {', '.join(missing)}" if missing else "no fold has runs of all rows"
        return Order(None, f"The paper's order cannot be judged on {setting}: {lacking}.")
    scores = [score([row[fold] for fold in common], "miou") for row in rows]
    names = list(steps.values())
    parts = [f"{names[0]} {scores[0].mean:.1f}"]
    for name, before, after in zip(names[1:], scores, scores[1:], strict=False):
        parts.append(f"{name} {after.mean:.1f} ({signed(after.mean - before.mean)}, {against_std(before, after)})")
    holds = all(a.mean < b.mean for a, b in itertools.pairwise(scores))
    verdict = "holds" if holds else "does not hold"
    figures = f"{'; '.join(parts)}."
    if len(common) == folds:
        return Order(holds, f"The paper's order {verdict} on {setting}: {figures}")
    places = f"fold {common[0]}" if len(common) == 1 else f"folds {', '.join(map(str, common))}"
    return Order(
        None,
        f"On {setting} the rows have only {places} of {folds} in common, so there is no mean to compare;"
        f" on {places} alone the paper's order {verdict}: {figures}",
    )


def against_std(before: Score, after: Score) -> str:
    """A difference against the larger standard deviation of its two ends."""
    if before.std is None or after.std is None:
        return "no std to compare with"
    std = max(before.std, after.std)
    larger = before if before.std == std else after
    compared = "more" if abs(after.mean - before.mean) > std else "not more"
    return f"{compared} than the std over {larger.seeds} {larger.over} seeds, {std:.1f}"


def costs(groups: Groups) -> Table:
    """Time and memory, a row for each device and dtype, because they are not comparable."""
    rows: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for (setting, variant), group in sorted(groups.items()):
        for run in (run for cell in group.values() for run in cell):
            trained_on = run.record.device if run.record else None
            devices = dict.fromkeys(d for d in (trained_on, run.results.environment.device) if d)
            rows[setting, variant, "; evaluation: ".join(devices), run.results.dtype].append(run)
    columns = ["Data set", "Backbone", "Shots", "Variant", "Runs", "Training, hours a fold", "Training, peak MiB"]
    columns += ["Evaluation, s per 1000 episodes", "Evaluation, peak MiB", "Device", "dtype"]
    table = Table("", columns, [])
    for (setting, variant, device, dtype), runs in rows.items():
        finished = [r.record.finished for r in runs if r.record and r.record.finished]
        timed = [r.results for r in runs if r.results.seconds is not None]
        speeds = [1000 * (r.seconds or 0) / (r.episodes * len(r.miou.per_seed)) for r in timed]
        peaks = [r.results.peak_memory_mib for r in runs if r.results.peak_memory_mib is not None]
        cells = [setting.dataset, backbone_name(setting.backbone), str(setting.shots), variant]
        cells += [str(len(runs)), measured([c.seconds / 3600 for c in finished], 2)]
        cells += [f"{max(c.peak_memory_mib for c in finished):.0f}" if finished else "not measured"]
        cells += [measured(speeds, 1), f"{max(peaks):.0f}" if peaks else "not measured"]
        table.rows.append(Row([*cells, device or "not recorded", dtype or "not recorded"], ours=False))
    table.notes.append(
        "Times are means over the runs of the row, peaks their maximum: of the GPU's allocator, or of the process on"
        " a CPU. Training includes its evaluations."
    )
    return table


def measured(values: list[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f}" if values else "not measured"


def warnings(tables: Iterable[Table]) -> list[str]:
    """What the runs of a table do not share though they should: lists, code, geometry, settings of the training."""
    found: dict[str, list[str]] = defaultdict(list)
    for table in tables:
        for what, values in differences(table.runs).items():
            found[f"{what} differ ({', '.join(values)})"].append(table.title)
    return [f"{text} in {'; '.join(titles)}" for text, titles in found.items()]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What differs between runs, and its values; settings of the training are compared within a backbone."""
    seen: dict[str, set[str]] = defaultdict(set)
    compared = keys_with(COMPARED)
    for run in runs:
        config = run.results.config.model_dump()
        seen["code revisions"].update(run.revisions)
        seen["evaluation lists"].add((run.results.list_sha256 or "unknown")[:12])
        seen["dtypes"].add(run.results.dtype or "unknown")
        seen["evaluation geometries"].add(str(config.get("eval", {}).get("geometry", "unknown")))
        train_list = (run.trained or run.results.config).data.get("train_list")
        if run.record and train_list in run.record.list_sha256:
            seen["training lists"].add(run.record.list_sha256[train_list][:12])
        for key, value in flatten((run.trained or run.results.config).model_dump()):
            if key in compared:
                seen[f"settings {key} ({run.setting.backbone})"].add(f"{value}"[:60])
    return {what: sorted(values) for what, values in seen.items() if len(values) > 1}
