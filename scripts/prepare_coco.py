"""COCO-20i from the official COCO 2014: python scripts/prepare_coco.py --root COCO2014 --out data/coco

COCO2014 holds the unpacked train2014.zip, val2014.zip and annotations_trainval2014.zip of
https://cocodataset.org/#download: train2014/, val2014/ and annotations/instances_{train,val}2014.json. This writes

  OUT/{train,val}2014              a symbolic link to the folder of images
  OUT/annotations/{train,val}2014  one palette PNG for each image with at least one instance annotation, crowd or not
  LISTS/{train,val}.txt            a line 'image mask' for each of them, sorted; written last

Values are 0 background, 1-80 the categories in the order of their ids (which run to 90, with gaps), 255 ignored.
Overlaps: crowd regions (iscrowd = 1) are painted first, with 255; then the other instances by decreasing area in
pixels, equal areas by ascending annotation id. So a smaller instance covers a larger one, and every instance covers
crowds. Polygons of fewer than 3 points cover nothing.

After an interruption the same command continues: masks that are newer than the annotations are kept.
"""

import argparse
import json
import re
import sys
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
import yaml
from pycocotools import mask as coco_mask

from util.data.images import encoded_mask
from util.data.pool import on_all_cores
from util.errors import UserError, first_of
from util.files import write_bytes, write_text

EXPECTED = {"train": 82081, "val": 40137}
"""images with at least one annotation, of 82783 and 40504"""
NAMES = Path(__file__).resolve().parent.parent / "configs/base/coco.yaml"
OUT, LISTS = Path("data/coco"), Path("lists/coco")
NEXT = "python scripts/check_data.py --config configs/coco/resnet50_fold0_1shot.yaml"
AGAIN = "unpack annotations_trainval2014.zip from https://cocodataset.org/#download again"
IGNORED = 255
IMAGE = re.compile(r"[\w-]+\.jpg")
"""names of images become names of masks, which must stay in their folder"""


class Shape(NamedTuple):
    """One annotation."""

    annotation: int
    value: int
    segmentation: Any


class Job(NamedTuple):
    """One image with all that a worker needs for its mask."""

    name: str
    height: int
    width: int
    shapes: list[Shape]

    @property
    def mask(self) -> str:
        return f"{Path(self.name).stem}.png"


def compact(entry: dict[str, Any]) -> dict[str, Any]:
    """Turn the polygons of a JSON object into arrays, which take a quarter of the memory."""
    if isinstance(entry.get("segmentation"), list):
        entry["segmentation"] = [array("d", part) for part in entry["segmentation"]]
    return entry


def class_ids(categories: list[dict[str, Any]], path: Path) -> dict[int, int]:
    """Category id -> 1 ... 80; a UserError if the categories are not those of the configs, in their order."""
    categories = sorted(categories, key=lambda category: category["id"])
    found = [str(category["name"]) for category in categories]
    wanted = yaml.safe_load(NAMES.read_text(encoding="utf-8"))["data"]["classes"]
    if found != wanted:
        missing = ", ".join(name for name in wanted if name not in found) or "none"
        unknown = ", ".join(name for name in found if name not in wanted) or "none"
        raise UserError(
            f"{path}: its categories, by id, are not the {len(wanted)} of {NAMES}; missing: {missing};"
            f" unknown: {unknown}; {AGAIN}"
        )
    return {category["id"]: number for number, category in enumerate(categories, 1)}


def read_jobs(path: Path) -> list[Job]:
    """The annotated images of an annotation file, by name.

    Raises:
        UserError: a damaged file, other categories, or an annotation of an unknown image or category.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_hook=compact)
        ids = class_ids(data["categories"], path)
        jobs = {image["id"]: Job(image["file_name"], image["height"], image["width"], []) for image in data["images"]}
        if strange := [job.name for job in jobs.values() if not IMAGE.fullmatch(job.name)]:
            raise ValueError(f"an image is named {strange[0]!r:.50}")
        for entry in data["annotations"]:
            if entry["image_id"] not in jobs or entry["category_id"] not in ids:
                raise UserError(
                    f"{path}: annotation {entry['id']} is of image {entry['image_id']} and category"
                    f" {entry['category_id']}, and one of these is not in the file; {AGAIN}"
                )
            value = IGNORED if entry["iscrowd"] else ids[entry["category_id"]]
            jobs[entry["image_id"]].shapes.append(Shape(entry["id"], value, entry["segmentation"]))
        return sorted((job for job in jobs.values() if job.shapes), key=lambda job: job.name)
    except (ValueError, KeyError, TypeError) as error:  # ValueError: damaged JSON too
        raise UserError(f"{path} is damaged or no instances file ({error!r:.200}); {AGAIN}") from error


def choose(jobs: list[Job], split: str, path: Path, folder: Path, limit: int | None) -> list[Job]:
    """All annotated images, or with a limit as many of those whose files exist.

    Raises:
        UserError: without a limit, their number is not the official one or files are missing; with one, all are.
    """
    if limit is None and len(jobs) != EXPECTED[split]:
        raise UserError(f"{path}: expected {EXPECTED[split]} images with annotations, found {len(jobs)}; {AGAIN}")
    present = {file.name for file in folder.iterdir()}
    missing = [job.name for job in jobs if job.name not in present]
    if limit is not None:
        if len(missing) == len(jobs):
            raise UserError(f"{folder} holds none of the images of {path}; unpack {folder.name}.zip")
        return [job for job in jobs if job.name in present][:limit]
    if missing:
        raise UserError(
            f"{folder}: expected {len(jobs)} annotated images, found {len(jobs) - len(missing)};"
            f" missing: {first_of(missing, separator=', ')}; unpack {folder.name}.zip again, or give --limit"
            f" {len(jobs)} to prepare those that are there"
        )
    return jobs


def cover(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return the pixels (H, W), bool, of polygons or of a run-length code, compressed or not."""
    code = segmentation
    if isinstance(segmentation, list):
        parts = [np.asarray(part) for part in segmentation if len(part) >= 6]  # pycocotools takes 4 numbers for a box
        if not parts:
            return np.zeros((height, width), bool)
        code = coco_mask.merge(coco_mask.frPyObjects(parts, height, width))
    elif isinstance(segmentation["counts"], list):
        if sum(segmentation["counts"]) != height * width:
            raise ValueError(f"its runs do not fill the image of {width} x {height}")
        code = coco_mask.frPyObjects(segmentation, height, width)
    if list(code["size"]) != [height, width]:
        raise ValueError(f"its size is not that of the image of {width} x {height}")
    return coco_mask.decode(code).astype(bool)


