"""scripts/prepare_coco.py on a tiny tree in the official layout. Shapes are rectangles, drawn here by slicing."""

from util.command import run_command

import json
import os
import re
import subprocess
import sys
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
from util.data.class_index import load_class_index, read_list
from util.data.images import read_class_ids

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
ROOT = Path(__file__).resolve().parent.parent
NAMES = yaml.safe_load((ROOT / "configs/base/coco.yaml").read_text())["data"]["classes"]
IDS = [number for number in range(1, 91) if number not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]
HEIGHT, WIDTH = 30, 40
TINY = {"train": 4, "val": 1}  # images with annotations
Run = Callable[..., tuple[int, str, str]]


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
def run(coco: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command on the tiny tree, in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(prepare_coco, "EXPECTED", TINY)
    monkeypatch.chdir(coco.parent)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: prepare_coco.main(["--root", "COCO2014", *arguments]))
        captured = capsys.readouterr()
        return int(str(exit_.value.code)), captured.out, captured.err

    return call


def made(out: Path) -> dict[str, np.ndarray]:
    return {path.stem: read_class_ids(path) for path in out.glob("annotations/*2014/*.png")}


def same(masks: dict[str, np.ndarray]) -> bool:
    return masks.keys() == wanted().keys() and all(np.array_equal(masks[key], wanted()[key]) for key in masks)


def counts(out: str) -> tuple[int, ...]:
    """Images, masks made and masks kept of the training split, as printed."""
    return tuple(map(int, re.findall(r"\d+", out.splitlines()[0])))


