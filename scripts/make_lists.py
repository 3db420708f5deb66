r"""Lists for your own data set, from a folder of images and one of masks, or from one folder for each class.

    python scripts/make_lists.py --root data/mine --images data/mine/images --masks data/mine/masks \
        --out data/mine/lists

An image and its mask have the same name but for the suffix, in the same subfolder. Masks are palette or greyscale PNGs
whose values are class ids: 0 background, classes 1, 2, ... without gaps, 255 ignored. Every file is opened and checked.
train.txt and val.txt hold 'image mask' lines relative to --root. Every class has about --val of its images in val and,
if there are enough, at least two in each list, which a 1-shot episode needs. A config for these data is written next to
the lists, here data/mine/lists/mine.yaml, if there is none yet.

    python scripts/make_lists.py --root data/fss --out lists/fss

ROOT holds a folder for each class, named after it, such as FSS-1000's: images with their masks, 1.jpg with 1.png and so
on. A mask is black and white, the class in white. Written to OUT are classes.txt (all, in the order of their ids),
{train,val,test}_classes.txt, train.txt ('image mask' lines of the training classes) and val.txt (of the others).

24 % of the classes are for test and 24 % for validation, drawn by --seed, or those of test_classes.txt and
val_classes.txt in OUT if they exist: lists/fss holds the published test classes. The keys for a config are printed.

    python scripts/make_lists.py --layout deepglobe --root data/deepglobe --out lists/deepglobe

writes val.txt of a data set that is only tested, as it is published: deepglobe, isic or lung (lists/README.md).
"""

import argparse
import hashlib
import math
import os
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
import yaml
from tabulate import tabulate

from scripts.check_data import check_item
from util.data.class_index import Item
from util.data.images import SUFFIXES, image_size
from util.data.pool import on_all_cores
from util.errors import UserError, first_of
from util.files import write_text

CUSTOM = Path(__file__).resolve().parent.parent / "configs/custom.yaml"  # the base of the config that is written
CUSTOM_SIZE, BATCH_SIZE = 321, 8  # its data.image_size and train.batch_size
STEPS = 600  # of a training, however few images there are
LAYOUTS = {  # images of a published layout, and the path of an image's mask from that of the image
    "deepglobe": ("*/test/origin/*.jpg", "../groundtruth/{}.png"),
    "isic": (
        "ISIC2018_Task1-2_Training_Input/*/*.jpg",
        "../../ISIC2018_Task1_Training_GroundTruth/{}_segmentation.png",
    ),
    "lung": ("CXR_png/*.png", "../masks/{}_mask.png"),
}
EPISODE = 2  # images of a class that a 1-shot episode needs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="data.root of the config; it holds all files")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.txt and val.txt")
    parser.add_argument("--layout", choices=LAYOUTS, help="of a data set that is only tested, as it is published")
    parser.add_argument("--images", type=Path, help="folder of images; without it, ROOT holds a folder for each class")
    parser.add_argument("--masks", type=Path, help="folder of masks")
    parser.add_argument("--classes", type=Path, help="file of class names, one a line, the first for mask value 1")
    parser.add_argument("--val", type=float, default=0.2, help="share of the images for val")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args()
    if (args.images is None) != (args.masks is None):
        raise UserError("--images and --masks go together; without both, --root holds a folder for each class")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.layout is not None:
        list_published(args.layout, args.root, args.out)
    elif args.images is None:
        list_folders(args.root, args.out, args.seed)
    else:
        list_pairs(args)


def name_in_list(path: Path, root: Path) -> str:
    """A path as a list has it: relative to the root, without spaces."""
    try:
        name = path.absolute().relative_to(root.absolute()).as_posix()
    except ValueError:
        raise UserError(f"{path} is not below --root {root}; give the folder that holds images and masks") from None
    if " " in name or not name.isprintable():
        raise UserError(f"{str(path)!r} has a space in its name, which a list cannot hold; rename image and mask alike")
    return name