def paint(job: Job, path: Path) -> np.ndarray:
    """Paint the mask (H, W), uint8, of an image, by the overlap rule."""
    layers = []
    for shape in job.shapes:
        try:
            covered = cover(shape.segmentation, job.height, job.width)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: annotation {shape.annotation} of image {job.name} cannot be drawn: {error}; {AGAIN}"
            ) from error
        layers.append((shape.value != IGNORED, -int(covered.sum()), shape.annotation, shape.value, covered))
    mask = np.zeros((job.height, job.width), np.uint8)
    for *_, value, covered in sorted(layers, key=lambda layer: layer[:3]):
        mask[covered] = value
    return mask


def make_mask(job: Job, *, path: Path, folder: Path) -> bool:
    """Write the mask of an image to ``folder``; False if one that is newer than the annotations exists."""
    target = folder / job.mask
    if target.exists() and target.stat().st_mtime >= path.stat().st_mtime:
        return False
    write_bytes(target, encoded_mask(paint(job, path)), force=False)
    return True


def prepare_split(split: str, root: Path, out: Path, limit: int | None) -> list[Job]:
    """Make the masks of a split and the link to its images."""
    year = f"{split}2014"
    path, folder, link = root / f"annotations/instances_{year}.json", out / "annotations" / year, out / year
    jobs = choose(read_jobs(path), split, path, root / year, limit)
    folder.mkdir(parents=True, exist_ok=True)
    if not (link.exists() and link.samefile(root / year)):
        if link.is_symlink():  # to where the images were before
            link.unlink()
        link.symlink_to((root / year).resolve(), target_is_directory=True)
    made = sum(on_all_cores(partial(make_mask, path=path, folder=folder), jobs, f"{split} masks", unit="mask"))
    print(f"{split}: {len(jobs)} images, {made} masks made, {len(jobs) - made} kept")
    return jobs


def prepare(root: Path, out: Path, lists: Path, limit: int | None) -> dict[str, Path]:
    """Make the masks of both splits, then their lists, which are returned."""
    for split in EXPECTED:
        for needed in (root / f"{split}2014", root / f"annotations/instances_{split}2014.json"):
            if not needed.exists():
                raise UserError(f"{needed} does not exist; --root is the folder the three COCO 2014 zips unpack to")
    lists.mkdir(parents=True, exist_ok=True)
    texts, paths = {}, {}
    for split in EXPECTED:
        jobs, year = prepare_split(split, root, out, limit), f"{split}2014"
        paths[split] = lists / (f"{split}.txt" if limit is None else f"{split}_part{len(jobs)}.txt")
        texts[split] = "".join(f"{year}/{job.name} annotations/{year}/{job.mask}\n" for job in jobs)
    for split, text in texts.items():
        write_text(paths[split], text)
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with the official files, unpacked")
    parser.add_argument("--out", type=Path, default=OUT, help=f"data.root of the configs (default: {OUT})")
    parser.add_argument("--lists", type=Path, default=LISTS, help=f"folder of the lists (default: {LISTS})")
    parser.add_argument("--limit", type=int, metavar="N", help="prepare a part, at most N images a split")
    args = parser.parse_args(arguments)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    try:
        paths = prepare(args.root, args.out, args.lists, args.limit)
    except OSError as error:
        name, reason = error.filename2 or error.filename or args.out, error.strerror or error
        raise UserError(f"{name}: {reason}; check its permissions and the free space, or --out and --lists") from error
    overrides = "" if args.out == OUT else f" data.root={args.out}"
    if args.lists != LISTS or args.limit is not None:
        overrides += "".join(f" data.{split}_list={path}" for split, path in paths.items())
    overrides += "" if args.limit is None else " data.dataset=COCO-20i-part"
    print(f"next: {NEXT}{overrides}")


if __name__ == "__main__":
    run_command(main)