def edit(coco: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((path := coco / "annotations/instances_train2014.json").read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_masks_and_lists(coco: Path, run: Run) -> None:
    code, out, _ = run()
    assert code == 0 and same(made(Path("data/coco")))
    with Image.open(f"data/coco/annotations/train2014/{name('train', 9)}.png") as mask:
        assert mask.mode == "P" and mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    for split, images in (("train", (9, 25, 30, 34)), ("val", (7,))):
        lines = [f"{split}2014/{name(split, i)}.jpg annotations/{split}2014/{name(split, i)}.png" for i in images]
        path = Path(f"lists/coco/{split}.txt")
        assert path.read_text() == "".join(f"{line}\n" for line in lines)
        assert len(read_list(path, Path("data/coco"))) == TINY[split]
        load_class_index(path, Path("data/coco"), 80, progress=False)  # images and masks exist and have one size
    assert out.splitlines()[:2] == ["train: 4 images, 4 masks made, 0 kept", "val: 1 images, 1 masks made, 0 kept"]
    assert out.endswith("next: python scripts/check_data.py --config configs/coco/resnet50_fold0_1shot.yaml\n")


def test_continues_and_keeps_what_is_finished(coco: Path, run: Run) -> None:
    run()
    masks = sorted(Path("data/coco/annotations/train2014").iterdir())
    before = [path.stat().st_mtime_ns for path in masks]
    assert counts(run()[1]) == (4, 0, 4)
    assert [path.stat().st_mtime_ns for path in masks] == before
    masks[0].rename(f"{masks[0]}.tmp")
    Path(f"{masks[0]}.tmp").write_bytes(b"half")
    masks[1].unlink()
    assert counts(run()[1]) == (4, 2, 2)
    assert same(made(Path("data/coco"))) and sorted(Path("data/coco/annotations/train2014").iterdir()) == masks
    assert [path.stat().st_mtime_ns for path in masks[2:]] == before[2:]
    late = time.time() + 10
    os.utime(coco / "annotations/instances_train2014.json", (late, late))  # another file of annotations
    assert counts(run()[1]) == (4, 4, 0)


def test_lists_wait_for_both_splits_and_name_missing_images(coco: Path, run: Run) -> None:
    image = coco / f"val2014/{name('val', 7)}.jpg"
    image.unlink()
    code, _, err = run("--out", "o", "--lists", "l")
    assert code == 2 and "expected 1 annotated images, found 0" in err and image.name in err and "val2014.zip" in err
    assert len(made(Path("o"))) == 4 and not list(Path("l").iterdir())
    Image.new("RGB", (WIDTH, HEIGHT)).save(image)
    code, out, _ = run("--out", "o", "--lists", "l")
    assert code == 0 and counts(out) == (4, 0, 4) and len(list(Path("l").iterdir())) == 2
    assert out.endswith(" data.root=o data.train_list=l/train.txt data.val_list=l/val.txt\n")


def test_a_part_has_a_name_that_says_so(coco: Path, run: Run) -> None:
    missing = coco / f"train2014/{name('train', 9)}.jpg"
    missing.unlink()
    assert "--limit 4 to prepare those that are there" in run()[2]
    assert not Path("lists/coco").exists() or not list(Path("lists/coco").iterdir())
    for limit, images in ((4, (25, 30, 34)), (2, (25, 30))):
        code, out, _ = run("--limit", str(limit))
        assert code == 0
        listed = read_list(Path(f"lists/coco/train_part{len(images)}.txt"), Path("data/coco"))
        assert [item.image.stem for item in listed] == [name("train", image) for image in images]
        lists = f"data.train_list=lists/coco/train_part{len(images)}.txt data.val_list=lists/coco/val_part1.txt"
        assert out.endswith(f" {lists} data.dataset=COCO-20i-part\n")
    assert all(np.array_equal(mask, wanted()[key]) for key, mask in made(Path("data/coco")).items())
    assert not Path("lists/coco/train.txt").exists()
    Image.new("RGB", (WIDTH, HEIGHT)).save(missing)
    assert counts(run()[1]) == (4, 1, 3)
    assert "--limit must be at least 1" in run("--limit", "0")[2]
    for image in (coco / "val2014").iterdir():
        image.unlink()
    assert "val2014 holds none of the images" in run("--limit", "1")[2]


def test_as_a_process(coco: Path, tmp_path: Path) -> None:
    script = str(ROOT / "scripts/prepare_coco.py")
    arguments = ["--root", str(coco), "--out", str(tmp_path / "o"), "--lists", str(tmp_path / "l")]
    real = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert real.returncode == 2 and "expected 82081 images with annotations, found 4" in real.stderr
    assert real.stderr.count("\n") == 1 and not list((tmp_path / "l").iterdir())
    pooled = (
        "from scripts import prepare_coco as p; from util.data import pool; pool.WORTH_PROCESSES = 1;"
        f" p.EXPECTED = {TINY}; p.main({arguments})"
    )
    done = subprocess.run([sys.executable, "-c", pooled], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert same(made(tmp_path / "o"))


def test_categories_by_name(coco: Path, run: Run) -> None:
    edit(coco, lambda data: data["categories"].pop(1))
    code, _, err = run()
    assert code == 2 and "missing: hair drier; unknown: none" in err and err.count("\n") == 1
    edit(coco, lambda data: data["categories"].insert(1, {"id": 89, "name": "hair dryer"}))
    assert "missing: hair drier; unknown: hair dryer" in run()[2]


SIZE = [HEIGHT, WIDTH]
BAD_SHAPES: list[Any] = [
    {"size": SIZE, "counts": None},
    {"size": SIZE, "counts": [3, 2]},
    {"size": SIZE, "counts": [HEIGHT * WIDTH + 1]},
    {"size": SIZE[::-1], "counts": [HEIGHT * WIDTH]},
    {"size": [HEIGHT + 1, WIDTH], "counts": CODE},
]
BAD = [({"segmentation": shape}, "annotation 31 .*cannot be drawn") for shape in BAD_SHAPES]
BAD += [({"category_id": 12}, "annotation 31 .*category 12,"), ({"image_id": 1}, "annotation 31 .*image 1 ")]
BAD += [({"segmentation": ["x"]}, "is damaged")]


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_bad_annotations_end_in_one_line(coco: Path, run: Run, change: dict[str, Any], reason: str) -> None:
    edit(coco, lambda data: data["annotations"][6].update(change))
    code, _, err = run()
    last = err.splitlines()[-1]  # the progress bar's line is before it
    assert code == 2 and "Traceback" not in err and err.count("error: ") == 1
    assert re.match(f"error: COCO2014/annotations/instances_train2014.json:? {reason}", last), err


def test_missing_damaged_and_unwritable_files_end_in_one_line(coco: Path, run: Run) -> None:
    Path("file").touch()
    code, _, err = run("--out", "file/o")
    assert code == 2 and "file/o" in err and "permissions" in err and err.count("\n") == 1
    path = coco / "annotations/instances_train2014.json"
    for text in (path.read_text()[:500], "{}", "[]"):
        path.write_text(text)
        code, _, err = run()
        assert code == 2 and f"{path.name} is damaged" in err and prepare_coco.AGAIN in err and err.count("\n") == 1
    path.unlink()
    code, _, err = run()
    assert code == 2 and f"{path.name} does not exist" in err and err.count("\n") == 1
