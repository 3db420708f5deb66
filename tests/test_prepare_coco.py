"""scripts/prepare_coco.py on a tiny tree in the official layout. Shapes are rectangles, drawn here by slicing."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

from scripts import prepare_coco
from tests.harness import ROOT, Result, call, process, refused, succeeded
from util.data.class_index import load_class_index
from util.data.images import read_class_ids

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
NAMES = yaml.safe_load((ROOT / "configs/base/coco.yaml").read_text())["data"]["classes"]
IDS = [number for number in range(1, 91) if number not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]
HEIGHT, WIDTH = 30, 40
TINY = {"train": 4, "val": 1}  # images with annotations
Run = Callable[..., Result]


def name(split: str, image: int) -> str:
    return f"COCO_{split}2014_{image:012d}"


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def polygon(x0: int, y0: int, x1: int, y1: int) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def runs(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed run-length code: columns first, zeros first."""
    pixels = mask.T.ravel()
    ends = [*np.flatnonzero(np.diff(pixels, prepend=0)).tolist(), len(pixels)]
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(ends, prepend=0).tolist()}


def annotation(number: int, image: int, category: int, segmentation: Any, crowd: int = 0) -> dict[str, Any]:
    keys = ("id", "image_id", "category_id", "segmentation", "iscrowd", "area", "bbox")
    return dict(zip(keys, (number, image, category, segmentation, crowd, 1.0, [0, 0, 1, 1]), strict=True))


CODE = coco_mask.encode(np.asfortranarray(box(3, 4, 13, 24)))["counts"].decode()
TRAIN = [
    annotation(11, 9, 18, [polygon(5, 5, 10, 10)]),  # the smaller is first in the file, and on top
    annotation(12, 9, 1, [polygon(2, 2, 20, 20)]),
    annotation(14, 9, 3, [polygon(30, 10, 36, 16)]),  # equal areas: the higher id is on top
    annotation(13, 9, 2, [polygon(27, 10, 33, 16)]),
    annotation(21, 25, 90, [polygon(1, 1, 9, 9), polygon(12, 1, 39, 29)]),  # larger than the crowd, yet on top
    annotation(22, 25, 1, runs(box(5, 0, 15, 30)), crowd=1),
    annotation(31, 30, 84, {"size": [HEIGHT, WIDTH], "counts": CODE}),
    annotation(41, 34, 17, [[3, 3, 30, 20]]),  # pycocotools would take this for a box
    annotation(42, 34, 17, [[5, 5, 20, 5, 5, 5]]),
    annotation(43, 34, 17, []),
    annotation(44, 34, 88, [[1, 1, 2, 2], polygon(2, 3, 4, 5)]),
]
VAL = [annotation(51, 7, 44, [polygon(0, 0, 40, 30)]), annotation(52, 7, 1, runs(box(0, 0, 5, 5)), crowd=1)]


def wanted() -> dict[str, np.ndarray]:
    """Masks by hand, painted with slices in the documented order."""
    masks = {image: np.zeros((HEIGHT, WIDTH), np.uint8) for image in (9, 25, 30, 34, 7)}
    masks[9][2:20, 2:20] = 1
    masks[9][5:10, 5:10] = 17
    masks[9][10:16, 27:33] = 2
    masks[9][10:16, 30:36] = 3
    masks[25][:, 5:15] = 255
    masks[25][1:9, 1:9] = masks[25][1:29, 12:39] = 80
    masks[30][4:24, 3:13] = 74
    masks[34][3:5, 2:4] = 78
    masks[7][:] = 40
    return {name("val" if image == 7 else "train", image): mask for image, mask in masks.items()}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """The unpacked zips: 5 training images, one of them without annotations, and 2 validation images likewise."""
    root = tmp_path / "COCO2014"
    (root / "annotations").mkdir(parents=True)
    for split, images, annotations in (("train", (34, 9, 25, 30, 60), TRAIN), ("val", (7, 8), VAL)):
        (root / f"{split}2014").mkdir()
        for image in images:
            Image.new("RGB", (WIDTH, HEIGHT)).save(root / f"{split}2014" / f"{name(split, image)}.jpg")
        size = {"height": HEIGHT, "width": WIDTH}
        entries = [{"id": image, "file_name": f"{name(split, image)}.jpg", **size} for image in images]
        categories = [{"id": i, "name": n} for i, n in reversed(list(zip(IDS, NAMES, strict=True)))]
        text = {"info": {}, "images": entries, "annotations": annotations, "categories": categories, "licenses": []}
        (root / f"annotations/instances_{split}2014.json").write_text(json.dumps(text))
    return root