def list_pairs(args: argparse.Namespace) -> None:
    images, masks = find_files(args.images), find_files(args.masks)
    for missing, files, others in (("mask", images, masks), ("image", masks, images)):
        for stem in sorted(files.keys() - others.keys()):
            print(f"left out, it has no {missing}: {files[stem]}")
    items = [Item(images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys())]
    if not items:
        raise UserError(f"no file in {args.images} has a mask of the same name in {args.masks}")
    lines = [f"{name_in_list(item.image, args.root)} {name_in_list(item.mask, args.root)}" for item in items]
    checked = on_all_cores(partial(check_item, num_classes=254), items, "checking")
    if problems := [found for found in checked if isinstance(found, str)]:
        raise UserError(first_of(problems))
    pixels = np.array(checked)[:, 1:-1]  # of the values 1 ... 254
    names = class_names(args.classes, pixels)
    pixels = pixels[:, : len(names)]
    order = [hashlib.sha256(f"{args.seed} {line}".encode()).digest() for line in lines]
    in_val = split(pixels > 0, args.val, sorted(range(len(lines)), key=lambda n: order[n]))
    if in_val.all() or not in_val.any():
        raise UserError(f"{len(items)} images with masks are too few to split; give more")
    lists = [args.out / "train.txt", args.out / "val.txt"]
    for path, chosen in zip(lists, (~in_val, in_val), strict=True):
        write_text(path, "".join(f"{line}\n" for line, one in zip(lines, chosen, strict=True) if one))
    rows = [[name, (~in_val & has).sum(), (in_val & has).sum()] for name, has in zip(names, pixels.T > 0, strict=True)]
    rows.append(["all images", (~in_val).sum(), in_val.sum()])
    print(tabulate(rows, ["class", "train", "val"], "plain", disable_numparse=True))
    config = args.out / f"{args.root.resolve().name}.yaml"
    if config.exists():
        print(f"\n{config} exists and was not changed; remove it to get one for these lists")
    else:
        write_text(config, config_for(args.root, lists, names, items, pixels[~in_val]))
        print(f"\nconfig: {config}")
    print(f"next: python scripts/check_data.py --config {config}")


def find_files(folder: Path) -> dict[str, Path]:
    """Images below a folder by their path without the suffix, relative to it; a UserError if two are the same."""
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise UserError(f"{found[stem]} and {path} have the same name but for the suffix; rename or remove one")
            found[stem] = path
    return found


def class_names(path: Path | None, pixels: np.ndarray) -> list[str]:
    """Names of the classes 1, 2, ...; a UserError if their ids have gaps or the names do not fit the ids."""
    found = [int(value) for value in np.flatnonzero(pixels.any(0)) + 1]
    if not found or found[-1] != len(found):
        raise UserError(f"class ids must run from 1 without gaps, the masks hold {found}; renumber them")
    if path is None:
        return [f"class_{value}" for value in found]
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if len(names) != len(found) or len(set(names)) != len(names):
        raise UserError(f"--classes {path} must hold {len(found)} different names, one for each class id in the masks")
    return names


