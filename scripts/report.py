"""Our runs against the paper: python scripts/report.py runs/ [more folders] --out report

Reads every results*.json (test.py --out) below the folders, and run.json, config.yaml and metrics.jsonl (train.py)
beside it; a .jsonl in place of a folder holds such runs as lines, which --lines writes. Writes report.md, report.html
(one file, pictures inside) and the pictures into --out. The paper's figures stand in
scripts/paper.yaml. The same runs give the same files.
"""

import argparse
import base64
import html
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BaseModel, ValidationError

from util.errors import UserError
from util.files import require_writable, write_bytes, write_text
from util.report import tables
from util.report.lines import to_line, write_lines
from util.report.tables import CurvePoint, Groups, Order, Record, Results, Row, Run, RunConfig, Setting, Table

M = TypeVar("M", bound=BaseModel)

PAPER = Path(__file__).with_name("paper.yaml")
TITLE = "NTRENet: our runs against the paper"


class Heading(NamedTuple):
    text: str
    level: int = 2


class Bullets(NamedTuple):
    items: list[str]


class Alert(NamedTuple):
    text: str


class Picture(NamedTuple):
    name: str
    alt: str
    png: bytes


Block = Heading | Bullets | Alert | Picture | Table | str
"""what a report is a list of; str is a paragraph. In all text **bold** and `code` are marked so"""