@pytest.fixture
def run(coco: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command on the tiny tree, in this process."""
    monkeypatch.setattr(prepare_coco, "EXPECTED", TINY)
    monkeypatch.chdir(coco.parent)
    return lambda *arguments: call(prepare_coco, "--root", "COCO2014", *arguments)


def made(out: Path) -> dict[str, np.ndarray]:
    return {path.stem: read_class_ids(path) for path in out.glob("annotations/*2014/*.png")}


def same(masks: dict[str, np.ndarray]) -> bool:
    return masks.keys() == wanted().keys() and all(np.array_equal(masks[key], wanted()[key]) for key in masks)


def test_masks_and_lists(coco: Path, run: Run) -> None:
    out = succeeded(run()).out
    assert same(made(Path("data/coco")))
    with Image.open(f"data/coco/annotations/train2014/{name('train', 9)}.png") as mask:
        assert mask.mode == "P" and mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    for split, images in (("train", (9, 25, 30, 34)), ("val", (7,))):
        lines = [f"{split}2014/{name(split, i)}.jpg annotations/{split}2014/{name(split, i)}.png" for i in images]
        path = Path(f"lists/coco/{split}.txt")
        assert path.read_text() == "".join(f"{line}\n" for line in lines)
        load_class_index(path, Path("data/coco"), 80, progress=False)  # images and masks exist and have one size
    assert out.splitlines()[:2] == ["train: 4 images, 4 masks made, 0 kept", "val: 1 images, 1 masks made, 0 kept"]
    assert out.endswith("next: python scripts/check_data.py --config configs/coco/resnet50_fold0_1shot.yaml\n")
    assert succeeded(run("--out", "o")).out.endswith(" data.root=o\n") and same(made(Path("o")))


def test_continues_and_keeps_what_is_finished(coco: Path, run: Run) -> None:
    annotations, now = coco / "annotations/instances_train2014.json", time.time()
    os.utime(annotations, (now - 1000, now - 1000))
    run()
    masks = sorted(Path("data/coco/annotations/train2014").iterdir())
    before = [path.stat().st_mtime_ns for path in masks]
    masks[0].unlink()
    assert run().out.startswith("train: 4 images, 1 masks made, 3 kept\n")
    assert [path.stat().st_mtime_ns for path in masks[1:]] == before[1:]
    assert same(made(Path("data/coco")))
    os.utime(annotations, (now + 1000, now + 1000))  # another file of annotations
    assert run().out.startswith("train: 4 images, 4 masks made, 0 kept\n")


def test_as_a_process_on_all_cores(coco: Path, tmp_path: Path) -> None:
    real = process(ROOT / "scripts/prepare_coco.py", "--root", coco, cwd=tmp_path)
    refused(real, "expected 82081 images with annotations, found 4")
    pooled = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = ['--root', {str(coco)!r}];"
        "from scripts import prepare_coco as p; from util.data import pool; pool.WORTH_PROCESSES = 1;"
        f" p.EXPECTED = {TINY}; p.main()"
    )
    succeeded(process("-c", pooled, cwd=tmp_path))
    assert same(made(tmp_path / "data/coco"))


def test_wrong_annotations_end_in_one_line(coco: Path, run: Run) -> None:
    path = coco / "annotations/instances_train2014.json"
    data = json.loads(path.read_text())
    mistakes = {"categories": "its categories, by id, are not the classes of", "images": "is damaged"}
    for key, reason in mistakes.items():
        path.write_text(json.dumps(data | {key: data[key][1:]}))
        refused(run(), path.name, reason, prepare_coco.AGAIN)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        *(("annotations", "iscrowd", value) for value in ("0", 2)),
        ("images", "height", 10**9),
        ("images", "file_name", "../evil.jpg"),
        *(("annotations", "segmentation", value) for value in (None, [[0.0, float("nan")] * 3])),
        *(("annotations", "counts", value) for value in ([1300, -100], [7, 5], "~")),
    ],
)
def test_a_value_of_another_kind_is_refused(place: str, key: str, value: Any, coco: Path, run: Run) -> None:
    path = coco / "annotations/instances_train2014.json"
    data = json.loads(path.read_text())
    code = {"segmentation": {"size": [HEIGHT, WIDTH], "counts": value}}
    data[place][0] |= code if key == "counts" else {key: value}
    path.write_text(json.dumps(data))
    refused(run(), "is damaged", prepare_coco.AGAIN)


def test_missing_and_damaged_files_end_in_one_line(coco: Path, run: Run) -> None:
    image, path = coco / f"val2014/{name('val', 7)}.jpg", coco / "annotations/instances_train2014.json"
    image.unlink()
    refused(run(), "val2014: 1 of 1 annotated images are missing", image.name, "val2014.zip")
    path.write_text(path.read_text()[:500])
    refused(run(), f"{path.name} is damaged", prepare_coco.AGAIN)
    path.unlink()
    refused(run(), f"{path.name} does not exist")
