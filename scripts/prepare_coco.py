"""COCO-20i from the official COCO 2014: python scripts/prepare_coco.py --root COCO2014 --out data/coco

COCO2014 holds what train2014.zip, val2014.zip and annotations_trainval2014.zip (https://cocodataset.org/#download)
unpack to: train2014/, val2014/ and annotations/instances_{train,val}2014.json. Written are

  OUT/{train,val}2014              a symbolic link to the folder of images; hard links where that is refused
  OUT/annotations/{train,val}2014  one palette PNG for each image with at least one instance annotation, crowd or not
  LISTS/{train,val}.txt            a line 'image mask' for each of them, sorted; written last

Values are 0 background, 1-80 the categories in the order of their ids (which run to 90, with gaps), 255 ignored.
Overlaps: crowd regions (iscrowd = 1) are painted first, with 255; then the other instances by decreasing area in
pixels, equal areas by ascending annotation id. So a smaller instance lies on top of a larger one, and every
instance on top of a crowd. Polygons of fewer than 3 points cover nothing.

Interrupted, the same command continues: a mask is renamed to its name when complete, and made again only when it
cannot be read, has another size, or is older than the annotations.
"""

import argparse
import contextlib
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
from PIL import Image
from pycocotools import mask as coco_mask
from tabulate import tabulate

from util.data.images import encoded, read_class_ids
from util.data.pool import on_all_cores
from util.data.synthetic import voc_palette
from util.errors import UserError, first_of
from util.files import write_bytes, write_text

EXPECTED = {"train": 82081, "val": 40137}
"""images with at least one annotation, of 82783 and 40504"""
NAMES = Path(__file__).resolve().parent.parent / "configs/base/coco.yaml"
OUT, LISTS = Path("data/coco"), Path("lists/coco")
OVERLAPS = "crowds first, as 255; then instances by decreasing area, so that the smaller lies on top"
NEXT = "python scripts/check_data.py --config configs/coco/resnet50_fold0_1shot.yaml"
AGAIN = "unpack annotations_trainval2014.zip from https://cocodataset.org/#download again"
IGNORED = 255
FAR = 10
"""image sides from the corner: a polygon that reaches so far is damaged, and drawing it would take the memory"""
IMAGE = re.compile(r"[\w-]+\.jpg")
"""names become names of masks: a file can name nothing outside its folder"""
PALETTE = voc_palette()


class Shape(NamedTuple):
    """One annotation: what it paints where."""

    annotation: int
    value: int
    segmentation: Any


class Job(NamedTuple):
    """One image: all that a worker needs for its mask."""

    name: str
    height: int
    width: int
    shapes: list[Shape]

    @property
    def mask(self) -> str:
        return f"{Path(self.name).stem}.png"


class Done(NamedTuple):
    """What became of one mask, or of many."""

    made: int
    kept: int
    ignored: int
    pixels: int


def compact(entry: dict[str, Any]) -> dict[str, Any]:
    """Turn the polygons of a JSON object into arrays, which take a quarter of the memory."""
    if isinstance(entry.get("segmentation"), list):
        entry["segmentation"] = [array("d", part) for part in entry["segmentation"]]
    return entry


def class_ids(categories: list[dict[str, Any]], path: Path) -> dict[int, int]:
    """Category id -> 1 ... 80.

    Raises:
        UserError: the categories are not those of the configs, in their order.
    """
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
    """The images of an annotation file that have annotations, by name.

    Raises:
        UserError: a damaged file, other categories, or an annotation of an image or category that is not there.
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
    """All annotated images, or with a limit as many of those that are there.

    Raises:
        UserError: without a limit, they are not as many as expected or not all there as files; with one, none is.
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
    """Return the pixels (H, W), bool, of polygons or of a run-length code, compressed or not.

    Raises:
        ValueError: a polygon holds NaN or lies far outside the image, or the runs do not fill the image.
    """
    if isinstance(segmentation, list):
        parts = [np.asarray(part) for part in segmentation if len(part) >= 6]  # pycocotools takes 4 numbers for a box
        if not parts:
            return np.zeros((height, width), bool)
        if not all((np.abs(part) < FAR * max(height, width)).all() for part in parts):
            raise ValueError(f"a polygon lies far outside the image of {width} x {height}")
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, height, width))).astype(bool)
    counts = segmentation["counts"]  # where the runs end too early, pycocotools leaves the rest as it lay in memory
    if isinstance(counts, list):
        pixels = coco_mask.decode(coco_mask.frPyObjects(segmentation, height, width))
        filled = sum(counts) == height * width
    else:
        pixels = coco_mask.decode(segmentation)
        filled = coco_mask.encode(pixels)["counts"].decode() == counts
    if segmentation["size"] != [height, width] or not filled:
        raise ValueError(f"its runs do not fill the image of {width} x {height}")
    return pixels.astype(bool)


