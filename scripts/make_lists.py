r"""Lists for your own data set, from a folder of images and one of masks, or from one folder for each class.

    python scripts/make_lists.py --root data/mine --images data/mine/images --masks data/mine/masks \
        --out data/mine/lists

An image and its mask have the same name but for the suffix, in the same subfolder; all masks may have one ending more,
such as _mask. If both are in one folder, give it twice. Masks are PNGs whose grey values or palette indices are class
ids: 0 background, classes 1, 2, ... without gaps, 255 ignored. Every file is opened and checked. Every class has about
--val of its images in val.txt and, if there are enough, at least two in each list, which a 1-shot episode needs. A
config for these data is written next to the lists, here data/mine/lists/mine.yaml, if there is none yet.

    ... --images data/mine/images --masks data/mine/masks --colours labelmap.txt   # coloured masks, or ids with gaps
    ... --coco result.json [--images data/mine/images]                             # COCO's JSON of your own classes

write masks of class ids into ROOT/class_ids first. labelmap.txt has a line 'name:r,g,b' for each class, as CVAT writes
it; background and void are no classes. The images that a JSON names are looked for next to it, or in --images. Classes
that no mask shows are in data.left_out.

    python scripts/make_lists.py --root data/fss --out lists/fss

ROOT holds a folder for each class, named after it, such as FSS-1000's: images with their masks, 1.jpg with 1.png and so
on, the class in white on black. train.txt has the images of the training classes and val.txt those of the others. 24 %
of the classes are for test and 24 % for validation, drawn by --seed, or those of test_classes.txt and val_classes.txt
in OUT if they exist: lists/fss holds the published test classes. The keys for a config are printed.

    python scripts/make_lists.py --layout deepglobe --root data/deepglobe --out lists/deepglobe

writes val.txt of a data set that is only tested, as it is published: deepglobe, isic or lung (lists/README.md).
"""

import argparse
import hashlib
import math
import os
import re
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
import yaml
from tabulate import tabulate

from model import IGNORE
from scripts.check_data import check_items
from util.data.class_index import Item
from util.data.episodes import too_few
from util.data.images import encoded_mask, image_size, opened, seen_target
from util.data.pairs import find_files, find_pairs, pair
from util.data.pool import on_all_cores
from util.errors import UserError, first_of
from util.files import write_bytes, write_text

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
MADE = "class_ids"  # folder below --root for masks that are made here
NO_CLASS = {"background": 0, "ignore": IGNORE, "void": IGNORE}  # mask values of names that are no class's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="data.root of the config; it holds all files")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.txt and val.txt")
    parser.add_argument("--layout", choices=LAYOUTS, help="of a data set that is only tested, as it is published")
    parser.add_argument("--images", type=Path, help="folder of images; without it, ROOT holds a folder for each class")
    parser.add_argument("--masks", type=Path, help="folder of masks")
    parser.add_argument("--classes", type=Path, help="file of class names, one a line, the first for mask value 1")
    parser.add_argument("--colours", type=Path, help="file that names the colours, or grey values, in the masks")
    parser.add_argument("--coco", type=Path, help="COCO's JSON, instead of --masks")
    parser.add_argument("--val", type=float, default=0.2, help="share of the images for val")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args()
    if (args.images is None) != (args.masks is None) and not args.coco:
        raise UserError("--images and --masks go together; without both, --root holds a folder for each class")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.layout is not None:
        list_published(args.layout, args.root, args.out)
    elif args.images is None and not args.coco:
        list_folders(args.root, args.out, args.seed)
    else:
        list_pairs(args)


def name_in_list(path: Path, root: Path) -> str:
    """A path as a list has it: relative to the root, without spaces."""
    try:
        name = Path(os.path.normpath(path.absolute())).relative_to(root.absolute()).as_posix()
    except ValueError:
        raise UserError(f"{path} is not below --root {root}; give the folder that holds images and masks") from None
    if " " in name or not name.isprintable():
        raise UserError(f"{str(path)!r} has a space in its name, which a list cannot hold; rename image and mask alike")
    return name


