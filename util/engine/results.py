"""Results of test.py: scores over seeds, and the table on screen."""

import statistics
import textwrap
from typing import Any

from tabulate import tabulate

from util.engine.metrics import SCORE_TITLES, Scores


def over_seeds(scores: list[Scores]) -> dict[str, Any]:
    """Return every score as {mean, sample std, per_seed}, and the mean IoU of each class; all in percent."""

    def spread(values: list[float]) -> dict[str, Any]:
        percent = [100 * v for v in values]
        std = statistics.stdev(percent) if len(percent) > 1 else 0.0
        return {"mean": statistics.fmean(percent), "std": std, "per_seed": percent}

    names = scores[0].per_class
    return {
        **{name: spread([getattr(s, name) for s in scores]) for name in SCORE_TITLES},
        "per_class": {name: 100 * statistics.fmean(s.per_class[name] for s in scores) for name in names},
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as text."""

    def cell(score: dict[str, Any]) -> str:
        return f"{score['mean']:.1f}" + (f" ± {score['std']:.1f}" if len(results["seeds"]) > 1 else "")

    trained_on = f" trained on {results['trained_on']}" if results["trained_on"] else ""
    protocol = f", protocol {results['protocol']}" if results["protocol"] else ""
    heading = (
        f"{results['dataset']} fold {results['fold']} of {results['folds']}, {results['shots']}-shot,"
        f" {results['method'] or results['backbone']}{trained_on}{protocol}: {results['episodes']} episodes,"
        f" {results['episodes_from'] or 'seeds ' + ', '.join(map(str, results['seeds']))}"
    )
    rows: list[list[str]] = []
    if "miou" in results:
        if len(results["per_class"]) <= 40:  # FSS-1000 has more
            rows += [[name, f"{iou:.1f}"] for name, iou in results["per_class"].items()]
        rows += [[title, cell(results[name])] for name, title in SCORE_TITLES.items()]
        low, high = results["miou"]["interval"]
        rows.append(["95 % interval", f"{low:.1f} to {high:.1f}", "of mIoU, if other images of each class were drawn"])
        rows.append(["", "(of this fold alone, not means of folds)"])
    if other := results.get("calibrated"):
        why = f"mIoU at {other['threshold']:g}, the threshold chosen on base classes; the rows above are at 0.5"
        rows.append(["calibrated", cell(other["miou"]), why])
    for name, baseline in results.get("baselines", {}).items():
        others = f"FB-IoU {cell(baseline['fb_iou'])}, precision {cell(baseline['precision'])}"
        rows.append([name.replace("_", " "), cell(baseline["miou"]), f"mIoU without training, same episodes; {others}"])
    rows += [["time", f"{results['seconds']:.0f} s"], ["peak memory", f"{results['peak_memory_mib']:.0f} MiB"]]
    return f"\n{heading}\n" + textwrap.indent(tabulate(rows, tablefmt="plain", disable_numparse=True), "  ")
