"""COCO-20i from the official COCO 2014: python scripts/prepare_coco.py --root COCO2014 --out data/coco

COCO2014 holds the unpacked train2014.zip, val2014.zip and annotations_trainval2014.zip of
https://cocodataset.org/#download: train2014/, val2014/ and annotations/instances_{train,val}2014.json. This writes

  OUT/{train,val}2014              a symbolic link to the folder of images, or a copy if the file system has no links
  OUT/annotations/{train,val}2014  one palette PNG for each image with at least one instance annotation, crowd or not
  lists/coco/{train,val}.txt       a line 'image mask' for each of them, sorted

Values are 0 background, 1-80 the categories in the order of their ids (which run to 90, with gaps), 255 ignored.
Overlaps: crowds are painted first, with 255; then the other instances by decreasing area in pixels, equal areas by
ascending annotation id. Polygons of fewer than 3 points cover nothing.

After an interruption the same command continues: masks that are newer than the annotations are kept.
"""

import argparse
import json
import re
import sys
from array import array
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
import yaml
from pycocotools import mask as coco_mask

from model import IGNORE
from util.data.images import MAX_PIXELS, encoded_mask
from util.data.pool import on_all_cores
from util.errors import UserError, first_of
from util.files import link_or_copy, write_bytes, write_text

EXPECTED = {"train": 82081, "val": 40137}  # images with at least one annotation, of 82783 and 40504
CLASSES = Path(__file__).resolve().parent.parent / "configs/base/coco.yaml"
OUT, LISTS = Path("data/coco"), Path("lists/coco")
AGAIN = "unpack or export the annotations again"
IMAGE = re.compile(r"[\w-]+\.jpg")  # names of images become names of masks, which must stay in their folder


class Job(NamedTuple):
    """One image with all that a worker needs for its mask."""

    name: str
    height: int
    width: int
    shapes: list[tuple[int, int, Any]]  # annotation id, mask value and segmentation

    @property
    def mask(self) -> str:
        return f"{Path(self.name).stem}.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with the official files, unpacked")
    parser.add_argument("--out", type=Path, default=OUT, help=f"data.root of the configs (default: {OUT})")
    args = parser.parse_args()
    for split in EXPECTED:
        for needed in (args.root / f"{split}2014", args.root / f"annotations/instances_{split}2014.json"):
            if not needed.exists():
                raise UserError(f"{needed} does not exist; --root is the folder the three COCO 2014 zips unpack to")
    for split in EXPECTED:
        prepare_split(split, args.root, args.out)
    overrides = "" if args.out == OUT else f" data.root={args.out}"
    print(f"next: python scripts/check_data.py --config configs/coco/resnet50_fold0_1shot.yaml{overrides}")


