r"""Lists for a data set of your own, from a folder of images and a folder of masks.

    python scripts/make_lists.py --root data/mine --images data/mine/images --masks data/mine/masks \
        --out data/mine/lists

An image and its mask have the same name but for the suffix; subfolders are searched, the same on both sides. Masks are
palette or greyscale PNGs whose values are class ids: 0 background, classes 1, 2, ... without gaps, 255 ignored. Every
file is opened and checked. train.txt and val.txt hold 'image mask' lines relative to --root, the same for the same
files and --seed. Every class has about --val of its images in val and, where there are enough, at least two in each
list, which is what a 1-shot episode needs. A config for these data is written beside the lists, here
data/mine/lists/mine.yaml. A config that is there already is left as it is, and the new text is printed instead.
"""

import argparse
import hashlib
import math
import os
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
import yaml
from tabulate import tabulate as text_table
from util.segment.pictures import SUFFIXES

from scripts.check_data import check_item, copies_warning, turned_warning
from util.data.class_index import Item, tabulate
from util.data.images import image_size
from util.data.pool import on_all_cores
from util.errors import UserError
from util.files import require_writable, write_text

LARGEST_ID = 254
CUSTOM = Path(__file__).resolve().parent.parent / "configs/custom.yaml"
"""the base of the config that is written"""
CUSTOM_SIZE = 321
"""data.image_size of CUSTOM"""
EPISODE = 2
"""images of a class that a 1-shot episode needs"""
STEPS, BATCH_SIZE = 600, 8
"""steps after which something is learned, however few pictures there are; train.batch_size of CUSTOM"""
VALIDATIONS = 4
"""how often a training validates: with the 200 episodes of CUSTOM, a small part of the time"""
MIN_SHARE = 0.005
"""share of a picture that a class needs to be an example of it"""
MOST_FOLDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--masks", type=Path, required=True, help="folder of masks")
    parser.add_argument("--root", type=Path, required=True, help="folder that holds both; data.root of the config")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.txt and val.txt")
    parser.add_argument("--classes", type=Path, help="file of class names, one a line, the first for mask value 1")
    parser.add_argument("--val", type=float, default=0.2, help="share of the images for val")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args()
    if not 0 < args.val < 1:
        raise UserError(f"--val must lie between 0 and 1, got {args.val:g}")
    lists = [args.out / "train.txt", args.out / "val.txt"]
    for path in lists:
        require_writable(path, ".txt")

    images, masks = find_files(args.images), find_files(args.masks)
    for missing, files, others in (("mask", images, masks), ("image", masks, images)):
        for stem in sorted(files.keys() - others.keys()):
            print(f"left out, it has no {missing}: {files[stem]}")
    items = [Item(images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys())]
    if not items:
        raise UserError(f"no file in {args.images} has a mask of the same name in {args.masks}")
    lines = [f"{in_list(item.image, args.root)} {in_list(item.mask, args.root)}" for item in items]
    pixels = count_classes(items)
    names = class_names(args.classes, pixels)

    pixels = pixels[:, 1 : len(names) + 1]
    order = [hashlib.sha256(f"{args.seed} {line}".encode()).digest() for line in lines]
    in_val = split(pixels > 0, args.val, sorted(range(len(lines)), key=lambda n: order[n]))
    if in_val.all() or not in_val.any():
        raise UserError(f"{len(items)} images with masks are too few to split; give more")
    for path, chosen in zip(lists, (~in_val, in_val), strict=True):
        write_text(path, "".join(f"{line}\n" for line, one in zip(lines, chosen, strict=True) if one))
    print(table(names, pixels, in_val))
    config = args.out / f"{args.root.resolve().name}.yaml"
    write_config(config, config_for(args.root, lists, names, items, pixels[~in_val]))


def find_files(folder: Path) -> dict[str, Path]:
    """Pictures below a folder by their path without the suffix, relative to it.

    Raises:
        UserError: no folder, no pictures, two of the same stem.
    """
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise UserError(f"{found[stem]} and {path} have the same name but for the suffix; rename or remove one")
            found[stem] = path
    if not found:
        raise UserError(f"folder {folder} holds no pictures ({', '.join(SUFFIXES)})")
    return found


def in_list(path: Path, root: Path) -> str:
    """A path as a list has it: relative to the root, without spaces."""
    try:
        name = path.absolute().relative_to(root.absolute()).as_posix()
    except ValueError:
        raise UserError(f"{path} is not below --root {root}; give the folder that holds images and masks") from None
    if " " in name or not name.isprintable():
        raise UserError(
            f"{str(path)!r} has a space or an unprintable character in its name, which a list cannot hold; rename the"
            " file or folder, and its mask or image alike"
        )
    return name


def count_classes(items: list[Item]) -> np.ndarray:
    """Pixels of each value in each mask, (images, 255).

    Raises:
        UserError: after all files were opened, with every file that is wrong.
    """
    checked = on_all_cores(partial(check_item, num_classes=LARGEST_ID), items, "checking")
    problems = [found.problem for found in checked if found.problem is not None]
    if problems:
        for problem in problems[1:]:
            print(f"also: {problem}", file=sys.stderr)
        raise UserError(problems[0] + (f" ({len(problems)} files are wrong)" if len(problems) > 1 else ""))
    photos = [(item.image, found.photo) for item, found in zip(items, checked, strict=True)]
    for warning in turned_warning(items, checked) + copies_warning(photos):
        print(f"note: {warning}")
    return tabulate([found.counts for found in checked if found.counts is not None], LARGEST_ID).pixels.toarray()


