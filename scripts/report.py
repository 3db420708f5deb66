"""Our runs beside the paper's: python scripts/report.py runs/ [more folders or .jsonl files] [--out report] [--lines F]

Reads every results*.json (test.py --out) below the folders, and what stands beside it: run.json and TensorBoard events
(train.py), diagnosis.json (diagnose.py). --lines writes all these runs into one small .jsonl file, which can be given
in place of a folder. --out writes report.md, report.html (one file, pictures inside) and the pictures; without it our
tables are printed. The rows of the tables and the paper's figures stand in scripts/paper.yaml.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import argparse
import base64
import html
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import yaml
from markdown import markdown as to_html
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from util.errors import UserError
from util.files import require_writable, write_bytes, write_text
from util.report import tables
from util.report.runs import Found, collect, read_curve, write_runs
from util.report.tables import markdown

PAPER = Path(__file__).with_name("paper.yaml")
STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; font: 16px/1.5 system-ui, sans-serif; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .88rem; }
th, td { padding: .3rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid #8884; }
img { max-width: 100%; height: auto; }
blockquote { margin: .5rem 0; padding: .1rem .9rem; border-left: 4px solid #e0a100; background: #e0a10018; }
summary { cursor: pointer; font-weight: 600; margin: .7rem 0; }
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", type=Path, nargs="+", help="where results.json files lie, at any depth, or a .jsonl")
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--lines", type=Path, metavar="F.jsonl", help="write the runs here, a line of JSON each")
    args = parser.parse_intermixed_args()
    for place in args.places:
        if not place.is_dir() and not (place.suffix == ".jsonl" and place.is_file()):
            raise UserError(
                f"{place} is not a folder nor a .jsonl; give the folders in which test.py wrote its results"
            )
    for path, suffix in ((args.out and args.out / "report.md", ".md"), (args.lines, ".jsonl")):
        if path is not None:
            require_writable(path, suffix)
    found = collect(args.places)
    for text in found.skipped:
        print(f"warning: skipped {text}", file=sys.stderr)
    if not found.runs:
        unfinished = f" ({len(found.pending)} runs there have none yet)" if found.pending else ""
        raise UserError(
            f"no results in {', '.join(map(str, args.places))}{unfinished}; run 'python test.py --config C --checkpoint"
            " RUN/best.pt --out RUN/results.json' first, then name the folder that holds RUN"
        )
    if args.lines is not None:
        write_runs(args.lines, found.runs)
        print(f"lines: {args.lines}, {len(found.runs)} runs")
    paper = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    runs = tables.frame(found.runs, paper)
    if args.out is None:
        print(*filter(None, own_tables(runs[~runs.replaced], paper)), sep="\n\n")
        return
    pictures = draw_pictures(runs[~runs.replaced], paper)
    summary = summarise(found, runs, paper)
    text = "\n\n".join(filter(None, compose(found, runs, paper, summary, pictures))) + "\n"
    for name, data in pictures.items():
        write_bytes(args.out / name, data)
    write_text(args.out / "report.md", text)
    write_text(args.out / "report.html", as_html(text, pictures))
    print(f"report: {args.out / 'report.md'}, {args.out / 'report.html'}", *summary, sep="\n")


def summarise(found: Found, runs: pd.DataFrame, paper: Mapping[str, Any]) -> list[str]:
    """What a reader wants to know first, a line each."""
    counted = runs[~runs.replaced]
    orders = [
        f"{table['title']} on {title(setting)} {verdict}"
        for setting, group in counted.groupby(tables.SETTING)
        for table in tables.ablations(paper).values()
        for holds, verdict in [tables.verdict(group, table["rows"])]
        if holds is not None
    ]
    return [
        f"runs: {len(counted)} counted, {len(runs) - len(counted)} replaced by newer ones,"
        f" {len(found.pending)} without results, skipped files {len(found.skipped)}",
        f"settings: {'; '.join(f'{title(s)} ({n})' for s, n in counted.groupby(tables.SETTING).size().items())}",
        *(f"the paper's order: {order}" for order in orders or ["no ablation has all its rows on all folds yet"]),
    ]


def title(setting: Any) -> str:
    dataset, backbone, shots = setting
    return f"{dataset}, {backbone}, {shots}-shot"


def compose(
    found: Found, runs: pd.DataFrame, paper: Mapping[str, Any], summary: list[str], pictures: Mapping[str, bytes]
) -> Iterator[str]:
    """The report as blocks of Markdown: our own rows first, and what was not run folded away."""
    counted = runs[~runs.replaced]
    yield "# NTRENet: our runs beside the paper's"
    yield bullets(f"{line[0].upper()}{line[1:]}." for line in summary)
    yield from own_tables(counted, paper)
    not_run = []
    for table, shots in itertools.product((paper["table1"], paper["table2"]), (1, 5)):
        ours = counted[(counted.dataset == table["dataset"]) & (counted.shots == shots)]
        body = tables.beside(table, shots, ours)
        blocks = [f"## {table['title']}, {shots}-shot: {table['dataset']}", markdown(body), table.get("note", "")]
        if body.Method.str.endswith(", ours").any():
            yield from blocks
        else:
            not_run += blocks
    if pictures:
        yield "## Training curves and figures"
        yield "Thin lines are runs, thick ones their mean. Losses are running means; their terms differ by network."
        yield from (f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures)
    yield "## Time and memory"
    yield markdown(tables.costs(counted))
    yield "Times are means, peaks maxima: of a GPU's allocator, or of the process on a CPU. Training includes tests."
    yield from folded(f"Every run ({len(runs)})", [markdown(inventory(runs))])
    yield from folded(f"Runs without results ({len(found.pending)})", [bullets(found.pending)])
    yield from folded(f"Skipped files ({len(found.skipped)})", [bullets(found.skipped)])
    yield from folded("The paper's tables of which nothing was run", not_run)


def own_tables(runs: pd.DataFrame, paper: Mapping[str, Any]) -> Iterator[str]:
    """For each setting: its ablations, what no row of paper.yaml describes, and what its runs do not share."""
    ablations = tables.ablations(paper)
    names = {key for table in ablations.values() for key in table["rows"]}
    for setting, group in runs.groupby(tables.SETTING):
        yield f"## {title(setting)}"
        yield f"All runs here have {group.common.iloc[0]}." if group.common.iloc[0] else ""
        others = {"title": "Other networks", "rows": {key: {"label": key} for key in sorted(set(group.row) - names)}}
        for name, table in [*ablations.items(), ("others", others)]:
            rows = table["rows"]
            if set(group.row) & (set(rows) - {"full"} if name != "table3" else set(rows)):
                yield f"### {table['title']}: {title(setting)}"
                is_papers = setting == tuple(table.get(key) for key in tables.SETTING)
                yield markdown(tables.ladder(group, rows, beside_paper=is_papers))
                if any("paper" in row for row in rows.values()):
                    yield f"The paper's order on {title(setting)} {tables.verdict(group, rows)[1]}."
        for what, values in tables.differences(list(group.run)).items():
            yield f"> **Warning:** {what} differ: {html.escape(', '.join(values), quote=False)}."
    yield tables.LEGEND


def folded(summary: str, blocks: list[str]) -> Iterator[str]:
    if any(blocks):
        yield f'<details markdown="1"><summary>{summary}</summary>'
        yield from blocks
        yield "</details>"


def bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {html.escape(item, quote=False)}" for item in items)


def inventory(runs: pd.DataFrame) -> pd.DataFrame:
    """Every results file: nothing is left out because it failed."""
    remarks = []
    for run, replaced in zip(runs.run, runs.replaced, strict=True):
        training = run.training
        notes = ["replaced by a newer file"] if replaced else []
        notes += ["no training record"] if training is None else []
        notes += ["training unfinished"] if training and not training.finished else []
        notes += [f"resumed at step {start.step}, {start.time}" for start in (training.starts[1:] if training else [])]
        notes += ["random backbone"] if run.config.model.get("weights") == "random" else []
        remarks.append(", ".join(notes))
    about = runs[[*tables.SETTING, "row", "fold", "seed"]].assign(
        mIoU=[f"{np.mean(values):.1f}" for values in runs.miou],
        revision=[run.revisions for run in runs.run],
        list=[(run.list_sha256 or "unknown")[:12] for run in runs.run],
        written=runs.modified.str[:16],
        remarks=remarks,
    )
    about.insert(0, "file", [run.run for run in runs.run])
    return about


def draw_pictures(runs: pd.DataFrame, paper: Mapping[str, Any]) -> dict[str, bytes]:
    """Training curves of each data set and backbone whose events are there, and Figure 6 where it was run; as PNG."""
    pictures = {}
    for (dataset, backbone), group in runs.groupby(["dataset", "backbone"]):
        folders = group.assign(folder=[str(Path(run.run).parent) for run in group.run]).drop_duplicates("folder")
        by_row = {row: [read_curve(run) for run in own.run] for row, own in folders.groupby("row")}
        drawn = {row: [c for c in curves if c is not None and len(c)] for row, curves in by_row.items()}
        drawn = {row: curves for row, curves in drawn.items() if curves}
        if drawn:
            pictures[f"curves_{slug(f'{dataset} {backbone}')}.png"] = plot_curves(f"{dataset}, {backbone}", drawn)
    labels = {key: row["label"] for key, row in paper["figure6"]["rows"].items()}
    for setting, group in runs.groupby(tables.SETTING):
        if (group.row.isin(labels) & (group.row != "full")).any():
            pictures[f"channels_{slug(title(setting))}.png"] = plot_channels(title(setting), group, labels)
    return pictures


def plot_curves(name: str, by_row: Mapping[str, list[pd.DataFrame]]) -> bytes:
    figure = Figure(figsize=(8, 8), dpi=120, layout="constrained")
    scores, losses = figure.subplots(2, 1, sharex=True)
    for color, (row, curves) in enumerate(by_row.items()):
        draw(scores, [100 * curve["val/miou"].dropna() for curve in curves if "val/miou" in curve], f"C{color}", row)
        totals = [curve["loss/total"].dropna() for curve in curves if "loss/total" in curve]
        draw(
            losses, [total.rolling(max(1, len(total) // 50), min_periods=1).mean() for total in totals], f"C{color}", ""
        )
    scores.set(title=name, ylabel="validation mIoU, %")
    losses.set(xlabel="step", ylabel="total training loss", yscale="log")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return png(figure)


def draw(axes: Axes, lines: list[pd.Series], color: str, label: str) -> None:
    """Each line, and where all of them are their mean; folds have epochs of different lengths."""
    for line in lines:
        axes.plot(line.index, line, color=color, linewidth=0.6, alpha=0.35)
    if lines:
        joined = pd.concat(lines, axis=1).sort_index().interpolate("index", limit_area="inside").dropna()
        few = "o" if len(joined) < 10 else ""
        axes.plot(joined.index, joined.mean(axis=1), color=color, linewidth=2, marker=few, markersize=4, label=label)
    axes.grid(alpha=0.25)


def plot_channels(name: str, runs: pd.DataFrame, labels: Mapping[str, int]) -> bytes:
    """Figure 6: mIoU over D, a line a fold and their mean."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    runs = runs.assign(channels=runs.row.map(labels), value=runs.miou.map(np.mean)).dropna(subset="channels")
    means = runs.pivot_table("value", "channels", "fold").rename(columns="fold {}".format)
    means.assign(mean=means.mean(axis=1, skipna=False)).plot(ax=axes, marker="o", grid=True)
    axes.set(title=name, xlabel="channels D of the background prototype", ylabel="mIoU, %")
    return png(figure)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def as_html(text: str, pictures: Mapping[str, bytes]) -> str:
    """The Markdown as one page with the pictures inside."""
    body = to_html(text, extensions=["tables", "md_in_html"])
    for name, data in pictures.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(data).decode()}"')
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<title>NTRENet</title>\n<style>{STYLE}</style>\n{body}\n</html>\n'
    )


if __name__ == "__main__":
    run_command(main)
