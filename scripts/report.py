"""Tables of your runs next to the paper's: python scripts/report.py runs/ [more] [--out report.md] [--lines F.jsonl]

Reads each results*.json (test.py --out) in the folders, with run.json (train.py) and diagnosis.json (diagnose.py) from
the same folder. Without --out the tables are printed. --lines writes the runs into one small .jsonl file, which can be
given instead of the folders. The rows of the tables and the paper's figures are in scripts/paper.yaml.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import argparse
from collections.abc import Iterator, Mapping
from itertools import chain
from statistics import fmean
from typing import Any

import yaml
from tabulate import tabulate

from util import report
from util.errors import UserError
from util.files import require_writable, write_text

PAPER = Path(__file__).with_name("paper.yaml")
COLUMNS = ["Backbone", "Method", "Fold 0", "Fold 1", "Fold 2", "Fold 3", "Mean", "FB-IoU"]
"""of Tables 1 and 2"""
LEGEND = (
    "Figures are in percent and are means over all seeds of a cell; there is no best-of-n. ± is the sample standard"
    " deviation over training seeds, in the column Mean that of each seed's mean over folds; with † it is over the"
    " evaluation seeds of a single training. In brackets: the difference to the paper. Margin: to the row above. ‡: the"
    " backbone's weights are random. Base threshold: chosen on base classes at the end of training; best threshold: on"
    " the novel classes themselves (scripts/diagnose.py). Everything else is at 0.5."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", type=Path, nargs="+", help="folders, results files of test.py, or .jsonl files")
    parser.add_argument("--out", type=Path, metavar="F.md", help="write the report here")
    parser.add_argument("--lines", type=Path, metavar="F.jsonl", help="write the runs here, a line of JSON each")
    args = parser.parse_args()
    for place in args.places:
        if not place.exists():
            raise UserError(f"{place} does not exist; give the folders in which test.py wrote its results")
    for path, suffix in ((args.out, ".md"), (args.lines, ".jsonl")):
        if path is not None:
            require_writable(path, suffix)
    found = report.collect(args.places)
    for text in found.skipped:
        print(f"warning: skipped {text}", file=sys.stderr)
    if not found.runs:
        raise UserError(
            f"no results in {', '.join(map(str, args.places))} ({len(found.pending)} runs without results); run"
            " 'python test.py --config C --checkpoint RUN/best.pt --out RUN/results.json' first"
        )
    if args.lines is not None:
        # sorted, so that a diff shows only the runs that changed
        runs = sorted(found.runs, key=lambda run: run.file)
        write_text(args.lines, "".join(run.model_dump_json(exclude_none=True) + "\n" for run in runs))
        print(f"lines: {args.lines}, {len(runs)} runs")
    paper = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    settings, replaced = report.arrange(found.runs, paper)
    if args.out is None:
        print(*tables(settings, paper), sep="\n\n")
        return
    blocks = ["# NTRENet: our runs next to the paper's", *tables(settings, paper), *every_run(settings, replaced)]
    for title, texts in (("Runs without results", found.pending), ("Skipped files", found.skipped)):
        blocks += [f"## {title}", *(f"- {text}" for text in texts)] if texts else []
    write_text(args.out, "\n\n".join(blocks) + "\n")
    counts = f"{len(found.runs) - len(replaced)} counted, {len(replaced)} replaced by newer ones"
    print(f"report: {args.out}")
    print(f"runs: {counts}, {len(found.pending)} without results, skipped files {len(found.skipped)}")


def tables(settings: report.Settings, paper: Mapping[str, Any]) -> Iterator[str]:
    """Yield the ablations of each setting, the differences between their runs, and Tables 1 and 2."""
    ablations = report.ablations(paper)
    names = {key for table in ablations.values() for key in table["rows"]}
    for setting, runs in settings.items():
        yield f"## {setting}"
        own = {key: {"label": key} for key in sorted(runs.keys() - names)}
        others: dict[str, Any] = {"title": "Other networks", "rows": own}
        for name, table in [*ablations.items(), ("others", others)]:
            # NTRENet is a row of each ablation; alone, it is shown in Table 3
            if runs.keys() & table["rows"].keys() - ({"full"} if name != "table3" else set()):
                yield f"### {table['title']}"
                yield markdown(report.ladder(runs, table["rows"], next_to_paper=setting == table.get("setting")))
        for name, values in report.differences(chain.from_iterable(runs.values())).items():
            yield f"> **Warning:** these runs differ in {name}: {'; '.join(values)}."
    for table in (paper["table1"], paper["table2"]):
        for shots in (1, 5):
            if lines := report.next_to_others(table, shots, settings):
                yield f"## {table['title']}, {shots}-shot: {table['dataset']}"
                yield markdown(lines, COLUMNS)
    yield LEGEND


def every_run(settings: report.Settings, replaced: list[report.Run]) -> Iterator[str]:
    """Yield a table of all runs, whether they count or not, with their time and memory."""
    placed = [(name, run) for rows in settings.values() for name, runs in rows.items() for run in runs]
    placed += [("replaced by a newer run", run) for run in replaced]
    columns = (
        "File,Network,Fold,Seed,mIoU,Training hours,Training MiB,Test s,Test MiB,Machine,Revision,List,Written,Remarks"
    )
    lines: list[list[str]] = []
    for name, run in placed:
        costs = (run.training_hours, 2), (run.training_mib, 0), (run.test_seconds, 0), (run.test_mib, 0)
        cells = ["-" if value is None else f"{value:.{digits}f}" for value, digits in costs]
        about = [run.machine, run.revision, run.test_list, run.modified[:16], ", ".join(run.remarks)]
        lines.append([run.file, name, str(run.fold), str(run.seed), f"{fmean(run.miou):.1f}", *cells, *about])
    yield "## Every run"
    yield "A training's time includes its validation. Memory is the highest peak of a process, or of its GPU."
    yield markdown(lines, columns.split(","))


def markdown(lines: Any, columns: Any = "keys") -> str:
    return tabulate(lines, columns, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    run_command(main)