class Found(NamedTuple):
    """What lies below the folders."""

    runs: list[Run]
    pending: list[tuple[str, str]]
    """run folders without results: name and how far they are"""
    skipped: list[str]
    """files that cannot be read, and why"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="where results.json files lie, at any depth, or a .jsonl")
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--lines", type=Path, metavar="F.jsonl", help="write the runs here, a line of JSON each")
    args = parser.parse_intermixed_args()
    for folder in args.folders:
        if not folder.is_dir() and not (folder.suffix == ".jsonl" and folder.is_file()):
            raise UserError(f"{folder} is not a folder; give the folders in which test.py wrote its results")
    for path in (args.out and args.out / "report.md", args.lines):
        if path is not None:
            require_writable(path, ".jsonl" if path == args.lines else ".md")
    found = collect(args.folders)
    if not found.runs:
        names = ", ".join(map(str, args.folders))
        unfinished = f" ({len(found.pending)} runs there have none yet)" if found.pending else ""
        raise UserError(
            f"no results in {names}{unfinished}; run 'python test.py --config C --checkpoint RUN/best.pt --out"
            " RUN/results.json' first, then name the folder that holds RUN"
        )
    if args.lines is not None:
        write_lines(args.lines, [run.line for run in found.runs])
        print(f"lines: {args.lines}, {len(found.runs)} runs")
    if args.out is None:
        return
    paper = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    summary, blocks = compose(found, paper)
    for picture in (block for block in blocks if isinstance(block, Picture)):
        write_bytes(args.out / picture.name, picture.png)
    write_text(args.out / "report.md", as_markdown(blocks))
    write_text(args.out / "report.html", as_html(blocks))
    print(f"report: {args.out / 'report.md'}, {args.out / 'report.html'}", *summary, sep="\n")


def collect(folders: Sequence[Path]) -> Found:
    """Every run below ``folders``; what cannot be read is named on stderr and kept in ``skipped``."""
    found = Found([], [], [])
    seen: set[Path] = set()
    for folder in folders:
        if folder.is_file():
            found.runs.extend(read_lines(folder, found.skipped))
            continue
        with_results = set()
        for path in sorted(folder.rglob("results*.json")):
            with_results.add(path.parent)
            if path.resolve() not in seen:
                seen.add(path.resolve())
                run = read_run(path, found.skipped)
                found.runs.extend([run] if run else [])
        for path in sorted(folder.rglob("run.json")):
            if path.parent not in with_results and path.resolve() not in seen:
                seen.add(path.resolve())
                record = read(path, Record, found.skipped)
                state = "trained, not evaluated" if record and record.finished else "unfinished"
                found.pending.append((path.parent.as_posix(), state))
    skipped = list(dict.fromkeys(found.skipped))
    for text in skipped:
        print(f"warning: skipped {text}", file=sys.stderr)
    return found._replace(skipped=skipped)


def read_lines(path: Path, skipped: list[str]) -> list[Run]:
    """The runs of a file that ``--lines`` wrote."""
    runs = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            modified = datetime.fromisoformat(line["modified"]).timestamp()
            record = Record.model_validate(line["trained"]) if "trained" in line else None
            runs.append(Run(line["run"], modified, Results.model_validate(line), line, record))
        except (ValueError, KeyError, TypeError) as error:
            skipped.append(f"{path.as_posix()} line {number} (damaged or not ours: {str(error).splitlines()[0]})")
    return runs


def read_run(path: Path, skipped: list[str]) -> Run | None:
    results = read(path, Results, skipped)
    if results is None:
        return None
    folder = path.parent
    return Run(
        path.as_posix(),
        path.stat().st_mtime,
        results,
        to_line(path),
        record=read(folder / "run.json", Record, skipped),
        trained=read(folder / "config.yaml", RunConfig, skipped),
        curve=read_curve(folder / "metrics.jsonl", skipped),
    )


def read(path: Path, kind: type[M], skipped: list[str]) -> M | None:
    """A JSON or YAML file as ``kind``; None if it is not there, or damaged, which goes to ``skipped``."""
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        return kind.model_validate(yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
    skipped.append(f"{path.as_posix()} (damaged or not ours: {reason})")
    return None


def read_curve(path: Path, skipped: list[str]) -> list[CurvePoint]:
    if not path.exists():
        return []
    try:
        return [CurvePoint.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        skipped.append(f"{path.as_posix()} (damaged: not all lines are evaluations, so its curve is left out)")
        return []


def compose(found: Found, paper: dict[str, Any]) -> tuple[list[str], list[Block]]:
    """The five lines for the screen, and the whole report."""
    runs, replaced = tables.newest(found.runs)
    groups = tables.group_runs(runs)
    of_setting = Counter(run.setting for run in runs)
    settings = sorted(of_setting)
    orders: dict[str, Order] = {}
    body: list[Block] = []
    printed = {paper[name]["dataset"]: paper[name] for name in ("table1", "table2")}
    for dataset in dict.fromkeys([*printed, *(setting.dataset for setting in settings)]):
        own = {setting for setting in settings if setting.dataset == dataset}
        body.append(Heading(dataset))
        for shots in sorted({setting.shots for setting in own} | ({1, 5} if dataset in printed else set())):
            rows = printed[dataset]["rows"] if dataset in printed and shots in (1, 5) else []
            title = f"{printed[dataset]['title'] if rows else 'As Table 1'}, {shots}-shot: {dataset}"
            table = tables.overview(title, groups, dataset, shots, rows)
            body += [table] if table.rows else []
        own |= {setting for setting in [paper_setting(paper["table3"])] if setting.dataset == dataset}
        body += ablations(groups, sorted(own), paper, orders)
    body += [*curves(groups, settings), Heading("Time and memory"), tables.costs(groups), *inventory(found, replaced)]

    warned = tables.warnings(block for block in body if isinstance(block, Table) and block.runs)
    warned += mismatches(runs)
    if replaced:
        warned.append(
            f"replaced by newer results of the same cell and training seed: {len(replaced)}, named in the list of runs"
        )
    if found.skipped:
        warned.append(f"damaged or not ours, therefore skipped and named at the end: {len(found.skipped)}")
    random = sum(run.random_weights for run in runs)
    if random:
        warned.append(f"runs whose backbone has random weights (‡): {random}")
    judged = [
        f"{name} {'holds' if order.holds else 'does not hold'}"
        for name, order in orders.items()
        if order.holds is not None
    ]
    summary = [
        f"runs: {len(runs)} counted, {len(replaced)} replaced by newer ones, {len(found.pending)} without results,"
        f" skipped files {len(found.skipped)}",
        f"settings: {'; '.join(f'{setting} ({of_setting[setting]})' for setting in settings)}",
        f"the paper's NTRENet: {filled(groups, paper)}",
        f"the paper's order: {'; '.join(judged) or 'no ablation has all folds yet'}",
        f"warnings: {len(warned)}",
    ]
    head: list[Block] = [
        Heading(TITLE, 1),
        "In percent. Ours is the mean over all training seeds of a cell, each averaged over its evaluation seeds;"
        " nothing is picked. The paper: Liu et al., Learning Non-target Knowledge for Few-shot Semantic Segmentation,"
        " CVPR 2022.",
        Bullets([line[0].upper() + line[1:] + "." for line in summary]),
        *(Alert(text[0].upper() + text[1:] + ".") for text in warned),
    ]
    return summary, head + body


def ablations(
    groups: Groups, settings: Iterable[Setting], paper: dict[str, Any], orders: dict[str, Order]
) -> list[Block]:
    """Tables 3, 4, Figure 6 and the two ways of elimination, for settings that have such runs or are the paper's."""
    blocks: list[Block] = []
    for setting in settings:
        variants = {variant for where, variant in groups if where == setting}
        is_paper = setting == paper_setting(paper["table3"])
        prefix = "" if is_paper else "As "
        for name, build, steps in (
            ("table3", tables.ladder, {variant: step[0] for variant, step in tables.LADDER.items()}),
            ("table4", tables.negatives, tables.NEGATIVES),
        ):
            if is_paper or (variants & set(steps)) - {"full"}:
                title = f"{prefix}{paper[name]['title']}: {setting}"
                order = tables.order(groups, setting, steps)
                orders[f"{paper[name]['title']} on {setting}"] = order
                blocks += [build(title, groups, setting, paper[name]["rows"] if is_paper else None), order.sentence]
        title = f"{prefix}{paper['figure6']['title']}: {setting}"
        if any(variant.startswith("channels_") for variant in variants):
            blocks += [
                tables.channels(title, groups, setting, paper["table3"]["rows"]["full"] if is_paper else None),
                plot_channels(groups, setting),
            ]
        elif is_paper:
            blocks.append(f"**{title}:** not run.")
        if is_paper:
            blocks.append(paper["figure6"]["text"])
        if (variants & set(tables.ELIMINATIONS)) - {"full"}:
            blocks.append(tables.elimination(f"Elimination: {setting}", groups, setting))
    return blocks


