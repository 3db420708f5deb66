"""The files that show what to find: supports and masks of one target, or of several in a YAML file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field, ValidationError

from model.weights import sha256_of
from util.config import Section, read_yaml
from util.errors import UserError
from util.photos.edges import mask_in_box
from util.photos.images import read_mask_on, read_upright
from util.photos.predictions import output_path, write_outputs
from util.photos.segmenter import Segmenter

MAX_TARGETS = 254
"""labels in one map: 0 is background, 255 means ignored wherever masks are read"""


File = Annotated[Path, Field(strict=False)]
"""a path, also written as a string"""


class TargetFiles(Section):
    """Supports of one target, each with its mask."""

    supports: list[File] = Field(min_length=1)
    masks: list[File] = Field(min_length=1)
    class_id: int | None = None
    """value of the target in masks of class ids"""

    def inside(self, folder: Path) -> "TargetFiles":
        """Return the same with paths relative to ``folder``."""
        supports, masks = ([folder / path for path in paths] for paths in (self.supports, self.masks))
        return TargetFiles(supports=supports, masks=masks, class_id=self.class_id)

    def fingerprint(self) -> dict[str, object]:
        """Return what predictions of the target depend on: hashes of the files, and the class id."""
        hashes = {key: [sha256_of(path) for path in getattr(self, key)] for key in ("supports", "masks")}
        return {**hashes, "class_id": self.class_id}


def read_targets(path: Path) -> dict[str, TargetFiles]:
    """Read targets by name, in the file's order: ``dog: {supports: [a.jpg], masks: [a.png], class_id: 3}``.

    Paths are relative to the file; class_id may be left out.

    Raises:
        UserError: the file is not like that.
    """
    values = read_yaml(path)
    if not 1 <= len(values) <= MAX_TARGETS:
        raise UserError(f"{path}: must name 1 to {MAX_TARGETS} targets, has {len(values)}")
    targets = {}
    for name, entry in values.items():
        try:
            targets[name] = TargetFiles.model_validate(entry).inside(path.parent)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in (name, *problem["loc"]))
            raise UserError(f"{path}: {key}: {problem['msg'].lower()}") from error
    return targets


def parse_box(text: str) -> tuple[int, int, int, int]:
    """Parse the argument of --box."""
    try:
        x0, y0, x1, y1 = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box must be x0,y0,x1,y1 in whole pixels, such as 40,30,220,310; got {text}") from None
    return x0, y0, x1, y1


def write_masks_of_boxes(supports: Sequence[Path], boxes: Sequence[tuple[int, int, int, int]], out: Path) -> list[Path]:
    """Find the object in the box (x0, y0, x1, y1) of each support, and write its mask into ``out`` for correction.

    Raises:
        UserError: a box does not lie in its support.
    """
    masks = []
    for number, (support, (x0, y0, x1, y1)) in enumerate(zip(supports, boxes, strict=True), 1):
        image = read_upright(support).pixels
        height, width = image.shape[:2]
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UserError(f"--box {x0},{y0},{x1},{y1} does not lie in {support}, which is {width} x {height} pixels")
        name = f"box{number}_{support.stem}"
        write_outputs(out, name, {"mask.png": Image.fromarray(mask_in_box(image, (x0, y0, x1, y1)))})
        masks.append(output_path(out, name, "mask.png"))
        print(f"{masks[-1]} was made from --box; if it is wrong, correct it and give it as --mask")
    return masks


def encode_target(segmenter: Segmenter, files: TargetFiles) -> Any:
    """Read and encode the supports one by one, so that memory does not grow with the size of their files.

    Raises:
        UserError: the message names the file.
    """
    if len(files.supports) != len(files.masks):
        raise UserError(
            f"each support needs a mask: there are {len(files.supports)} supports and {len(files.masks)} masks"
        )
    targets = []
    for support, mask in zip(files.supports, files.masks, strict=True):
        image = read_upright(support)
        values = read_mask_on(image, mask)
        try:
            targets.append(segmenter.encode(image.pixels, values, files.class_id))
        except UserError as error:
            raise UserError(f"{mask}: {error}") from error
    return segmenter.join(targets)
