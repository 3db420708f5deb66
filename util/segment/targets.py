"""The files that show what is to be found: supports and masks of one target, or of several in a YAML file."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from model.weights import sha256_of
from util.config import Section, read_yaml
from util.errors import UserError
from util.segment.pictures import read_mask_on, read_picture
from util.segment.segmenter import Segmenter, T

MAX_TARGETS = 254
"""ids of a labelled map: 0 is background, 255 means ignored wherever masks are read"""


class TargetFiles(Section):
    """Supports of one target, each with its mask."""

    supports: list[str] = Field(min_length=1)
    masks: list[str] = Field(min_length=1)
    class_id: int | None = None
    """value of the target in the masks, where they hold class ids"""

    def below(self, folder: Path) -> "TargetFiles":
        """Return the same with paths relative to ``folder``, and checked: as many masks as supports, all there.

        Raises:
            UserError: naming what is missing.
        """
        supports, masks = ([str(folder / path) for path in paths] for paths in (self.supports, self.masks))
        if len(supports) != len(masks):
            raise UserError(f"each support needs a mask: there are {len(supports)} supports and {len(masks)} masks")
        for path in supports + masks:
            try:
                there = Path(path).is_file()
            except (OSError, ValueError):  # a name that no system takes
                there = False
            if not there:
                raise UserError(f"{path:.200} does not exist or is no file")
        return TargetFiles(supports=supports, masks=masks, class_id=self.class_id)

    def fingerprint(self) -> dict[str, object]:
        """Return what the target depends on: hashes of the files, and the class id."""
        hashes = {key: [sha256_of(Path(path)) for path in getattr(self, key)] for key in ("supports", "masks")}
        return {**hashes, "class_id": self.class_id}


def read_targets(path: Path) -> dict[str, TargetFiles]:
    """Read targets by name, in the file's order: ``dog: {supports: [a.jpg], masks: [a.png], class_id: 3}``.

    Paths are relative to the file; class_id may be left out.

    Raises:
        UserError: naming the file, the target and what is wrong.
    """
    values = read_yaml(path)
    if not 1 <= len(values) <= MAX_TARGETS:
        raise UserError(f"{path}: must name 1 to {MAX_TARGETS} targets, has {len(values)}")
    targets = {}
    for name, entry in values.items():
        try:
            targets[name] = TargetFiles.model_validate(entry).below(path.parent)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in (name, *problem["loc"]))
            raise UserError(f"{path}: {key}: {problem['msg'].lower()}") from error
        except UserError as error:
            raise UserError(f"{path}: {name}: {error}") from error
    return targets


def encode_target(segmenter: Segmenter[Any, T], files: TargetFiles) -> T:
    """Read and encode the supports one after the other.

    Raises:
        UserError: naming the file.
    """
    targets = []
    for support, mask in zip(files.supports, files.masks, strict=True):
        picture = read_picture(Path(support))
        values = read_mask_on(picture, Path(mask))
        try:
            targets.append(segmenter.encode(picture.pixels, values, files.class_id))
        except UserError as error:
            raise UserError(f"{mask}: {error}") from error
    return segmenter.join(targets)