def list_pairs(args: argparse.Namespace) -> None:
    names = read_names(args.classes) if args.classes else []
    if args.coco:
        items, names = items_of_coco(args.coco, args.images or args.coco.parent)
    else:
        pairs = find_pairs(args.images, args.masks, without=args.root / MADE)
        items = [Item(*pair) for pair in sorted(pairs.items())]
    if args.colours:
        items, names = items_of_colours(items, args.colours)
    if args.coco or args.colours:
        items = make_masks(items, names, args.root)
    lines = [f"{name_in_list(item.image, args.root)} {name_in_list(item.mask, args.root)}" for item in items]
    names, pixels = count_classes(items, names, args)
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
    if few := too_few({str(name): int(val) for name, train, val in rows[:-1] if train}):
        print(f"\nwarning: {few}, or raise --val")
    print(f"\ntraining: {STEPS} steps of {BATCH_SIZE} episodes, about 15 minutes on one CPU core")
    config = args.out / f"{args.root.resolve().name}.yaml"
    if config.exists():
        print(f"\n{config} exists and was not changed; remove it to get one for these lists")
    else:
        write_text(config, config_for(args.root, lists, names, items, pixels[~in_val]))
        print(f"\nconfig: {config}")
    print(f"next: python scripts/check_data.py --config {config}")


def count_classes(items: list[Item], names: list[str], args: argparse.Namespace) -> tuple[list[str], np.ndarray]:
    """Open all files; return the names of the classes 1, 2, ..., and the pixels of each in each mask."""
    counts, problems = check_items(items, 254, "checking")
    pixels = np.array(counts).reshape(-1, 256)[:, 1:-1]
    ids = (np.flatnonzero(pixels.any(0)) + 1).tolist()
    gaps = not (args.colours or args.coco) and ids != list(range(1, len(ids) + 1))
    if (problems or gaps or len(ids) < 2) and all(on_all_cores(is_white_on_black, items, "checking")):
        raise UserError(
            f"the masks, such as {items[0].mask}, are white on black: one class, and training needs others to hold"
            " back. predict.py needs no training: --support IMAGE --mask MASK --query FOLDER. For several classes put"
            " the images and masks of each into a folder of its own, and give --root alone"
        )
    if problems:
        raise UserError(first_of(problems))
    if gaps:
        raise UserError(
            f"class ids must run from 1 without gaps, the masks hold {first_of([*map(str, ids)], 20, ', ')}; renumber"
            " them: --colours FILE, with a line 'name:r,g,b' for each (3,3,3 for the grey value 3)"
        )
    if args.classes and not args.colours and not ids[-1] == len(names) == len(set(names)):
        raise UserError(
            f"--classes {args.classes} must hold {ids[-1]} different names, one a line, the first for value 1"
        )
    names = names or [f"class_{value}" for value in ids]
    return names, pixels[:, : len(names)]


def is_white_on_black(item: Item) -> bool:
    with opened(item.mask, f"mask {item.mask}") as mask:
        return seen_target(mask) is not None


def read_names(path: Path) -> list[str]:
    """Names of the classes 1, 2, ...; labelme2voc.py writes the background's before them."""
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return [name for name in names if name.strip("_").lower() not in NO_CLASS]


def items_of_colours(items: list[Item], path: Path) -> tuple[list[Item], list[str]]:
    """Return items whose masks are read by the colours that a file names, and the names of the classes."""
    names = list[str]()
    values: dict[tuple[int, ...], int] = {(0, 0, 0): 0}
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if row := re.match(r"([^#,:]+)[,:]\s*(\d+),\s*(\d+),\s*(\d+)", line):
            name, *colour = row.groups()
            value = NO_CLASS.get(name.strip("_ ").lower())
            names += [name] * (value is None and name not in names)
            values[tuple(map(int, colour))] = names.index(name) + 1 if value is None else value
    return [item._replace(read=partial(ids_of, values=values)) for item in items], names