def paint(job: Job, path: Path) -> np.ndarray:
    """Paint the mask (H, W), uint8, of an image, by the overlap rule."""
    layers = []
    for shape in job.shapes:
        try:
            covered = cover(shape.segmentation, job.height, job.width).reshape(job.height, job.width)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: annotation {shape.annotation} of image {job.name} cannot be drawn: {error}; {AGAIN}"
            ) from error
        layers.append((shape.value != IGNORED, -int(covered.sum()), shape.annotation, shape.value, covered))
    mask = np.zeros((job.height, job.width), np.uint8)
    for *_, value, covered in sorted(layers, key=lambda layer: layer[:3]):
        mask[covered] = value
    return mask


def finished_mask(path: Path, job: Job, stamp: float) -> np.ndarray | None:
    """The mask of an earlier run, if there is a sound one not older than `stamp`."""
    try:
        mask = read_class_ids(path) if path.stat().st_mtime >= stamp else None
    except (OSError, UserError):
        return None
    return mask if mask is not None and mask.shape == (job.height, job.width) else None


def make_mask(job: Job, *, path: Path, folder: Path, stamp: float) -> Done:
    """Write the mask of an image below `folder`, unless it is there; `path`, of time `stamp`, has its annotations."""
    target = folder / job.mask
    mask = finished_mask(target, job, stamp)
    kept = mask is not None
    if mask is None:
        mask = paint(job, path)
        image = Image.fromarray(mask)
        image.putpalette(PALETTE)
        write_bytes(target, encoded(image, "PNG"), force=False)
    return Done(int(not kept), int(kept), int((mask == IGNORED).sum()), mask.size)


def make_masks(jobs: list[Job], split: str, path: Path, folder: Path) -> Done:
    """All masks of a split, with all cores."""
    make = partial(make_mask, path=path, folder=folder, stamp=path.stat().st_mtime)
    return Done(*np.sum(on_all_cores(make, jobs, f"{split} masks", unit="mask"), axis=0).tolist())


def link_images(source: Path, target: Path) -> None:
    """Make `target` show the images of the folder `source`."""
    if target.exists() and target.samefile(source):
        return
    if target.is_symlink():  # to where the images were before
        target.unlink(missing_ok=True)
    if not target.exists():
        with contextlib.suppress(OSError, NotImplementedError):
            target.symlink_to(source.resolve(), target_is_directory=True)
            return
    target.mkdir(exist_ok=True)
    for image in source.iterdir():
        with contextlib.suppress(FileExistsError):
            (target / image.name).hardlink_to(image)


def prepare_split(split: str, root: Path, out: Path, limit: int | None) -> tuple[Done, str]:
    """Masks and link of a split, and the text of its list."""
    year = f"{split}2014"
    path, folder = root / f"annotations/instances_{year}.json", out / "annotations" / year
    folder.mkdir(parents=True, exist_ok=True)
    jobs = choose(read_jobs(path), split, path, root / year, limit)
    link_images(root / year, out / year)
    text = "".join(f"{year}/{job.name} annotations/{year}/{job.mask}\n" for job in jobs)
    return make_masks(jobs, split, path, folder), text


def prepare(root: Path, out: Path, lists: Path, limit: int | None) -> dict[str, tuple[Path, Done]]:
    """Both splits, one after the other in memory, then the lists; where each is, and what became of its masks."""
    for split in EXPECTED:
        for there in (root / f"{split}2014", root / f"annotations/instances_{split}2014.json"):
            if not there.exists():
                raise UserError(f"{there} does not exist; --root is the folder the three COCO 2014 zips unpack to")
    lists.mkdir(parents=True, exist_ok=True)
    results = {}
    for split, (done, text) in {split: prepare_split(split, root, out, limit) for split in EXPECTED}.items():
        path = lists / (f"{split}.txt" if limit is None else f"{split}_part{done.made + done.kept}.txt")
        write_text(path, text)
        results[split] = (path, done)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, prepare, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with the official files, unpacked")
    parser.add_argument("--out", type=Path, default=OUT, help=f"data.root of the configs (default: {OUT})")
    parser.add_argument("--lists", type=Path, default=LISTS, help=f"folder of the lists (default: {LISTS})")
    parser.add_argument("--limit", type=int, metavar="N", help="prepare a part, at most N images a split")
    args = parser.parse_args(arguments)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    try:
        results = prepare(args.root, args.out, args.lists, args.limit)
    except OSError as error:
        place, reason = error.filename2 or error.filename or args.out, error.strerror or error
        raise UserError(f"{place}: {reason}; check its permissions and the free space, or --out and --lists") from error
    rows = [
        [split, done.made + done.kept, done.made, done.kept, f"{done.ignored / done.pixels:.2%}"]
        for split, (_, done) in results.items()
    ]
    print(tabulate(rows, ["split", "images", "made", "kept", "255 pixels"], tablefmt="plain"))
    overrides = "" if args.out == OUT else f" data.root={args.out}"
    if args.lists != LISTS or args.limit is not None:
        overrides += "".join(f" data.{split}_list={path}" for split, (path, _) in results.items())
    overrides += "" if args.limit is None else " data.dataset=COCO-20i-part"
    print(f"overlaps: {OVERLAPS}\nnext: {NEXT}{overrides}")


if __name__ == "__main__":
    run_command(main)
