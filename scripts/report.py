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
from matplotlib.figure import Figure

from util.errors import UserError
from util.files import require_writable, write_bytes, write_text
from util.report import tables
from util.report.runs import Found, collect, is_list, read_curve, write_runs
from util.report.tables import markdown

PAPER = Path(__file__).with_name("paper.yaml")
CURVES = {"val/miou": "validation mIoU", "loss/total": "total training loss"}
"""what is drawn of the events"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>NTRENet</title>
<style>
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; font: 16px/1.5 system-ui, sans-serif; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .88rem; }
th, td { padding: .3rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid #8884; }
img { max-width: 100%; height: auto; }
blockquote { margin: .5rem 0; padding: .1rem .9rem; border-left: 4px solid #e0a100; background: #e0a10018; }
summary { cursor: pointer; font-weight: 600; margin: .7rem 0; }
</style>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", type=Path, nargs="+", help="where results.json files lie, at any depth, or a .jsonl")
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--lines", type=Path, metavar="F.jsonl", help="write the runs here, a line of JSON each")
    args = parser.parse_intermixed_args()
    for place in args.places:
        if not place.is_dir() and not is_list(place):
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
        print(*filter(None, own_tables(runs[~runs.replaced], paper)), tables.LEGEND, sep="\n\n")
        return
    pictures = draw_pictures(runs[~runs.replaced])
    text = "\n\n".join(filter(None, compose(found, runs, paper, pictures))) + "\n"
    for name, data in pictures.items():
        write_bytes(args.out / name, data)
    write_text(args.out / "report.md", text)
    write_text(args.out / "report.html", as_html(text, pictures))
    print(f"report: {args.out / 'report.md'}, {args.out / 'report.html'}", summary(found, runs), sep="\n")


def summary(found: Found, runs: pd.DataFrame) -> str:
    """Say what was read."""
    counted = (~runs.replaced).sum()
    return (
        f"runs: {counted} counted, {len(runs) - counted} replaced by newer ones,"
        f" {len(found.pending)} without results, skipped files {len(found.skipped)}"
    )


def compose(found: Found, runs: pd.DataFrame, paper: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Iterator[str]:
    """Give the report as blocks of Markdown: our own rows first, and what was not run folded away."""
    counted = runs[~runs.replaced]
    yield "# NTRENet: our runs beside the paper's"
    yield summary(found, runs).capitalize() + "."
    yield from own_tables(counted, paper)
    yield tables.LEGEND
    not_run: list[str] = []
    for table, shots in itertools.product((paper["table1"], paper["table2"]), (1, 5)):
        body, ours = tables.beside(table, shots, counted)
        blocks = [f"## {table['title']}, {shots}-shot: {table['dataset']}", markdown(body), table.get("note", "")]
        if ours:
            yield from blocks
        else:
            not_run += blocks
    if pictures:
        yield "## Training curves"
        yield "Thin lines are runs, thick ones their mean. Losses are running means; their terms differ by network."
        yield from (f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures)
    yield "## Time and memory"
    yield "Times are means; a training includes its tests. Memory is the highest peak of a GPU's allocator or process."
    for setting, group in counted.groupby("setting", sort=False):
        yield f"### {setting}"
        yield markdown(tables.costs(group))
    yield from folded(f"Every run ({len(runs)})", [markdown(inventory(runs))])
    yield from folded(f"Runs without results ({len(found.pending)})", [bullets(found.pending)])
    yield from folded(f"Skipped files ({len(found.skipped)})", [bullets(found.skipped)])
    yield from folded("The paper's tables of which nothing was run", not_run)


def own_tables(runs: pd.DataFrame, paper: Mapping[str, Any]) -> Iterator[str]:
    """Give the ablations of each setting, what no row of paper.yaml describes, and what its runs do not share."""
    ablations = tables.ablations(paper)
    names = {key for table in ablations.values() for key in table["rows"]}
    for setting, group in runs.groupby("setting", sort=False):
        yield f"## {setting}"
        own = {key: {"label": key} for key in sorted(set(group.row) - names)}
        others: dict[str, Any] = {"title": "Other networks", "rows": own}
        for name, table in [*ablations.items(), ("others", others)]:
            rows = table["rows"]
            if set(group.row) & (set(rows) - {"full"} if name != "table3" else set(rows)):
                yield f"### {table['title']}"
                yield markdown(tables.ladder(group, rows, beside_paper=setting == table.get("setting")))
                if (follows := tables.follows(group, rows)) is not None:
                    yield f"The paper's order {'holds' if follows else 'does not hold'} here."
        for what, values in tables.differences(group).items():
            yield f"> **Warning:** {what} differ: {html.escape(', '.join(values), quote=False)}."


def folded(summary: str, blocks: list[str]) -> Iterator[str]:
    if any(blocks):
        yield f'<details markdown="1"><summary>{summary}</summary>'
        yield from blocks
        yield "</details>"


def bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {html.escape(item, quote=False)}" for item in items)


def inventory(runs: pd.DataFrame) -> pd.DataFrame:
    """List every results file: nothing is left out because it failed."""
    notes = [["replaced by a newer file"] * line.replaced + line.remarks for line in runs.itertuples()]
    return runs[["file", "setting", "row", "fold", "seed"]].assign(
        mIoU=[f"{np.mean(values):.1f}" for values in runs.miou],
        revision=runs.revision,
        list=runs.test_list,
        written=runs.modified.str[:16],
        remarks=[", ".join(texts) for texts in notes],
    )


def draw_pictures(runs: pd.DataFrame) -> dict[str, bytes]:
    """Draw the training curves of each setting whose events are there, as PNG."""
    pictures = {}
    for setting, group in runs.groupby("setting", sort=False):
        curves = [(line.row, read_curve(line.file)) for line in group.itertuples()]
        if curves := [(row, curve) for row, curve in curves if len(curve)]:
            slug = re.sub(r"[^a-z0-9]+", "_", str(setting).lower())
            pictures[f"curves_{slug}.png"] = plot_curves(str(setting), curves)
    return pictures


def plot_curves(setting: str, curves: list[tuple[str, pd.DataFrame]]) -> bytes:
    """Plot the loss and, where a run has several, validation mIoU over steps: a colour a row of the tables."""
    colors = {row: f"C{number}" for number, row in enumerate(dict.fromkeys(row for row, _ in curves))}
    tags = [tag for tag in CURVES if any(tag in curve and curve[tag].count() > 1 for _, curve in curves)]
    figure = Figure(figsize=(8, 1 + 3.5 * len(tags)), dpi=120, layout="constrained")
    for axes, tag in zip(figure.subplots(len(tags), sharex=True, squeeze=False)[:, 0], tags, strict=True):
        for row, color in colors.items():
            lines = [curve[tag].dropna() for of, curve in curves if of == row and tag in curve]
            lines = [line.rolling(max(1, len(line) // 50), min_periods=1).mean() for line in lines]
            for line in lines:
                axes.plot(line, color=color, linewidth=0.6, alpha=0.35)
            if lines:
                together = pd.concat(lines, axis=1).sort_index().interpolate("index", limit_area="inside")
                axes.plot(together.mean(axis=1), color=color, linewidth=2, label=row)
        axes.set(ylabel=CURVES[tag], yscale="log" if tag.startswith("loss") else "linear")
        axes.grid(alpha=0.25)
    axes.set(xlabel="step")
    figure.suptitle(setting)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def as_html(text: str, pictures: Mapping[str, bytes]) -> str:
    """Turn the Markdown into one page with the pictures inside."""
    body = to_html(text, extensions=["tables", "md_in_html"])
    for name, data in pictures.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(data).decode()}"')
    return f"{PAGE}{body}\n</html>\n"


if __name__ == "__main__":
    run_command(main)