def ids_of(path: Path, values: dict[tuple[int, ...], int]) -> np.ndarray:
    """Class ids (H, W), uint8, of a mask with the value of each colour."""
    with opened(path, f"mask {path}") as image:
        colours = np.asarray(image.convert("RGB"))
    ids = np.full(colours.shape[:2], -1)
    for colour, value in values.items():
        ids[(colours == colour).all(2)] = value
    if (ids < 0).any():
        raise UserError(f"--colours has no line 'name:r,g,b' for {colours[ids < 0][0].tolist()} in {path}")
    return ids.astype(np.uint8)


def items_of_coco(path: Path, folder: Path) -> tuple[list[Item], list[str]]:
    """Return items whose masks are painted from a COCO JSON, and the names of its classes."""
    from scripts.prepare_coco import paint, read_instances  # it needs pycocotools

    names, jobs = read_instances(path)
    if not any(outline for job in jobs for *_, outline in job.shapes):
        raise UserError(f"{path} holds no outlines of objects; export masks or polygons, not boxes")
    images = [folder / job.name.replace("\\", "/") for job in jobs]
    images = [image if image.is_file() else folder / image.name for image in images]
    if missing := [image.name for image in images if not image.is_file()]:
        raise UserError(f"{folder} lacks images that {path} names: {first_of(missing, separator=', ')}; give --images")
    return [Item(image, path, read=partial(paint, job)) for image, job in zip(images, jobs, strict=True)], names


def make_masks(items: list[Item], names: list[str], root: Path) -> list[Item]:
    """Write a mask of class ids for each item, and return items with it."""
    if len(names) >= IGNORE:
        raise UserError(f"there are {len(names)} classes, and a mask can tell 254 apart; leave some out")
    made = [root / MADE / f"{name_in_list(item.image, root)}.png" for item in items]
    on_all_cores(write_mask, list(zip(items, made, strict=True)), "making masks", unit="mask")
    return [Item(item.image, mask) for item, mask in zip(items, made, strict=True)]


def write_mask(task: tuple[Item, Path]) -> None:
    item, path = task
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, encoded_mask(item.read(item.mask)), force=False)


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
    shown = pixels.any(0)
    folds = [part.tolist() for part in np.array_split(np.array(names, object)[shown], min(shown.sum(), 4))]
    usable = int((pixels[:, shown][:, len(folds[0]) :] >= min_area).any(1).sum())  # fold 0 holds back the first classes
    epochs = math.ceil(STEPS / max(1, usable // BATCH_SIZE))
    scale = [round(factor * CUSTOM_SIZE / side, 2) for factor in (0.9, 1.1)]
    paths = {"root": str(root), "train_list": str(lists[0]), "val_list": str(lists[1])}
    data = paths | {"classes": names, "folds": folds, "scale": scale, "min_area": min_area}
    data |= {} if shown.all() else {"left_out": np.array(names, object)[~shown].tolist()}
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
    images, masks = (
        {n: f for n, f in files.items() if n.count("/") == 1} for files in find_files(root, root, root / MADE)
    )
    pairs = pair(images, masks)
    lines: dict[str, list[str]] = {}
    for image, mask in sorted(pairs.items()):
        lines.setdefault(image.parent.name, []).append(f"{name_in_list(image, root)} {name_in_list(mask, root)}")
    if len(lines) < 3:
        raise UserError(
            f"{root} holds {len(lines)} folders with images and their masks, one for each class; there must be 3. For a"
            " folder of images and one of masks give --images and --masks, for a JSON --coco"
        )
    if bare := [str(image) for image in images.values() if image not in {*pairs, *masks.values()}]:
        raise UserError(f"these images have no mask, of the same name with .png: {first_of(bare, separator=', ')}")
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
