"""The generator of the synthetic data set."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.data import synthetic as generator
from util.data.class_index import read_list
from util.data.synthetic import CLASS_NAMES, generate

Pair = tuple[np.ndarray, np.ndarray]


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pairs(synthetic: Path) -> dict[str, list[Pair]]:
    """Images and masks of each list, read by Pillow alone."""
    return {
        split: [
            (np.asarray(Image.open(image)), np.asarray(Image.open(mask)))
            for image, mask, *_ in read_list(synthetic / f"lists/{split}.txt", synthetic)
        ]
        for split in ("train", "val")
    }


def classes_in(mask: np.ndarray) -> set[int]:
    return set(np.unique(mask).tolist()) - {0, 255}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 training and 4 validation images. Leave its files as they are."""
    root = tmp_path_factory.mktemp("small")
    assert generate(root, train=8, val=4) is True
    return root


def test_the_same_seed_gives_the_same_files_byte_for_byte(small: Path, tmp_path: Path) -> None:
    np.random.seed(1)
    generate(tmp_path, train=8, val=4)
    assert files(tmp_path) == files(small)
    assert len(files(small)) == 2 * 12 + 4


def test_an_image_does_not_depend_on_how_many_there_are(small: Path, synthetic: Path) -> None:
    for name in files(small):
        if name.endswith((".jpg", ".png")):
            assert (small / name).read_bytes() == (synthetic / name).read_bytes()


def test_the_layout_is_that_of_the_lineage(small: Path) -> None:
    assert (small / "classes.txt").read_text().split("\n") == [*CLASS_NAMES, ""]
    for split, count in (("train", 8), ("val", 4)):
        lines = (small / f"lists/{split}.txt").read_text().splitlines()
        assert lines == [
            f"JPEGImages/{split}_{number:05d}.jpg SegmentationClassAug/{split}_{number:05d}.png"
            for number in range(count)
        ]
    listed = {name for split in ("train", "val") for name in (small / f"lists/{split}.txt").read_text().split()}
    assert {name for name in files(small) if name.endswith((".jpg", ".png"))} == listed


def test_masks_are_palette_pngs_in_the_colours_of_pascal_voc(small: Path) -> None:
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0)}
    colours |= {15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    for path in (small / "SegmentationClassAug").iterdir():
        mask = Image.open(path)
        assert (mask.format, mask.mode) == ("PNG", "P")
        palette = mask.getpalette()
        assert all(tuple(palette[3 * value : 3 * value + 3]) == colour for value, colour in colours.items())


def test_every_image_shows_2_to_4_classes_and_no_other_values(pairs: dict[str, list[Pair]]) -> None:
    for _, mask in pairs["train"] + pairs["val"]:
        assert set(np.unique(mask).tolist()) <= {*range(21), 255}
        assert 2 <= len(classes_in(mask)) <= 4
        assert (mask == 0).mean() > 0.2


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_class_occurs_as_often_as_every_other(split: str, pairs: dict[str, list[Pair]]) -> None:
    masks = [mask for _, mask in pairs[split]]
    run = len(generator.DECK_SIZES)
    for start in range(0, len(masks) - run + 1, run):
        shown = Counter(itertools.chain(*(classes_in(mask) for mask in masks[start : start + run])))
        assert shown == dict.fromkeys(range(1, 21), 1), "each run of so many images shows each class once"
    total = Counter(itertools.chain(*map(classes_in, masks)))
    assert max(total.values()) - min(total.values()) <= 1


def test_objects_are_large_enough_to_qualify(pairs: dict[str, list[Pair]]) -> None:
    """At the min_area of the synthetic config, 1024."""
    areas = [int((mask == c).sum()) for _, mask in pairs["train"] + pairs["val"] for c in classes_in(mask)]
    assert np.mean(np.array(areas) >= 1024) > 0.95


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_ignored_border_parts_everything_from_everything(split: str, pairs: dict[str, list[Pair]]) -> None:
    for _, mask in pairs[split]:
        for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[1:, 1:], mask[:-1, :-1])):
            assert not ((a != b) & (a != 255) & (b != 255)).any()
        share = (mask == 255).mean()
        assert 0.005 < share < 0.15, "a border, not an area"


def test_an_object_is_placed_where_the_others_stay_in_view() -> None:
    """Each keeps 70 % of its own pixels, whatever is laid over it."""
    owner = np.zeros((90, 120), np.uint8)
    owner[10:30, 10:30], owner[30:50, 40:70] = 1, 2
    alpha = np.ones((35, 35))
    places = set()
    for seed in range(40):
        window = generator.place(np.random.default_rng(seed), alpha, owner, [400, 600])
        assert window is not None
        places.add((window[0].start, window[1].start))
        covered = owner.copy()
        covered[window] = 0
        assert covered[window].shape == (35, 35)
        assert (covered == 1).sum() >= 0.7 * 400
        assert (covered == 2).sum() >= 0.7 * 600
    assert len(places) > 30


def test_an_object_that_would_hide_another_or_does_not_fit_gets_no_place() -> None:
    owner = np.zeros((60, 80), np.uint8)
    owner[20:40, 30:50] = 1
    rng = np.random.default_rng(0)
    assert generator.place(rng, np.ones((58, 78)), owner, [400]) is None
    assert generator.place(rng, np.ones((61, 20)), owner, [400]) is None
    half_hidden = owner.copy()
    half_hidden[20:32, 30:50] = 0
    assert generator.place(rng, np.ones((2, 2)), half_hidden, [400]) is None, "40 % in view before"


# ---------------------------------------------------------------- calling it again


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*")}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    generate(tmp_path, train=3, val=2)
    return tmp_path


def test_a_second_call_does_nothing(made: Path) -> None:
    before = snapshot(made)
    assert generate(made, train=3, val=2) is False
    assert snapshot(made) == before


@pytest.mark.parametrize("lost", ["SegmentationClassAug/val_00000.png", "lists/val.txt"])
def test_a_lost_file_is_written_again(lost: str, made: Path) -> None:
    before = files(made)
    (made / lost).unlink()
    assert generate(made, train=3, val=2) is True
    assert files(made) == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"train": 4}])
def test_other_parameters_are_noticed(change: dict[str, int], made: Path, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    parameters = {"train": 3, "val": 2, "seed": 0, **change}
    assert generate(made, **parameters) is True
    fresh = tmp_path_factory.mktemp("fresh")
    generate(fresh, **parameters)
    expected = files(fresh)
    assert {name: content for name, content in files(made).items() if name in expected} == expected


def test_an_older_version_is_noticed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "VERSION", generator.VERSION + 1)
    assert generate(made, train=3, val=2) is True
    assert json.loads((made / "generator.json").read_text())["version"] == generator.VERSION


def test_an_interrupted_change_of_parameters_is_not_taken_for_complete(made: Path) -> None:
    """Half of the images are of the new seed then: the old record must not vouch for them."""

    def interrupted(items: list[tuple[str, int]]):  # type: ignore[no-untyped-def]
        yield from items[:2]
        raise KeyboardInterrupt

    before = files(made)
    with pytest.raises(KeyboardInterrupt):
        generate(made, train=3, val=2, seed=1, progress=interrupted)
    assert generate(made, train=3, val=2) is True
    assert files(made) == before
