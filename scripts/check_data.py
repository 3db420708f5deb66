"""Check a data set before any training: python scripts/check_data.py --config C [key=value ...]

Opens every image and mask of both lists, names the published lists among them, checks that VOC's ignored border is
there, and counts for every fold the images of each class. The exit code is 1 if training the config's fold would be
wrong, else 0; warnings do not change it. The class indexes are cached for training. Not found are JPEGs with damaged
bytes that decode without an error: only a checksum tells.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
from PIL import ExifTags, Image
from tabulate import tabulate

from util.config import Config, add_config_argument, load_config, parse_arguments
from util.data.class_index import ClassIndex, Item, count_pixels, load_class_index, read_list, require_root
from util.data.episodes import find_supports, photos_of, too_few
from util.data.folds import base_classes, novel_classes
from util.data.images import read_image
from util.data.pool import on_all_cores
from util.data.published import is_benchmark, overlap, published, title_of
from util.data.readers import reader_of
from util.errors import UserError, first_of

SHOWN = 20  # problems, warnings, and files with one problem on screen
FEWEST = 5  # classes of a fold in the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    args, overrides = parse_arguments(parser)
    config = load_config(args.config, overrides)
    data, paths = config.data, {"train": Path(config.data.train_list), "val": Path(config.data.val_list)}

    found = [problem for path in paths.values() for problem in check_files(config, path)]
    # missing lists and a missing data.root have one remedy
    problems = list({problem.partition("; ")[2]: problem for problem in found}.values())
    warnings: list[str] = []
    if not problems:
        root, num_classes, reader = Path(data.root), len(data.classes), reader_of(data)
        indexes = {name: load_class_index(path, root, num_classes, make_item=reader) for name, path in paths.items()}
        for name, index in indexes.items():
            check_list(config, name, index, problems, warnings)
        if shared := overlap(indexes["train"].items, indexes["val"].items):
            (problems if is_benchmark(data.dataset) else warnings).append(shared)
        check_folds(config, indexes, problems, warnings)
    for kind, messages in (("PROBLEM", problems), ("WARNING", warnings)):
        print("".join(f"{kind} {message}\n" for message in messages[:SHOWN]), end="")
        if len(messages) > SHOWN:
            print(f"... and {len(messages) - SHOWN} more")
    verdict = "training would be wrong" if problems else "ready to train"
    print(f"fold {data.fold}: {verdict}" + ("; see the warnings" if warnings else ""))
    sys.exit(1 if problems else 0)


def check_files(config: Config, path: Path) -> list[str]:
    """Open every file of a list and return the problems."""
    try:
        require_root(Path(config.data.root), path)
        items = read_list(path, Path(config.data.root), reader_of(config.data))
    except UserError as error:
        return [str(error)]
    return check_items(items, len(config.data.classes), f"checking {path}")[1]


def check_items(items: Sequence[Item], num_classes: int, title: str) -> tuple[list[np.ndarray], list[str]]:
    """Decode images and masks; return the counts of :func:`count_pixels`, and one problem of each kind."""
    kinds: dict[str, list[str]] = {}
    checked = on_all_cores(partial(check_item, num_classes=num_classes), items, title)
    for item, found in zip(items, checked, strict=True):
        if isinstance(found, str):
            kind = re.sub(r"\d", "", found.replace(str(item.image), "").replace(str(item.mask), ""))
            kinds.setdefault(kind, [found]).append(item.image.name)
    problems = [first + ("; also " if more else "") + first_of(more, SHOWN, ", ") for first, _, *more in kinds.values()]
    return [found for found in checked if not isinstance(found, str)], problems


def check_item(item: Item, num_classes: int) -> np.ndarray | str:
    """Decode an image and its mask; return the counts of :func:`count_pixels`, or the problem."""
    try:
        read_image(item.image)
        return count_pixels(item, num_classes)
    except UserError as error:
        return str(error)


def is_turned(item: Item) -> bool:
    """Tell whether EXIF turns an image on screen."""
    with Image.open(item.image) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def check_list(config: Config, name: str, index: ClassIndex, problems: list[str], warnings: list[str]) -> None:
    """Compare a list and the number of masks that hold 255 with the published ones."""
    title, official = title_of(index.items), published(index.items)
    ignored = int((index.ignored > 0).sum())
    found = f"{ignored} of {len(index.items)} masks hold 255"
    held = f"; {found}" if ignored or official else ""
    print(f"{name:5} {index.list_path}: {title}{held}; SHA-256 {index.list_sha256[:16]}")
    if official and ignored != official.ignored:
        problems.append(
            f"list {index.list_path}: {found}, of the published ones {official.ignored}: VOC's ignored border is lost,"
            " which costs 4.6 points of mIoU; make the masks from the official archives"
        )
    if turned := sum(on_all_cores(is_turned, index.items, "EXIF")):
        warnings.append(
            f"list {index.list_path}: EXIF turns {turned} images on screen, which is ignored here: their masks must"
            " fit the stored pixels; mogrify -auto-orient stores images as they are seen"
        )
    if config.data.dataset.upper().startswith("PASCAL") and (official is None or official.split != name):
        warnings.append(
            f"list {index.list_path} is not a {name} list that papers use ({title}): results are not comparable with"
            f" published ones; lists/pascal/{name}.txt is the usual one"
        )


def check_folds(config: Config, indexes: dict[str, ClassIndex], problems: list[str], warnings: list[str]) -> None:
    """Print how many images each class has: base classes in the training list, novel ones in the validation list.

    Too few for an episode are a problem in the config's fold and a warning in others.
    """
    rows = []
    for fold in range(config.data.num_folds):
        data = config.data.model_copy(update={"fold": fold})
        messages = problems if fold == config.data.fold else warnings
        try:
            novel, base = novel_classes(data), base_classes(data)
        except UserError as error:
            messages.append(str(error))
            continue
        for name, classes, avoid in (
            ("train", base, novel if data.novel_in_train == "drop" else ()),
            ("val", novel, ()),
        ):
            supports = find_supports(indexes[name], classes, data.min_area, avoid)
            images = {data.classes[c - 1]: len(found) for c, found in photos_of(indexes[name], supports).items()}
            fewest = [f"{c} {n}" for c, n in sorted(images.items(), key=lambda pair: pair[1])]
            shown = ", ".join(fewest[:FEWEST]) + (", ..." if len(fewest) > FEWEST else "")
            count = len(np.unique(np.concatenate(list(supports.values()))))
            rows.append([fold, name, count, shown])
            if name == "val" and fold == config.data.fold and (few := too_few(images)):
                warnings.append(few)
            if name == "train" and fold == config.data.fold:
                of_epoch, epochs, steps = config.train.schedule(count)
                print(f"\nfold {fold}: {steps} training steps, in {epochs} epochs of {of_epoch}")
            if short := [f"{c} {n}" for c, n in images.items() if n <= data.shots]:
                messages.append(
                    f"fold {fold}: {data.shots}-shot episodes need {data.shots + 1} images of a class with at least"
                    f" {data.min_area} pixels of it in the {name} list, found {first_of(short, separator=', ')}: lower"
                    " data.min_area or data.shots, add images, or name these classes in data.left_out"
                )
    headers = ["fold", "split", "images", "images of each class, fewest first"]
    print(f"\n{tabulate(rows, headers, tablefmt='plain', disable_numparse=True)}\n")


if __name__ == "__main__":
    run_command(main)
