"""The generator of the synthetic data set."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from scripts import make_synthetic
from tests.harness import call, contents, process, succeeded
from util.data import synthetic as generator
from util.data.class_index import read_list
from util.data.synthetic import CLASS_NAMES, generate


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def masks(synthetic: Path) -> dict[str, list[np.ndarray]]:
    """The masks of each list, read by Pillow alone."""
    return {
        split: [np.asarray(Image.open(item.mask)) for item in read_list(synthetic / f"lists/{split}.txt", synthetic)]
        for split in ("train", "val")
    }


def classes_in(mask: np.ndarray) -> set[int]:
    return set(np.unique(mask).tolist()) - {0, 255}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 training and 4 validation images. Do not change its files."""
    root = tmp_path_factory.mktemp("small")
    assert generate(root, train=8, val=4) is True
    return root


def test_the_command_writes_the_same_files_byte_for_byte(small: Path, synthetic: Path, tmp_path: Path) -> None:
    done = succeeded(process("scripts/make_synthetic.py", "--out", tmp_path, "--train", "8", "--val", "4"))
    assert "8 training and 4 validation images of 20 classes" in done.out
    assert files(tmp_path) == files(small)
    assert len(files(small)) == 2 * 12 + 4
    for name in files(small):
        if name.endswith((".jpg", ".png")):  # an image does not depend on how many there are
            assert (small / name).read_bytes() == (synthetic / name).read_bytes()


def test_the_data_set_does_not_change(small: Path) -> None:
    """README's results are of these data. Another OpenCV or processor may round a few pixels differently."""
    expected = {
        "train_00000": {0: 9657, 5: 3863, 19: 4041, 255: 1616},
        "train_00007": {0: 8975, 6: 2501, 15: 2325, 18: 2710, 255: 1545},
        "val_00003": {0: 11077, 4: 1672, 5: 1784, 6: 1845, 255: 1430},
    }
    for name, counts in expected.items():
        mask = np.asarray(Image.open(small / f"SegmentationClassAug/{name}.png"))
        assert {value: int((mask == value).sum()) for value in np.unique(mask).tolist()} == pytest.approx(
            counts, rel=0.01
        )


def test_the_layout_is_that_of_pfenet(small: Path) -> None:
    assert (small / "classes.txt").read_text().split("\n") == [*CLASS_NAMES, ""]
    for split, count in (("train", 8), ("val", 4)):
        lines = (small / f"lists/{split}.txt").read_text().splitlines()
        assert lines == [
            f"JPEGImages/{split}_{number:05d}.jpg SegmentationClassAug/{split}_{number:05d}.png"
            for number in range(count)
        ]
    for path in (small / "SegmentationClassAug").iterdir():
        mask = Image.open(path)
        assert (mask.format, mask.mode) == ("PNG", "P")


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_class_occurs_equally_often(split: str, masks: dict[str, list[np.ndarray]]) -> None:
    run = len(generator.LARGE.deck)
    for start in range(0, len(masks[split]) - run + 1, run):
        shown = Counter(itertools.chain(*(classes_in(mask) for mask in masks[split][start : start + run])))
        assert shown == dict.fromkeys(range(1, 21), 1), "each run of so many images shows each class once"


def test_objects_are_large_enough_to_qualify_and_have_an_ignored_border(masks: dict[str, list[np.ndarray]]) -> None:
    both = masks["train"] + masks["val"]
    areas = [int((mask == c).sum()) for mask in both for c in classes_in(mask)]
    assert np.mean(np.array(areas) >= 1024) > 0.95, "min_area of the synthetic config"
    for mask in both:
        assert classes_in(mask) <= set(range(1, 21)) and (mask == 0).mean() > 0.2
        for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[1:, 1:], mask[:-1, :-1])):
            assert not ((a != b) & (a != 255) & (b != 255)).any()
        assert 0.005 < (mask == 255).mean() < 0.15, "a border, not an area"


# ---------------------------------------------------------------- the kind with small objects


def test_small_objects_are_many_and_some_are_attached(tmp_path: Path) -> None:
    assert generate(tmp_path, train=12, val=6, small=True) is True
    masks = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "SegmentationClassAug").iterdir())]
    shown = [classes_in(mask) for mask in masks]
    for start in range(0, len(masks), 3):
        assert Counter(itertools.chain(*shown[start : start + 3])) == dict.fromkeys(range(1, 21), 1)
    assert all(5 <= len(classes) <= 8 for classes in shown)
    shares = [float((mask == c).mean()) for mask, classes in zip(masks, shown, strict=True) for c in classes]
    assert min(shares) > 0.005 and max(shares) < 0.06, "0.005: min_area of the config"
    assert np.mean([0.015 < share < 0.05 for share in shares]) > 0.8
    touching = 0
    for mask, classes in zip(masks, shown, strict=True):
        for c in classes:
            near = cv2.dilate((mask == c).astype(np.uint8), np.ones((7, 7), np.uint8)) > 0  # over an ignored border
            touching += len(classes_in(mask[near])) > 1
    assert 0.3 < touching / len(shares) < 0.95


def test_small_objects_are_the_same_on_every_call_and_recorded(tmp_path: Path) -> None:
    succeeded(call(make_synthetic, "--small", "--train", 4, "--val", 2, "--out", tmp_path / "a"))
    assert generate(tmp_path / "a", train=4, val=2, small=True) is False
    assert generate(tmp_path / "b", train=5, val=2, small=True) is True
    images = {name: data for name, data in files(tmp_path / "a").items() if name.endswith((".jpg", ".png"))}
    assert len(images) == 12 and images.items() <= files(tmp_path / "b").items()
    assert generate(tmp_path / "a", train=4, val=2) is True, "the other kind is not taken for this one"


# ---------------------------------------------------------------- calling it again


@pytest.fixture
def made(tmp_path: Path) -> Path:
    generate(tmp_path, train=3, val=2)
    return tmp_path


def test_a_second_call_does_nothing_unless_a_file_is_lost_or_parameters_differ(made: Path) -> None:
    before, times = files(made), contents(made)
    assert generate(made, train=3, val=2) is False
    assert contents(made) == times
    (made / "SegmentationClassAug/val_00000.png").unlink()
    assert generate(made, train=3, val=2) is True
    assert files(made) == before
    assert generate(made, train=3, val=2, seed=1) is True
    assert all((files(made)[name] != data) == name.endswith((".jpg", ".png", ".json")) for name, data in before.items())


def test_an_interrupted_change_of_parameters_is_not_taken_for_complete(made: Path) -> None:
    """Half of the images are of the new seed then: the old record must not say that they are complete."""

    def interrupted(items: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
        yield from items[:2]
        raise KeyboardInterrupt

    before = files(made)
    with pytest.raises(KeyboardInterrupt):
        generate(made, train=3, val=2, seed=1, progress=interrupted)
    assert generate(made, train=3, val=2) is True
    assert files(made) == before
