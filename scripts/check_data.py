"""Check a data set before any training: python scripts/check_data.py --config C [--json F] [key=value ...]

Opens every image and mask of both lists, and counts for every fold which classes can give episodes. Names the published
lists among them, and checks that VOC's ignored border is there. The exit code is 1 if training the config's fold would
be wrong, else 0; warnings do not change it. The class index of a list without problems is cached for training.
"""

import argparse
import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
from tabulate import tabulate

from util.config import Config, add_config_argument, load_config, parse_arguments
from util.data.class_index import (
    ClassIndex,
    Item,
    count_pixels,
    hash_list,
    index_key,
    parse_list,
    require_root,
    write_cache,
)
from util.data.episodes import find_supports
from util.data.folds import base_classes, novel_classes
from util.data.images import orientation, read_image
from util.data.pool import on_all_cores
from util.data.published import is_benchmark, overlap, published, title_of
from util.data.readers import reader_of
from util.errors import UserError, first_of
from util.files import require_writable, write_json

SHOWN = 20
"""problems on screen; --json has them all"""
FEWEST = 5
"""classes of a fold in the table"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    parser.add_argument("--json", type=Path, help="write the report here as well")
    args, overrides = parse_arguments(parser)
    config = load_config(args.config, overrides)
    if args.json is not None:
        require_writable(args.json, ".json")

    splits = {"train": check_list(config, config.data.train_list), "val": check_list(config, config.data.val_list)}
    for name, split in splits.items():
        compare(config, name, split)
    val = splits["val"]
    if shared := overlap(*(split.index.items for split in splits.values())):
        (val.problems if is_benchmark(config.data.dataset) else val.warnings).append(shared)
    val.warnings += copies_warning(pair for split in splits.values() for pair in split.hashes)
    report = report_of(config, splits)
    print(text_of(config, report))
    if args.json is not None:
        write_json(args.json, report)
        print(f"report: {args.json}")
    own = report["folds"][config.data.fold]["splits"]
    sys.exit(1 if any(split["problems"] for split in own.values()) else 0)


@dataclass
class Split:
    """A checked list."""

    index: ClassIndex
    """of the lines without problems"""
    lines: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    hashes: list[tuple[Path, str]] = field(default_factory=list)
    """each line's image and the SHA-256 of its file"""


class Checked(NamedTuple):
    """An image and its mask, checked."""

    counts: np.ndarray | None
    """see :func:`count_pixels`; None if there is a problem"""
    problem: str | None
    turned: bool = False
    """viewers turn the image by its EXIF orientation, and the mask's size does not tell whether it was turned too"""
    sha256: str = ""
    """of the image file"""


def check_list(config: Config, path: str) -> Split:
    """Open every file of a list; cache its class index if there is no problem."""
    list_path, root, num_classes = Path(path), Path(config.data.root), len(config.data.classes)
    try:
        items, problems = parse_list(list_path, root, reader_of(config.data))
        sha256 = hash_list(items, root)
        require_root(root)
    except UserError as error:
        empty = np.zeros((0, num_classes + 2), np.int32)
        return Split(ClassIndex((), empty[:, :-1], list_path, "", empty[:, -1]), problems=[str(error)])
    problems = [f"list {path} {problem}" for problem in problems]
    checked = on_all_cores(partial(check_item, num_classes=num_classes), items, f"checking {path}")
    problems += [found.problem for found in checked if found.problem is not None]
    good = [(item, found.counts) for item, found in zip(items, checked, strict=True) if found.counts is not None]
    counts = np.array([row for _, row in good], np.int32).reshape(-1, num_classes + 2)
    if not problems:
        write_cache(list_path, index_key(items, list_path, sha256, num_classes), counts)
    index = ClassIndex(tuple(item for item, _ in good), counts[:, :-1], list_path, sha256, counts[:, -1])
    hashes = [(item.image, found.sha256) for item, found in zip(items, checked, strict=True)]
    return Split(index, len(items), problems, turned_warning(items, checked), hashes)


def check_item(item: Item, num_classes: int) -> Checked:
    """Decode an image and its mask."""
    try:
        height, width, _ = read_image(item.image).shape
        turned = orientation(item.image)
        counts = count_pixels(item, num_classes)
        turned_unseen = turned in (2, 3, 4) or (turned > 4 and height == width)
        return Checked(counts, None, turned_unseen, hashlib.sha256(item.image.read_bytes()).hexdigest())
    except UserError as error:
        return Checked(None, str(error))


def turned_warning(items: Sequence[Item], checked: Sequence[Checked]) -> list[str]:
    """A warning if viewers turn images."""
    turned = [str(item.image) for item, found in zip(items, checked, strict=True) if found.turned]
    message = (
        f"{len(turned)} images are turned on screen by their EXIF orientation ({first_of(turned, separator=', ')});"
        " masks must fit the pixels as stored: if they were drawn on the image as seen, store that, by"
        " mogrify -auto-orient"
    )
    return [message] if turned else []


def copies_warning(hashes: Iterable[tuple[Path, str]]) -> list[str]:
    """A warning if an image has several files, as people make them to give it one mask for each class."""
    names = defaultdict[str, set[str]](set)
    for path, sha256 in hashes:
        names[sha256].add(str(path))
    copies = [first_of(sorted(same), separator=" = ") for sha256, same in names.items() if len(same) > 1 and sha256]
    message = (
        f"{len(copies)} images have several files ({first_of(copies)}): a copy can be the support of its own query, or"
        " be in both lists; let all lines of an image name one file, each with its mask"
    )
    return [message] if copies else []


