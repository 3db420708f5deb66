"""Check a data set before any training: python scripts/check_data.py --config C [--json F] [key=value ...]

Opens every image and mask of both lists, and counts for every fold which classes can give episodes. Exit code 1
when training the config's fold would be wrong, 0 otherwise; a warning does not change it.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.class_index import Item, count_pixels, on_all_cores, read_list
from util.config import Config, add_config_argument, load_config, parse_arguments
from util.errors import UserError, run_command
from util.folds import base_classes, novel_classes
from util.images import read_image
from util.record import require_writable, write_json

SHOWN = 20
"""problems listed on screen; --json has them all"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    parser.add_argument("--json", type=Path, help="write the report here as well")
    args, overrides = parse_arguments(parser)
    config = load_config(args.config, overrides)
    if args.json is not None:
        require_writable(args.json, ".json")

    splits = {"train": check_list(config, config.data.train_list), "val": check_list(config, config.data.val_list)}
    report: dict[str, Any] = {
        "dataset": config.data.dataset,
        "shots": config.data.shots,
        "min_area": config.data.min_area,
        "folds": [check_fold(config, fold, splits) for fold in range(config.data.num_folds)],
        "problems": {name: split["problems"] for name, split in splits.items()},
        "warnings": warnings(config, splits),
    }
    print(table(config, report))
    if args.json is not None:
        write_json(args.json, report)
        print(f"report: {args.json}")
    own = report["folds"][config.data.fold]["splits"]
    sys.exit(1 if any(split["problems"] for split in own.values()) else 0)


def check_list(config: Config, list_path: str) -> dict[str, Any]:
    """Open every file of a list: pixel counts (images, num_classes + 1), share of 255, and what is wrong."""
    num_classes = len(config.data.classes)
    try:
        items = read_list(Path(list_path), Path(config.data.root))
    except UserError as error:
        return {
            "pixels": np.zeros((0, num_classes + 1), np.int64),
            "lines": 0,
            "ignored": 0.0,
            "problems": [str(error)],
        }
    checked = on_all_cores(partial(check_item, num_classes=num_classes), items, f"checking {list_path}")
    good = [counts for counts, problem in checked if problem is None]
    counts = np.array(good, np.int64).reshape(len(good), num_classes + 2)
    return {
        "pixels": counts[:, :-1],
        "lines": len(items),
        "ignored": int(counts[:, -1].sum()) / max(int(counts.sum()), 1),
        "problems": [problem for _, problem in checked if problem is not None],
    }


def check_item(item: Item, num_classes: int) -> tuple[np.ndarray | None, str | None]:
    """Decode an image and its mask: the counts of :func:`count_pixels`, or the problem if there is one."""
    try:
        read_image(item.image)
        return count_pixels(item, num_classes), None
    except UserError as error:
        return None, str(error)


def check_fold(config: Config, fold: int, splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Which classes of a fold can give episodes: base classes in the training list, novel ones in the other."""
    data = config.data.model_copy(update={"fold": fold})
    report: dict[str, Any] = {"fold": fold, "splits": {}}
    for name, classes in (("train", base_classes(data)), ("val", novel_classes(data))):
        split = splits[name]
        enough = split["pixels"][:, list(classes)] >= data.min_area
        if name == "train" and data.novel_in_train == "drop":
            enough = enough[split["pixels"][:, list(novel_classes(data))].sum(1) == 0]
        images = {data.classes[c - 1]: int(count) for c, count in zip(classes, enough.sum(0), strict=True)}
        short = [
            f"class '{c}' has {n} images of at least {data.min_area} pixels in the {name} list, {data.shots}-shot"
            f" episodes need {data.shots + 1}: lower data.min_area or data.shots, or add images"
            for c, n in images.items()
            if n < data.shots + 1
        ]
        report["splits"][name] = {
            "lines": split["lines"],
            "qualifying_images": int(enough.any(1).sum()),
            "images_per_class": images,
            "ignored_share": split["ignored"],
            "problems": split["problems"] + short,
        }
    return report


def warnings(config: Config, splits: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"no pixel of the {name} masks has the value 255: if {config.data.dataset} has an ignored border, it is lost"
        " (on PASCAL that costs 4.6 points of mIoU); then make the masks anew from the official archives"
        for name, split in splits.items()
        if split["lines"] and not split["problems"] and split["ignored"] == 0
    ]


def table(config: Config, report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    data = config.data
    lines = [f"{data.dataset}: {data.shots}-shot, classes qualify with {data.min_area} pixels", ""]
    lines.append(f"{'fold':4} {'split':5} {'lines':>7} {'in the fold':>11} {'255':>6}  images a class, fewest first")
    for fold in report["folds"]:
        for name, split in fold["splits"].items():
            fewest = sorted(split["images_per_class"].items(), key=lambda pair: pair[1])[:5]
            lines.append(
                f"{fold['fold']:<4} {name:5} {split['lines']:7} {split['qualifying_images']:11}"
                f" {split['ignored_share']:6.1%}  {', '.join(f'{c} {n}' for c, n in fewest)}, ..."
            )
    own = report["folds"][data.fold]["splits"]
    problems = [problem for split in own.values() for problem in split["problems"]]
    lines += ["", *(f"PROBLEM {problem}" for problem in problems[:SHOWN])]
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more (--json has them all)")
    lines += [f"WARNING {warning}" for warning in report["warnings"]]
    others = [
        f"fold {fold['fold']}"
        for fold in report["folds"]
        if fold["fold"] != data.fold and any(split["problems"] for split in fold["splits"].values())
    ]
    if others:
        lines.append(f"also with problems: {', '.join(others)}")
    lines.append(f"fold {data.fold}: " + ("training would be wrong" if problems else "ready to train"))
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
