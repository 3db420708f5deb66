"""Say why a checkpoint scores as it does: python scripts/diagnose.py --config YAML --checkpoint RUN/best.pt [--out F]

On episodes of novel and of base classes, all from the validation list: how much of the target, of other objects and of
the background is predicted, how well the logits tell the target from the two others (AUC; 0.5 is chance), mIoU by
threshold, and what Y_DO covers. The threshold that is best on base classes is fair to use on novel ones.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
from tabulate import tabulate

from model.ntrenet import NTRENet
from util.config import add_config_argument, load_config, parse_arguments
from util.data.folds import base_classes, novel_classes
from util.engine.build import build_eval_sampler, build_index, build_saved_model, select_hardware
from util.engine.checkpoint import load_checkpoint, require_same, saved_config
from util.engine.diagnosis import (
    REGIONS,
    Counts,
    area_under_curve,
    count,
    miou_by_threshold,
    predicted_share,
)
from util.engine.record import environment
from util.files import require_writable, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--episodes", type=int, help="of novel and of base classes each; by default eval.episodes")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    args, overrides = parse_arguments(parser)
    overrides += [f"eval.episodes={args.episodes}"] if args.episodes is not None else []
    config = load_config(args.config, overrides)
    if args.out is not None:
        require_writable(args.out, ".json")
    hardware, index = select_hardware(config), build_index(config, "val")
    checkpoint = load_checkpoint(args.checkpoint)
    require_same(saved_config(checkpoint, args.checkpoint), config, args.checkpoint)
    model = build_saved_model(config, checkpoint, args.checkpoint).to(hardware.device)
    found: dict[str, Any] = {}
    for kind, classes in (("novel", novel_classes(config.data)), ("base", base_classes(config.data))):
        sampler = build_eval_sampler(config, index, seed=0, classes=classes)
        names = {c: config.data.classes[c - 1] for c in classes}
        episodes = [sampler(number) for number in range(config.eval.episodes)]
        found[kind] = summary(count(model, index, episodes, config=config, hardware=hardware), names)
        if reads_one_prototype(model):
            swapped = count(model, index, episodes, config=config, hardware=hardware, target_as_distractor=True)
            found[kind]["miou_with_the_target_as_distractor"] = summary(swapped, names)["miou"]
    print(table(found))
    if args.out is not None:
        record = {"checkpoint": str(args.checkpoint), "episodes": config.eval.episodes, "unit": "percent"}
        write_json(args.out, record | found | {"environment": environment(hardware.device)})
        print(f"figures: {args.out}")


def reads_one_prototype(model: NTRENet) -> bool:
    """Whether FEM takes one prototype of distracting objects, which another can replace."""
    return len(model.eliminations) == 1 and not model.per_scale and model.base_learner is None


def summary(counts: Counts, classes: dict[int, str]) -> dict[str, Any]:
    """The figures of one kind of classes, in percent; what is not defined is None."""

    def percent(value: float) -> float | None:
        return None if np.isnan(value) else round(100 * float(value), 2)

    with np.errstate(invalid="ignore"):
        covered = [np.nanmean(column) if (~np.isnan(column)).any() else np.nan for column in counts.distracting.T]
    return {
        "miou": {str(t): percent(miou) for t, miou in miou_by_threshold(counts, classes).items()},
        "predicted": dict(zip(REGIONS, map(percent, predicted_share(counts)), strict=True)),
        "auc": {name: percent(area_under_curve(counts, r)) for r, name in enumerate(REGIONS) if r > 0},
        "distracting": dict(zip(REGIONS, map(percent, covered), strict=True)),
    }


def table(found: dict[str, Any]) -> str:
    """The figures as a person reads them: a column for novel and one for base classes."""

    def row(name: str, *path: str) -> list[str]:
        cells = [name]
        for kind in ("novel", "base"):
            value = found[kind]
            for key in path:
                value = value.get(key) if value is not None else None
            cells.append("-" if value is None else f"{value:.1f}")
        return cells

    by_base = max(found["base"]["miou"], key=lambda t: found["base"]["miou"][t])
    lines = [row(f"mIoU, cut at {t}", "miou", t) for t in found["novel"]["miou"]]
    if "miou_with_the_target_as_distractor" in found["novel"]:
        name = f"the same, the target's prototype as P_DO, {by_base}"
        lines.append(row(name, "miou_with_the_target_as_distractor", by_base))
    for region in REGIONS:
        lines.append(row(f"predicted at 0.5, of {region}", "predicted", region))
    for region in REGIONS[1:]:
        lines.append(row(f"AUC, target against {region}", "auc", region))
    for region in REGIONS:
        lines.append(row(f"covered by Y_DO, of {region}", "distracting", region))
    figures = tabulate(lines, ["percent", "novel", "base"], tablefmt="plain", disable_numparse=True)
    cut = f"base classes are cut best at {by_base}: {found['novel']['miou'][by_base]:.1f} on novel ones"
    return f"{figures}\n{cut}"


if __name__ == "__main__":
    run_command(main)