def split(present: np.ndarray, share: float, order: list[int]) -> np.ndarray:
    """Which images go to val, (images,) boolean.

    ``present`` is (images, classes) boolean. Rare classes choose first. A class moves its images to val, in the given
    order, until there are as many as it wants: ``share`` of them, at least the two of an episode. An image stays in
    train if one of its classes needs it there. Of three images of a class train keeps two; a single one stays in train.
    """
    in_val = np.zeros(len(present), bool)
    totals = present.sum(0)
    wanted = np.maximum(np.rint(share * totals), np.minimum(EPISODE, totals // 2))
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


def config_for(root: Path, lists: list[Path], names: list[str], items: list[Item], pixels: np.ndarray) -> str:
    """Return the text of a config: the data, the length of the training, and how often to validate.

    In training an image is scaled to about the size that it is evaluated at, +-10 %. Every class is held back in one
    fold. ``pixels`` counts those of each class in each training image.
    """
    sizes = [image_size(item.image) for item in items]
    side, area = (statistics.median(of(size) for size in sizes) for of in (max, math.prod))
    min_area = round(0.005 * area)
    folds = [part.tolist() for part in np.array_split(np.array(names, object), min(len(names), 4))]
    usable = int((pixels[:, len(folds[0]) :] >= min_area).any(1).sum())  # the first fold holds back the first classes
    epochs = math.ceil(STEPS / max(1, usable // BATCH_SIZE))
    scale = [round(factor * CUSTOM_SIZE / side, 2) for factor in (0.9, 1.1)]
    paths = {"root": str(root), "train_list": str(lists[0]), "val_list": str(lists[1])}
    data = paths | {"classes": names, "folds": folds, "scale": scale, "min_area": min_area}
    values = {
        "base": os.path.relpath(CUSTOM, lists[0].parent.resolve()),
        "data": {"dataset": root.resolve().name} | data,
        "train": {"steps": STEPS},
        "eval": {"every": math.ceil(epochs / 4)},
    }
    text = yaml.safe_dump(values, default_flow_style=None, sort_keys=False, allow_unicode=True, width=110)
    return f"# Written by scripts/make_lists.py, and yours to change; configs/custom.yaml explains the keys.\n{text}"


def list_folders(root: Path, out: Path, seed: int) -> None:
    lines = find_lines(root)
    chosen = split_classes(sorted(lines), out, seed)
    texts = {"classes": sorted(lines)} | {f"{part}_classes": sorted(chosen[part]) for part in ("train", "val", "test")}
    for title, parts in (("train", chosen["train"]), ("val", chosen["val"] | chosen["test"])):
        texts[title] = [line for name in sorted(parts) for line in lines[name]]
    paths = {title: out / f"{title}.txt" for title in texts}
    for title, rows in texts.items():
        write_text(paths[title], "".join(f"{row}\n" for row in rows))
        print(f"{len(rows):7,}  {paths[title]}")
    print(
        "\nfor a config such as configs/base/fss.yaml:\n\ndata:\n"
        f"  root: {root}\n  train_list: {paths['train']}\n  val_list: {paths['val']}\n  reader: class_folders\n"
        f"  classes: {paths['classes']}\n  base_classes: {paths['train_classes']}\n"
        f"  folds: [{paths['val_classes']}, {paths['test_classes']}]"
    )


def list_published(layout: str, root: Path, out: Path) -> None:
    pattern, mask_name = LAYOUTS[layout]
    pairs = [
        (image, Path(os.path.normpath(image.parent / mask_name.format(image.stem)))) for image in root.glob(pattern)
    ]
    lines = [f"{name_in_list(i, root)} {name_in_list(m, root)}" for i, m in sorted(pairs) if m.exists()]
    if not lines:
        raise UserError(f"{root} holds no images {pattern} with masks as {layout} is published; see lists/README.md")
    write_text(out / "val.txt", "".join(f"{line}\n" for line in lines))
    print(f"{out / 'val.txt'}: {len(lines)} images, {len(pairs) - len(lines)} without a mask left out")


def find_lines(root: Path) -> dict[str, list[str]]:
    """Find the 'image mask' lines of each class by the class's name."""
    suffixes = set(SUFFIXES) - {".png"}
    images = sorted(path for path in root.glob("*/*") if path.suffix.lower() in suffixes)
    if bare := [str(image) for image in images if not image.with_suffix(".png").exists()]:
        raise UserError(f"these images have no mask, of the same name with .png: {first_of(bare, separator=', ')}")
    lines: dict[str, list[str]] = {}
    for image in images:
        line = f"{name_in_list(image, root)} {name_in_list(image.with_suffix('.png'), root)}"
        lines.setdefault(image.parent.name, []).append(line)
    if len(lines) < 3:
        raise UserError(
            f"{root} holds {len(lines)} folders with images, one for each class; there must be 3. For a folder of"
            " images and one of masks give --images and --masks"
        )
    return lines


def split_classes(names: list[str], out: Path, seed: int) -> dict[str, set[str]]:
    """Split the classes into 'train', 'val' and 'test': as files in ``out`` say, the others drawn by the seed."""
    chosen: dict[str, set[str]] = {}
    for part in ("test", "val"):
        path = out / f"{part}_classes.txt"
        if path.exists():
            chosen[part] = set(path.read_text(encoding="utf-8").split())
            if unknown := sorted(chosen[part].difference(names)):
                raise UserError(f"{path} names classes without a folder: {first_of(unknown, separator=', ')}")
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    for part in ("test", "val"):
        left = [name for name in drawn if not any(name in taken for taken in chosen.values())]
        chosen.setdefault(part, set(left[: max(1, round(0.24 * len(names)))]))
    chosen["train"] = set(names) - chosen["test"] - chosen["val"]
    if not chosen["train"] or chosen["test"] & chosen["val"]:
        raise UserError(f"the classes in {out} leave none for training, or are for both validation and test")
    return chosen


if __name__ == "__main__":
    run_command(main)