def compare(config: Config, name: str, split: Split) -> None:
    """Compare a list and the number of masks that hold 255 with the published or usual ones."""
    index, official = split.index, published(split.index.items)
    masks, ignored = len(index.items), int((index.ignored > 0).sum())
    if split.problems or not masks:
        return
    if config.data.dataset.upper().startswith("PASCAL") and (official is None or official.split != name):
        split.warnings.append(
            f"list {index.list_path} is not a {name} list that papers use ({title_of(index.items)}): results are not"
            f" comparable with published ones; lists/pascal/{name}.txt is the usual one"
        )
    found = f"{ignored} of {masks} {name} masks hold the value 255"
    voc_like = all("SegmentationClass" in item.mask.parent.name for item in index.items)
    if official:
        if ignored != official.ignored:
            split.problems.append(
                f"{found}, of the published ones {official.ignored}: VOC's ignored border is lost, which costs 4.6"
                " points of mIoU; make the masks from the official archives"
            )
    elif config.data.reader == "class_ids" and (ignored == 0 or (voc_like and ignored < masks / 2)):
        split.warnings.append(
            f"{found}: if {config.data.dataset} has an ignored border, as VOC has, the others have lost it (on PASCAL"
            " that costs 4.6 points of mIoU)"
        )


def report_of(config: Config, splits: dict[str, Split]) -> dict[str, Any]:
    lists = {
        name: {
            "path": str(split.index.list_path),
            "sha256": split.index.list_sha256,
            "lines": split.lines,
            "title": title_of(split.index.items),
            "masks_with_255": int((split.index.ignored > 0).sum()),
        }
        for name, split in splits.items()
    }
    return {
        "dataset": config.data.dataset,
        "shots": config.data.shots,
        "min_area": config.data.min_area,
        "lists": lists,
        "folds": [check_fold(config, fold, splits) for fold in range(config.data.num_folds)],
        "problems": {name: split.problems for name, split in splits.items()},
        "warnings": [warning for split in splits.values() for warning in split.warnings],
    }


def check_fold(config: Config, fold: int, splits: dict[str, Split]) -> dict[str, Any]:
    """Which classes of a fold can give episodes: base classes in the training list, novel ones in the other."""
    data = config.data.model_copy(update={"fold": fold})
    report: dict[str, Any] = {"fold": fold, "splits": {}}
    for name, classes in (("train", base_classes(data)), ("val", novel_classes(data))):
        split, index = splits[name], splits[name].index
        avoid = novel_classes(data) if name == "train" and data.novel_in_train == "drop" else ()
        supports = find_supports(index, classes, data.min_area, avoid)
        images = {data.classes[c - 1]: len(np.unique(index.photos[lines])) for c, lines in supports.items()}
        short = [
            f"class '{c}' has {n} images of at least {data.min_area} pixels in the {name} list, {data.shots}-shot"
            f" episodes need {data.shots + 1}: lower data.min_area or data.shots, or add images"
            for c, n in images.items()
            if n < data.shots + 1 and index.items
        ]
        ignored, all_pixels = int(index.ignored.sum()), int(index.pixels.sum() + index.ignored.sum())
        report["splits"][name] = {
            "lines": split.lines,
            "qualifying_images": len(np.unique(np.concatenate(list(supports.values())))),
            "images_per_class": images,
            "ignored_share": ignored / max(all_pixels, 1),
            "problems": split.problems + short,
        }
    return report


def text_of(config: Config, report: dict[str, Any]) -> str:
    """The report as a table and a verdict."""
    data = config.data
    lines = [f"{data.dataset}: {data.shots}-shot, classes qualify with {data.min_area} pixels", ""]
    for name, about in report["lists"].items():
        masks = f"{about['masks_with_255']} of {about['lines']} masks hold 255"
        lines.append(f"{name:5} {about['path']}: {about['title']}; {masks}; SHA-256 {about['sha256'][:16]}")
    rows = []
    for fold in report["folds"]:
        for name, split in fold["splits"].items():
            fewest = sorted(split["images_per_class"].items(), key=lambda pair: pair[1])
            shown = ", ".join(f"{c} {n}" for c, n in fewest[:FEWEST]) + (", ..." if len(fewest) > FEWEST else "")
            share = f"{split['ignored_share']:.1%}"
            rows.append([fold["fold"], name, split["lines"], split["qualifying_images"], share, shown])
    headers = ["fold", "split", "lines", "in the fold", "255", "images of each class, fewest first"]
    lines += ["", tabulate(rows, headers, tablefmt="plain", disable_numparse=True), ""]
    wrong = {
        fold["fold"]: [p for split in fold["splits"].values() for p in split["problems"]] for fold in report["folds"]
    }
    problems = wrong.pop(data.fold)
    lines += [f"PROBLEM {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more (--json has them all)")
    lines += [f"WARNING {warning}" for warning in report["warnings"]]
    if any(wrong.values()):
        lines.append(f"also with problems: {', '.join(f'fold {fold}' for fold, found in wrong.items() if found)}")
    verdict = "training would be wrong" if problems else "ready to train"
    lines.append(f"fold {data.fold}: {verdict}" + ("; see the warnings" if report["warnings"] else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