def prepare_split(split: str, root: Path, out: Path) -> None:
    """Make the masks of a split, the link to its images, and its list."""
    year = f"{split}2014"
    path, folder, link = root / f"annotations/instances_{year}.json", out / "annotations" / year, out / year
    jobs = read_jobs(path)
    if len(jobs) != EXPECTED[split]:
        raise UserError(f"{path}: expected {EXPECTED[split]} images with annotations, found {len(jobs)}; {AGAIN}")
    present = {file.name for file in (root / year).iterdir()}
    if missing := [job.name for job in jobs if job.name not in present]:
        raise UserError(
            f"{root / year}: {len(missing)} of {len(jobs)} annotated images are missing:"
            f" {first_of(missing, separator=', ')}; unpack {year}.zip again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not (link.exists() and link.samefile(root / year)):
        if link.is_symlink():
            link.unlink()  # it links to where the images were before
        link_or_copy(root / year, link)
    made = sum(on_all_cores(partial(make_mask, path=path, folder=folder), jobs, f"{split} masks", unit="mask"))
    print(f"{split}: {len(jobs)} images, {made} masks made, {len(jobs) - made} kept")
    LISTS.mkdir(parents=True, exist_ok=True)
    lines = (f"{year}/{job.name} annotations/{year}/{job.mask}\n" for job in jobs)
    write_text(LISTS / f"{split}.txt", "".join(lines))


def read_jobs(path: Path) -> list[Job]:
    """The annotated images of one of COCO's annotation files, by name."""
    _, jobs = read_instances(path, yaml.safe_load(CLASSES.read_text())["data"]["classes"])
    if strange := [job.name for job in jobs if not IMAGE.fullmatch(job.name)]:
        raise UserError(f"{path} is damaged, an image is named {strange[0]!r:.50}; {AGAIN}")
    return jobs


def read_instances(path: Path, classes: list[str] | None = None) -> tuple[list[str], list[Job]]:
    """The names of the categories, in the order of their ids, and the annotated images, by name."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_hook=compact)
        categories = sorted(data["categories"], key=lambda category: category["id"])
        names = [category["name"] for category in categories]
        if names != (classes or names):
            raise UserError(f"{path}: its categories, by id, are not the classes of {CLASSES}; {AGAIN}")
        ids = {category["id"]: number for number, category in enumerate(categories, 1)}
        jobs = {}
        for image in data["images"]:
            number, height, width = numbers(image, "id", "height", "width")
            if not 0 < height * width <= MAX_PIXELS:
                raise ValueError(f"image {number} is {width}x{height}")
            jobs[number] = Job(image["file_name"], height, width, [])
        for entry in data["annotations"]:
            number, image, category, crowd = numbers({"iscrowd": 0} | entry, "id", "image_id", "category_id", "iscrowd")
            value = (ids[category], IGNORE)[crowd]
            jobs[image].shapes.append((number, value, entry["segmentation"]))
        return names, sorted((job for job in jobs.values() if job.shapes), key=lambda job: job.name)
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:  # ValueError: damaged JSON too
        raise UserError(f"{path} is damaged or no instances file ({error!r:.200}); {AGAIN}") from error


def numbers(entry: dict[str, Any], *keys: str) -> list[int]:
    """Return the values of keys, which must be whole numbers from 0 on."""
    values = [entry[key] for key in keys]
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{', '.join(keys)} are {values}")
    return values


def compact(entry: dict[str, Any]) -> dict[str, Any]:
    """Turn the polygons of a JSON object into arrays, which take a quarter of the memory."""
    if isinstance(entry.get("segmentation"), list):
        entry["segmentation"] = [array("d", part) for part in entry["segmentation"]]
    return entry


def make_mask(job: Job, *, path: Path, folder: Path) -> bool:
    """Write the mask of an image to ``folder``; False if one that is newer than the annotations exists."""
    target = folder / job.mask
    if target.exists() and target.stat().st_mtime >= path.stat().st_mtime:
        return False
    write_bytes(target, encoded_mask(paint(job)), force=False)
    return True


def paint(job: Job, path: Path | None = None) -> np.ndarray:
    """Paint the mask (H, W), uint8, of an image, by the overlap rule; ``path`` is that of the JSON, read before."""
    layers = []
    for annotation, value, segmentation in job.shapes:
        try:
            covered = cover(segmentation, job.height, job.width)
        except Exception as error:  # pycocotools raises many kinds
            raise UserError(f"annotation {annotation} of {job.name} is damaged ({error!r:.100}); {AGAIN}") from error
        layers.append((value != IGNORE, -int(covered.sum()), annotation, value, covered))
    mask = np.zeros((job.height, job.width), np.uint8)
    for *_, value, covered in sorted(layers, key=lambda layer: layer[:3]):
        mask[covered] = value
    return mask


def cover(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return the pixels (H, W), bool, of polygons or of a run-length code, compressed or not."""
    if isinstance(segmentation, list):
        parts = [np.asarray(part) for part in segmentation if len(part) >= 6]  # pycocotools takes 4 numbers for a box
        if any(len(part) % 2 or not (abs(part) < 1e6).all() for part in parts):
            raise ValueError("a polygon must be pairs of finite numbers")
        if not parts:
            return np.zeros((height, width), bool)
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, height, width))).astype(bool)
    runs = segmentation["counts"]
    if segmentation["size"] != [height, width]:
        raise ValueError(f"a run-length code has the size {segmentation['size']}")
    if isinstance(runs, list):
        if any(type(run) is not int or run < 0 for run in runs) or sum(runs) != height * width:
            raise ValueError("run lengths must be whole numbers whose sum is the image's size")
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    mask = coco_mask.decode(segmentation)
    if isinstance(runs, str) and coco_mask.encode(mask)["counts"] != runs.encode():
        raise ValueError("a compressed run-length code is damaged")
    return mask.astype(bool)


if __name__ == "__main__":
    run_command(main)
