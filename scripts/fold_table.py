"""The table of a backbone's folds: python scripts/fold_table.py RUN/results.json ...

It shows mIoU, FB-IoU and precision of each fold, mean and deviation over its evaluation seeds; their mean only where
all folds are there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import argparse

from tabulate import tabulate

from util.errors import UserError
from util.report.runs import collect
from util.report.tables import frame, show, whole

MEASURES = {"miou": "mIoU", "fb_iou": "FB-IoU", "precision": "precision"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    found = collect([path for path in args.results if path.exists()])
    if found.skipped:
        raise UserError(f"no results file of test.py: {found.skipped[0]}; delete it and evaluate again")
    if not found.runs:
        raise UserError(f"none of {', '.join(map(str, args.results))} exists; scripts/test_folds.sh writes them")
    runs = frame(found.runs)
    rows = {str(fold): own for fold, own in runs.groupby("fold")} | ({"mean": runs} if whole(runs) else {})
    lines = [[name, *(show(own, measure).replace("†", "") for measure in MEASURES)] for name, own in rows.items()]
    print(f"\n{runs.setting[0]}, {len(runs.test_seeds[0])} x {runs.episodes[0]} episodes")
    print(tabulate(lines, ["fold", *MEASURES.values()], tablefmt="plain", disable_numparse=True))
    if missing := sorted(set(range(runs.folds.max())) - set(runs.fold)):
        print(f"mean  not given: fold {', '.join(map(str, missing))} missing")


if __name__ == "__main__":
    run_command(main)
