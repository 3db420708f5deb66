"""Say why a checkpoint scores as it does: python scripts/diagnose.py --config YAML --checkpoint RUN/best.pt [--out F]

On episodes of novel and of base classes, all from the validation list: which share of the target, of other objects and
of the background is predicted and covered by Y_DO, how well the logits tell the target from the two others (AUC; 0.5 is
chance), and mIoU by threshold. The threshold that is best on base classes is fair to use on novel ones.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
from tabulate import tabulate
from torch import Tensor

from model.ntrenet import NTRENetOutput
from model.ops import resize
from util.config import add_config_argument, load_config, parse_arguments
from util.data.folds import base_classes, novel_classes
from util.engine.build import build_eval_sampler, build_index, select_hardware
from util.engine.checkpoint import load_network
from util.engine.diagnosis import (
    EPISODES,
    REGIONS,
    area_under_curve,
    best_threshold,
    held_out,
    histogram,
    miou_by_threshold,
    predicted_share,
)
from util.engine.evaluation import NETWORK, NetworkMethod, Predictor, evaluate
from util.files import require_writable, write_json
from util.progress import progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of novel and of base classes each")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    args, overrides = parse_arguments(parser)
    config = load_config(args.config, overrides)
    if args.out is not None:
        require_writable(args.out, ".json")
    hardware, index = select_hardware(config), build_index(config, "val")
    model = load_network(config, hardware, args.checkpoint).model
    mined: dict[str, Predictor] = {"distracting": distracting} if config.model.doem else {}
    method = NetworkMethod(model, config, hardware, NETWORK | mined)
    found: dict[str, Any] = {}
    base = base_classes(config.data)
    for kind, classes in (("novel", novel_classes(config.data)), ("base", held_out(base, index, config) or base)):
        sampler = build_eval_sampler(config, index, seed=0, classes=classes)
        episodes = [sampler(number) for number in range(args.episodes)]
        with progress(total=len(episodes), desc=kind, unit="episode", leave=False) as bar:
            counts = evaluate(method, index, episodes, config=config, bar=bar, measure=histogram)
        class_ids = np.array([episode.class_id for episode in episodes])
        found[kind] = summary(counts, class_ids, {c: config.data.classes[c - 1] for c in classes})
    print(table(found))
    if args.out is not None:
        about = {"checkpoint": str(args.checkpoint), "episodes": args.episodes, "unit": "percent"}
        write_json(args.out, about | found)
        print(f"figures: {args.out}")


def distracting(output: NTRENetOutput) -> Tensor:
    """Y_DO as a prediction: above 0 where it covers the query."""
    size = (output.logits.shape[-2], output.logits.shape[-1])
    return resize(output.eliminated[0].do_mask.float(), size) - 0.5


def summary(counts: dict[str, np.ndarray], class_ids: np.ndarray, classes: dict[int, str]) -> dict[str, Any]:
    """Return the figures of one kind of classes, in percent; None for those that are not defined."""

    def percent(value: float) -> float | None:
        return None if np.isnan(value) else round(100 * float(value), 2)

    network = counts["network"]
    covered = np.full(len(REGIONS), np.nan)
    if "distracting" in counts:
        shares = predicted_share(counts["distracting"])
        covered = np.array([np.nanmean(share) if (~np.isnan(share)).any() else np.nan for share in shares.T])
    return {
        "miou": {t: percent(miou) for t, miou in miou_by_threshold(network, class_ids, classes).items()},
        "predicted": dict(zip(REGIONS, map(percent, predicted_share(network.sum(0))), strict=True)),
        "auc": {name: percent(area_under_curve(network, r)) for r, name in enumerate(REGIONS) if r > 0},
        "distracting": dict(zip(REGIONS, map(percent, covered), strict=True)),
    }


def table(found: dict[str, Any]) -> str:
    """Return the figures as text: a column for novel and one for base classes."""
    kinds = ("novel", "base")

    def row(title: str, figure: str, key: str) -> list[str]:
        values = [found[kind][figure][key] for kind in kinds]
        return [title, *("-" if value is None else f"{value:.1f}" for value in values)]

    lines = [row(f"mIoU at threshold {t}", "miou", t) for t in found["novel"]["miou"]]
    lines += [row(f"predicted at 0.5, of {region}", "predicted", region) for region in REGIONS]
    lines += [row(f"AUC, target against {region}", "auc", region) for region in REGIONS[1:]]
    lines += [row(f"covered by Y_DO, of {region}", "distracting", region) for region in REGIONS]
    best, covered = best_threshold(found["base"]["miou"]), found["novel"]["distracting"]["target"]
    text = tabulate(lines, ["percent", *kinds], tablefmt="plain", disable_numparse=True)
    text += f"\n{best} is the best threshold on base classes: {found['novel']['miou'][best]:.1f} on novel ones"
    if covered is not None and covered > 50:
        text += f"\nY_DO covers most of the target on novel classes, {covered:.0f} %, which is eliminated with it"
    return text


if __name__ == "__main__":
    run_command(main)
