"""The files that predict.py reads: queries, ground truths, and the supports and masks that show a target."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field, ValidationError

from util.config import Section, read_yaml
from util.data.images import SUFFIXES, image_files
from util.data.pairs import pair, spelled
from util.errors import UserError, first_of
from util.photos.edges import mask_in_box
from util.photos.images import read_mask_on, read_upright
from util.photos.outputs import write_outputs
from util.photos.segmenter import Segmenter, paired

NEARLY_ALL = 0.95  # a share of an image that is no object
UNREAD = (".heic", ".heif", ".avif", ".gif")


def find_images(paths: Sequence[Path], out: Path | None = None) -> dict[str, Path]:
    """List the given files, and the images in the given folders and their subfolders, by name ('sub/frame_01').

    Hidden files and the contents of ``out`` are left out.
    """
    found: dict[str, Path] = {}
    for path in paths:
        for file in _images_in(path, out) if path.is_dir() else [path]:
            name = file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.stem
            other = found.setdefault(name, file)
            if other.resolve() != file.resolve():
                raise UserError(f"{other} and {file} are both named '{name}'; rename one, or leave one out")
    return found


def _images_in(folder: Path, out: Path | None) -> list[Path]:
    files = image_files(folder, (*SUFFIXES, *UNREAD))
    if out is not None:
        files = [file for file in files if not file.resolve().is_relative_to(out.resolve())]
    if unread := [file.name for file in files if file.suffix.lower() in UNREAD]:
        print(f"note: cannot read {first_of(unread, 3, ', ')}; convert to JPEG or PNG")
    found = [file for file in files if file.suffix.lower() not in UNREAD]
    if not found:
        raise UserError(f"folder {folder} holds no images ({', '.join(SUFFIXES)}) outside of --out")
    return found


def find_ground_truths(path: Path, queries: dict[str, Path]) -> dict[str, Path]:
    """Find the ground truth of each query: by its name in a folder, or one file for one query."""
    if not path.is_dir():
        if len(queries) != 1:
            raise UserError(f"--ground-truth {path} is no folder, and there are {len(queries)} queries")
        return dict.fromkeys(queries, path)
    images, masks = ({spelled(name): file for name, file in files.items()} for files in (queries, find_images([path])))
    pairs = pair(images, masks)
    if missing := [name for name, file in queries.items() if file not in pairs]:
        raise UserError(f"--ground-truth {path} lacks {len(missing)} of {len(queries)} queries: {first_of(missing)}")
    return {name: pairs[file] for name, file in queries.items()}


class TargetFiles(Section, strict=False):
    """Supports of one target, each with its mask."""

    supports: list[Path] = Field(min_length=1)
    masks: list[Path] = Field(min_length=1)
    class_id: int | None = None
    """value of the target in masks of class ids"""


def read_targets(path: Path) -> dict[str, TargetFiles]:
    """Read targets by name from a YAML file (see predict.py); paths are relative to it."""
    if not path.is_file():
        raise UserError(f"--targets {path} does not exist; it is a YAML file, see predict.py --help")
    targets = {}
    for name, entry in read_yaml(path).items():
        try:
            files = TargetFiles.model_validate(entry)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in (name, *problem["loc"]))
            raise UserError(f"{path}: {key}: {problem['msg'].lower()}") from error
        placed = {key: [path.parent / file for file in getattr(files, key)] for key in ("supports", "masks")}
        targets[name] = files.model_copy(update=placed)
    if not targets:
        raise UserError(f"{path} names no targets")
    return targets


def parse_box(text: str) -> tuple[int, int, int, int]:
    """Parse the argument of --box."""
    try:
        x0, y0, x1, y1 = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box must be x0,y0,x1,y1 in whole pixels, such as 40,30,220,310; got {text}") from None
    if x0 >= x1 or y0 >= y1:
        raise UserError(f"--box {text} is empty: x0,y0 is its upper left and x1,y1 its lower right corner")
    return x0, y0, x1, y1


def write_masks_of_boxes(
    supports: Sequence[Path], boxes: Sequence[tuple[int, int, int, int]], out: Path, option: str = "--box"
) -> list[Path]:
    """Find the object in the box (x0, y0, x1, y1) of each support, and write its mask into ``out`` for correction.

    ``option``: '--box' or '--not-box', which gave the boxes.
    """
    masks, prefix = [], option.strip("-").replace("-", "_")
    for number, (support, (x0, y0, x1, y1)) in enumerate(paired(supports, boxes), 1):
        image, given = read_upright(support).pixels, f"{option} {x0},{y0},{x1},{y1}"
        height, width = image.shape[:2]
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UserError(f"{given} does not lie in {support}, which is {width} x {height} pixels")
        mask = mask_in_box(image, (x0, y0, x1, y1))
        masks += write_outputs(out, f"{prefix}{number}_{support.stem}", {"mask.png": Image.fromarray(mask)})
        corrected = option.replace("box", "mask")
        print(f"{masks[-1]} was made from {option}; if it is wrong, correct it and give it as {corrected}")
        if mask[y0:y1, x0:x1].all():
            print(f"note: no border was found in {given}, so {masks[-1]} is the whole box")
    return masks


def encode_target(segmenter: Segmenter, files: TargetFiles, *, negative: bool = False) -> list[Any]:
    """Read and encode the supports one by one, so that only one of them is in memory; or negative examples."""
    encode, target = segmenter.encode_negative if negative else segmenter.encode, list[Any]()
    for support, mask in paired(files.supports, files.masks):
        image = read_upright(support)
        labels = read_mask_on(image, mask, files.class_id)
        if (share := float((labels == 1).mean())) > NEARLY_ALL:
            print(f"note: mask {mask} covers {share:.0%} of its image, which leaves nothing to compare with")
        try:
            target += encode(image.pixels, labels, class_id=1)
        except UserError as error:
            raise UserError(f"{mask}: {error}") from error
    return target