def paper_setting(table: dict[str, Any]) -> Setting:
    backbone = next(key for key, name in tables.BACKBONES.items() if name == table["backbone"])
    return Setting(table["dataset"], backbone, table["shots"])


def filled(groups: Groups, paper: dict[str, Any]) -> str:
    """'3 of 24 cells of Table 1, ...'"""
    parts = []
    for name in ("table1", "table2"):
        names = {row["backbone"] for row in paper[name]["rows"]}
        ours = sum(
            len(group)
            for (s, variant), group in groups.items()
            if variant == "full"
            and s.dataset == paper[name]["dataset"]
            and s.shots in (1, 5)
            and tables.backbone_name(s.backbone) in names
        )
        parts.append(f"{ours} of {len(names) * 8} cells of {paper[name]['title']} run")
    return ", ".join(parts)


def mismatches(runs: Iterable[Run]) -> list[str]:
    """Results whose config says another variant than the config.yaml of the training beside them."""
    return [
        f"`{run.file}` counts as {run.variant} by its own config, but was trained as"
        f" {tables.variant_of(run.trained)}; repeat test.py with the training's settings"
        for run in runs
        if run.trained is not None and tables.variant_of(run.trained) != run.variant
    ]


def inventory(found: Found, replaced: list[Run]) -> list[Block]:
    """Every file: nothing is left out because it failed."""
    columns = ["File", "Data set", "Backbone", "Shots", "Variant", "Fold", "Seed", "mIoU", "Revision", "Date (UTC)"]
    listing = Table("", [*columns, "List", "Remarks"], [])
    for run in sorted(found.runs, key=lambda r: (r.setting, r.variant, r.results.fold, r.seed, r.file)):
        results = run.results
        shots = run.trained.data.get("shots", results.shots) if run.trained else results.shots
        remarks = [
            "replaced by a newer file" if run in replaced else "",
            "training unfinished" if run.record and not run.record.finished else "",
            "no training record" if run.record is None else "",
            *(f"resumed at step {s.step}, {s.time}" for s in (run.record.starts[1:] if run.record else [])),
            "random backbone" if run.random_weights else "",
            f"trained {shots}-shot" if shots != results.shots else "",
        ]
        cells = [f"`{run.file}`", results.dataset, tables.backbone_name(results.backbone)]
        cells += [str(results.shots), run.variant, str(results.fold), str(run.seed)]
        cells += [f"{tables.score([[run]], 'miou').mean:.1f}", ", trained at ".join(run.revisions)]
        cells += [datetime.fromtimestamp(run.modified, UTC).strftime("%Y-%m-%d %H:%M")]
        cells += [(results.list_sha256 or "unknown")[:12], ", ".join(filter(None, remarks))]
        listing.rows.append(Row(cells, ours=False))
    listing.notes.append("Variant `other`: a combination that no table shows.")
    blocks: list[Block] = [Heading("Every run"), listing]
    if found.pending:
        blocks += [Heading("Runs without results", 3), Bullets([f"`{name}`: {state}" for name, state in found.pending])]
    if found.skipped:
        blocks += [Heading("Skipped files", 3), Bullets([f"`{text.replace('`', '')}`" for text in found.skipped])]
    return blocks


