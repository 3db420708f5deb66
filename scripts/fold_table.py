"""The table of a backbone's folds: python scripts/fold_table.py RUN/results.json ...

Prints mIoU, FB-IoU and precision of each fold, mean and deviation over its evaluation seeds; their mean only where
all folds are there.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

from util.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    results = sorted((read(path) for path in args.results if path.exists()), key=lambda result: result["fold"])
    if not results:
        raise UserError(f"none of {', '.join(map(str, args.results))} exists; scripts/test_folds.sh writes them")
    first = results[0]
    episodes = f"{len(first['seeds'])} x {first['episodes']} episodes"
    print(f"\n{first['dataset']}, {first['backbone']}, {first['shots']}-shot, {episodes}")
    print("fold         mIoU          FB-IoU        precision")
    for result in results:
        print(f"{result['fold']:<6}", *(f"{cell(result[name]):>14}" for name in ("miou", "fb_iou", "precision")))
    missing = sorted(set(range(first["folds"])) - {result["fold"] for result in results})
    if missing:
        print(f"mean   not given: fold {', '.join(map(str, missing))} missing")
    else:
        means = (statistics.fmean(r[name]["mean"] for r in results) for name in ("miou", "fb_iou", "precision"))
        print("mean  ", *(f"{mean:>7.1f}       " for mean in means))


def read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result | {"fold": int(result["fold"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a results file of test.py ({error}); delete it and evaluate again") from error


def cell(score: dict[str, float]) -> str:
    return f"{score['mean']:.1f} ± {score['std']:.1f}"


if __name__ == "__main__":
    run_command(main)