def class_names(path: Path | None, pixels: np.ndarray) -> list[str]:
    """Names of the classes 1, 2, ...; every one of them must be in some mask.

    Raises:
        UserError: no class in any mask, gaps between the ids, or names that do not fit the ids.
    """
    found = [int(value) for value in np.flatnonzero(pixels[:, 1:].any(0)) + 1]
    if not found:
        raise UserError("the masks hold nothing but 0 (background) and 255 (ignored); a class's pixels are 1, 2, ...")
    if found[-1] != len(found):
        renamed = ", ".join(f"{old} as {new}" for new, old in enumerate(found, 1) if new != old)
        raise UserError(f"class ids must run from 1 without gaps, the masks hold {found}; write {renamed}")
    if path is None:
        return [f"class_{value}" for value in found]
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path} cannot be read: {error}") from None
    if len(names) != len(found) or len(set(names)) != len(names):
        raise UserError(f"--classes {path} must hold {len(found)} different names, one for each class id in the masks")
    return names


def split(present: np.ndarray, share: float, order: list[int]) -> np.ndarray:
    """Which images go to val, (images,) boolean.

    Rare classes choose first. A class moves its images to val, in the given order, until there are as many as it
    wants: ``share`` of them, at least the two of an episode. An image stays in train where one of its classes needs
    it there. With three images of a class train keeps two; a single one stays in train.

    Args:
        present: (images, classes) boolean
        order: of the images, random but always the same
    """
    in_val = np.zeros(len(present), bool)
    totals = present.sum(0)
    least = np.minimum(EPISODE, totals // 2)
    wanted = np.maximum(np.rint(share * totals), least)
    kept = np.minimum(EPISODE, totals - totals // 2)
    for c in np.argsort(totals, kind="stable"):
        for n in order:
            if present[in_val, c].sum() >= wanted[c]:
                break
            stays = present[~in_val].sum(0) - present[n]
            if present[n, c] and not in_val[n] and (stays >= kept)[present[n]].all():
                in_val[n] = True
    empty = [n for n in order if not present[n].any()]
    in_val[empty[: round(share * len(empty))]] = True
    return in_val


def table(names: list[str], pixels: np.ndarray, in_val: np.ndarray) -> str:
    """Images and pixels of each class in both lists, and the classes of which there are too few."""
    rows: list[list[Any]] = []
    notes = []
    for c, name in enumerate(names):
        counts = [(int((pixels[chosen, c] > 0).sum()), int(pixels[chosen, c].sum())) for chosen in (~in_val, in_val)]
        (train, train_pixels), (val, val_pixels) = counts
        rows.append([c + 1, name, train, train_pixels, val, val_pixels])
        for where, images, role in (("train", train, "base"), ("val", val, "novel")):
            if images < EPISODE:
                notes.append(f"note: {name} has {images} images in {where}, too few for a {role} class")
    rows.append(["", "all images", int((~in_val).sum()), "", int(in_val.sum()), ""])
    headers = ["id", "class", "train images", "pixels", "val images", "pixels"]
    align = ["right", "left", *["right"] * 4]
    return "\n".join([text_table(rows, headers, "plain", colalign=align, disable_numparse=True), *notes])


def config_for(root: Path, lists: list[Path], names: list[str], items: list[Item], pixels: np.ndarray) -> str:
    """Return the text of a config: what the data are, how long to train, and how often to validate.

    In training a picture is scaled to about the size that it is evaluated at. Every class is held back in one fold.

    Args:
        pixels: (training images, classes) of each class.
    """
    sizes = [image_size(item.image) for item in items]
    side, area = (statistics.median(of(size) for size in sizes) for of in (max, math.prod))
    min_area = round(MIN_SHARE * area)
    folds = [part.tolist() for part in np.array_split(np.array(names, object), min(len(names), MOST_FOLDS))]
    usable = int((pixels[:, len(folds[0]) :] >= min_area).any(1).sum())  # the first fold holds back the first classes
    epoch_steps = max(1, usable // BATCH_SIZE)
    epochs = math.ceil(STEPS / epoch_steps)
    scale = [round(factor * CUSTOM_SIZE / side, 2) for factor in (0.9, 1.1)]
    paths = {"root": str(root), "train_list": str(lists[0]), "val_list": str(lists[1])}
    data = paths | {"classes": names, "folds": folds, "scale": scale, "min_area": min_area}
    values = {
        "base": os.path.relpath(CUSTOM, lists[0].parent.resolve()),
        "data": {"dataset": root.resolve().name} | data,
        "train": {"epochs": epochs},
        "eval": {"every": max(1, epochs // VALIDATIONS)},
    }
    text = yaml.safe_dump(values, default_flow_style=None, sort_keys=False, allow_unicode=True, width=110)
    return (
        "# Written by scripts/make_lists.py, and yours to change; configs/custom.yaml explains the keys.\n"
        f"# Fold 0 has {usable} training images of base classes, {epoch_steps} steps an epoch. scale is {CUSTOM_SIZE} /"
        f" {side:g}, the median longer side, +-10 %;\n"
        f"# it goes with data.image_size. min_area is {MIN_SHARE:.1%} of the median picture.\n{text}"
    )


def write_config(path: Path, text: str) -> None:
    """Write a config's text, unless a config is there already; say what was done and which command comes next."""
    if not path.exists():
        write_text(path, text)
        print(f"\nconfig: {path}")
    elif path.read_text(encoding="utf-8") != text:
        print(f"\n{path} is there and was left as it is; for these lists it could say:\n\n{text}")
    print(f"next: python scripts/check_data.py --config {path}")


if __name__ == "__main__":
    run_command(main)