def curves(groups: Groups, settings: Iterable[Setting]) -> list[Block]:
    blocks: list[Block] = [Heading("Training curves")]
    for setting in settings:
        by_variant: dict[str, list[list[CurvePoint]]] = {}
        for (where, variant), group in sorted(groups.items()):
            runs = [run for cell in group.values() for run in cell if where == setting and run.curve]
            lines = [r.curve for r in runs if r.trained is None or r.trained.data.get("shots") == setting.shots]
            if lines:
                by_variant[variant] = lines
        if by_variant:
            blocks.append(plot_curves(setting, by_variant))
    if len(blocks) > 1:
        blocks.insert(1, "The losses of the variants have different terms: compare their courses, not their heights.")
    else:
        blocks.append("No run has a metrics.jsonl beside its results.")
    return blocks


def plot_curves(setting: Setting, by_variant: dict[str, list[list[CurvePoint]]]) -> Picture:
    """Validation mIoU and total loss over steps: runs thin, a variant's mean thick."""
    figure = Figure(figsize=(7, 7), dpi=150, layout="constrained")
    scores, losses = figure.subplots(2, 1, sharex=True)
    for color, (variant, lines) in enumerate(by_variant.items()):
        draw(scores, [{p.step: 100 * p.miou for p in line} for line in lines], f"C{color}", variant)
        draw(losses, [{p.step: p.loss.get("total", float("nan")) for p in line} for line in lines], f"C{color}", "")
    scores.set(title=f"{setting}", ylabel="validation mIoU, %")
    losses.set(xlabel="step", ylabel="total training loss")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    alt = f"Training curves, {setting}: one thick line a variant, the mean over folds and seeds; single runs thin"
    return Picture(f"curves_{slug(setting)}.png", alt, png(figure))


def draw(axes: Axes, runs: list[dict[int, float]], color: str, label: str) -> None:
    """Folds have epochs of different lengths, so the mean is of the lines, where all of them are."""
    for run in runs:
        axes.plot(list(run), list(run.values()), color=color, linewidth=0.7, alpha=0.4)
    first, last = max(min(run) for run in runs), min(max(run) for run in runs)
    steps = sorted({step for run in runs for step in run if first <= step <= last})
    means = np.mean([np.interp(steps, list(run), list(run.values())) for run in runs], axis=0)
    axes.plot(steps, means, color=color, linewidth=2, marker="o" if len(steps) < 10 else "", markersize=3, label=label)
    axes.grid(alpha=0.25)


def plot_channels(groups: Groups, setting: Setting) -> Picture:
    """Figure 6: mIoU over D, a line a fold and their mean."""
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    found = tables.by_channels(groups, setting)
    folds = tables.folds_of(groups, setting.dataset)
    for fold in range(folds):
        points = {d: tables.score([group[fold]], "miou") for d, group in found.items() if fold in group}
        if points:
            y, errors = [s.mean for s in points.values()], [s.std or 0.0 for s in points.values()]
            axes.errorbar(list(points), y, errors, marker="o", capsize=3, label=f"fold {fold}")
    means = {d: tables.score(list(g.values()), "miou").mean for d, g in found.items() if len(g) == folds}
    if means:
        axes.plot(list(means), list(means.values()), color="black", linewidth=2.5, marker="s", label="mean")
        best = max(means, key=lambda d: means[d])
        axes.plot(best, means[best], color="black", marker="*", markersize=16)
    axes.set_xticks(list(found))
    axes.set(title=f"{setting}", xlabel="channels D of the background prototype", ylabel="mIoU, %")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return Picture(f"channels_{slug(setting)}.png", f"mIoU over the channels D, {setting}; bars: std", png(figure))


