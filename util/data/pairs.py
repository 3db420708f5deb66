"""Images and their masks, paired by name: for your own data, which come without a list."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from util.data.images import FORMATS, SUFFIXES, image_files
from util.errors import UserError, first_of

NOT_PNG = [suffix for suffix in SUFFIXES if suffix not in FORMATS["PNG"]]


def find_pairs(image_folder: Path, mask_folder: Path, *, without: Path) -> dict[Path, Path]:
    """Return the mask of each image; files without a partner are named, those below ``without`` are left out."""
    images, masks = find_files(image_folder, mask_folder, without)
    pairs = pair(images, masks)
    if not pairs:
        shown = " and ".join(str(next(iter(files.values()), "none")) for files in (images, masks))
        raise UserError(
            f"no image in {image_folder} has a mask of its name in {mask_folder}, see {shown}; from a program that"
            " names masks otherwise export COCO's JSON, and give it to scripts/make_lists.py --coco"
        )
    paired = {*pairs, *pairs.values()}
    for missing, files in (("mask", {*images.values()}), ("image", {*masks.values()} - {*images.values()})):
        if left := sorted(map(str, files - paired)):
            print(f"left out, no {missing}: {first_of(left, separator=', ')}")
    return pairs


def find_files(image_folder: Path, mask_folder: Path, without: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Find images and masks by name. In one folder masks are PNGs: 1.png is that of 1.jpg, or 1_mask.png of 1.png."""
    if image_folder.resolve() != mask_folder.resolve():
        return by_name(image_folder, SUFFIXES, without), by_name(mask_folder, SUFFIXES, without)
    masks = by_name(mask_folder, FORMATS["PNG"], without)
    return masks | by_name(image_folder, NOT_PNG, without), masks


def by_name(folder: Path, suffixes: Sequence[str], without: Path) -> dict[str, Path]:
    """Return the images below a folder by their relative paths without suffix."""
    found: dict[str, Path] = {}
    for path in image_files(folder, suffixes):
        name = spelled(path.relative_to(folder).with_suffix("").as_posix())
        if without.absolute() not in path.absolute().parents and found.setdefault(name, path) != path:
            raise UserError(f"{found[name]} and {path} have the same name but for the suffix; rename or remove one")
    return found


def spelled(name: str) -> str:
    """Return a name in one spelling: macOS decomposes letters, and Windows ignores capitals."""
    return unicodedata.normalize("NFC", name).casefold()


def pair(images: dict[str, Path], masks: dict[str, Path]) -> dict[Path, Path]:
    """Return the mask of each image: a mask's name is that of its image and an ending, the same for all, often none."""
    endings: Counter[str] = Counter()
    for name, mask in masks.items():
        end = next((n for n in range(len(name), 0, -1) if images.get(name[:n], mask) != mask), 0)
        # 10 is not the mask of 1, nor cats of cat; 1mask is
        if end and not (name[end:] and (name[end].isdigit() or name[end - 1 : end + 1].isalpha())):
            endings[name[end:]] += 1
    ending = min(endings, key=lambda ending: (-endings[ending], len(ending)), default="")
    found = {image: masks.get(name + ending, image) for name, image in images.items()}
    return {image: mask for image, mask in found.items() if image != mask}