def slug(setting: Setting) -> str:
    return re.sub(r"[^a-z0-9]+", "_", f"{setting.dataset} {setting.backbone} {setting.shots}shot".lower())


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def as_markdown(blocks: Iterable[Block]) -> str:
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Bullets(items):
                parts.append(markdown_list(items))
            case Alert(text):
                parts.append(f"> [!WARNING]\n> {text}")
            case Picture(name, alt, _):
                parts.append(f"![{alt}]({name})")
            case Table():
                lines = [block.columns, ["---"] * len(block.columns), *(row.cells for row in block.rows)]
                bars = "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
                parts += [f"### {block.title}" if block.title else "", bars, markdown_list(block.notes)]
            case _:
                parts.append(block)
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5b6577; --line: #dfe3ea; --paper: #fff; --tint: #eef4ff;
  --head: #f6f7f9; --accent: #2457c5; --warn: #fff6e0; --warn-line: #e0a100; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8f0; --soft: #9aa5b8; --line: #333b4a; --paper: #141821;
  --tint: #1c2940; --head: #1b202b; --accent: #86a9f5; --warn: #33290f; --warn-line: #b98a12; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0; }
h2 { margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 2px solid var(--line); }
h3 { margin: 1.75rem 0 .5rem; font-size: 1.02rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; padding: .6rem 0; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
ul { padding-left: 1.2rem; } .notes { color: var(--soft); font-size: .86rem; margin: .4rem 0 0; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--head); font-weight: 600; } tr:last-child td { border-bottom: 0; }
.ours td { background: var(--tint); }
code { font: .86em ui-monospace, Consolas, monospace; }
.warning { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .5rem .9rem; margin: .5rem 0;
  border-radius: 0 6px 6px 0; }
img { display: block; width: 100%; max-width: 46rem; height: auto; margin: 1rem 0; border-radius: 8px; }
"""


def as_html(blocks: Sequence[Block]) -> str:
    anchors = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#s{i}">{inline(text)}</a>' for i, text in enumerate(anchors))
    parts = []
    for block in blocks:
        match block:
            case Heading(text, 1):
                parts.append(f"<h1>{inline(text)}</h1>\n<nav>{links}</nav>")
            case Heading(text, 2):
                parts.append(f'<h2 id="s{anchors.index(text)}">{inline(text)}</h2>')
            case Heading(text, level):
                parts.append(f"<h{level}>{inline(text)}</h{level}>")
            case Bullets(items):
                parts.append(html_list(items))
            case Alert(text):
                parts.append(f'<p class="warning">{inline(text)}</p>')
            case Picture(_, alt, data):
                source = base64.b64encode(data).decode()
                parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{source}">')
            case Table():
                parts.append(html_table(block))
            case _:
                parts.append(f"<p>{inline(block)}</p>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def html_table(table: Table) -> str:
    head = "".join(f"<th>{inline(column)}</th>" for column in table.columns)
    rows = [
        (' class="ours"' if row.ours else "", "".join(f"<td>{inline(cell)}</td>" for cell in row.cells))
        for row in table.rows
    ]
    body = "\n".join(f"<tr{kind}>{cells}</tr>" for kind, cells in rows)
    title = f"<h3>{inline(table.title)}</h3>\n" if table.title else ""
    return (
        f'{title}<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
        + (f'\n<div class="notes">{html_list(table.notes)}</div>' if table.notes else "")
    )


def html_list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{inline(item)}</li>' for item in items)}</ul>"


def inline(text: str) -> str:
    """**bold** and `code` of our own text as HTML."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


if __name__ == "__main__":
    run_command(main)
