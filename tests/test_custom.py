"""make_lists.py on a folder of images and one of masks; tests/test_readme.py continues to a prediction."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from scripts import make_lists
from tests.harness import ROOT, call, process, refused, succeeded
from tests.scenes import write_pair
from util.config import load_config


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """data/mine as in README: 20 images, two of four classes in each."""
    root = tmp_path / "data/mine"
    for n in range(20):
        write_pair(root, f"{n + 1:03}", 1 + n % 4, 1 + (n + 1) % 4)
    return root


def command(root: Path) -> list[object]:
    return ["--root", root, "--images", root / "images", "--masks", root / "masks", "--out", root / "lists"]


def written_lists(root: Path) -> tuple[list[str], list[str]]:
    train, val = ((root / "lists" / f"{name}.txt").read_text().splitlines() for name in ("train", "val"))
    return train, val


def lists(root: Path, *options: object) -> tuple[list[str], list[str]]:
    """Lines of train.txt and val.txt."""
    succeeded(call(make_lists, *command(root), *options))
    return written_lists(root)


def test_lists_hold_every_pair_once_relative_to_the_root(mine: Path) -> None:
    succeeded(process(ROOT / "scripts/make_lists.py", *command(mine), cwd=mine))
    train, val = written_lists(mine)
    assert sorted(train + val) == [f"images/{n:03}.jpg masks/{n:03}.png" for n in range(1, 21)]
    assert lists(mine) == (train, val)
    assert lists(mine, "--seed", "1") != (train, val)


def written(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / f"lists/{root.name}.yaml").read_text())


def test_the_config_fits_the_one_that_explains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: Path) -> None:
    monkeypatch.chdir(tmp_path)
    lists(Path("data/mine"))
    shipped, found = yaml.safe_load((ROOT / "configs/custom.yaml").read_text()), written(mine)
    assert (mine / "lists" / found.pop("base")).resolve() == ROOT / "configs/custom.yaml"
    for section, values in found.items():
        for key in values.keys() - {"scale", "min_area"}:  # they depend on the images' size
            assert shipped[section][key] == values[key], key
    low, high = found["data"]["scale"]
    assert (low + high) / 2 * 72 == pytest.approx(321, abs=1), "images have the size that they are evaluated at"


def test_an_existing_config_is_not_changed(mine: Path) -> None:
    (mine / "lists").mkdir()
    (mine / "lists/mine.yaml").write_text("seed: 3\n")
    assert "mine.yaml exists and was not changed" in succeeded(call(make_lists, *command(mine))).out
    assert (mine / "lists/mine.yaml").read_text() == "seed: 3\n"


@pytest.mark.parametrize("images", [9, 40, 720, 9000])
def test_the_config_takes_600_steps_and_at_most_four_validations_whatever_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    for n in range(12):
        write_pair(tmp_path / "mine", f"{n:03}", 1 + n % 3)
    config_for = make_lists.config_for
    many = np.full((images, 3), 2048)  # pixels of each class
    monkeypatch.setattr(make_lists, "config_for", lambda *given: config_for(*given[:-1], many))
    lists(tmp_path / "mine")
    config = load_config(tmp_path / "mine/lists/mine.yaml")
    _, epochs, steps = config.train.schedule(images)
    assert steps == 600 and math.ceil(epochs / config.eval.every) == min(4, epochs)
    assert config.data.min_area == round(0.005 * 64 * 72)


def test_every_class_is_in_both_lists_twice_if_it_has_four_images() -> None:
    rng = np.random.default_rng(0)
    for trial in range(30):
        present = rng.random((60, 8)) < rng.uniform(0.02, 0.3, 8)
        present[:4, 0], present[4:, 0] = True, False  # exactly four
        present[:4, 1:] = False
        in_val = make_lists.split(present, 0.2, list(rng.permutation(60)))
        train, val = present[~in_val].sum(0), present[in_val].sum(0)
        assert (train[0], val[0]) == (2, 2)
        assert (train >= np.minimum(present.sum(0), 2) - (present.sum(0) < 4)).all(), trial
        assert in_val.mean() < 0.6


def test_files_without_a_partner_are_named_and_left_out(mine: Path) -> None:
    (mine / "masks/003.png").unlink()
    (mine / "images/005.jpg").unlink()
    out = succeeded(call(make_lists, *command(mine))).out
    train, val = written_lists(mine)
    assert len(train + val) == 18
    assert f"no mask: {mine / 'images/003.jpg'}" in out and f"no image: {mine / 'masks/005.png'}" in out


def test_names_come_from_a_file(mine: Path) -> None:
    names = mine / "names.txt"
    names.write_text("cat\ndog\nyes\ncoffee cup\n")
    lists(mine, "--classes", names)
    assert written(mine)["data"]["classes"] == ["cat", "dog", "yes", "coffee cup"]
    names.write_text("cat\ndog\n")
    refused(call(make_lists, *command(mine), "--classes", names), "must hold 4 different names")


def other_names(folder: Path, name: str) -> None:
    for path in folder.iterdir():
        path.rename(path.with_stem(path.stem + name))


def in_one_folder(root: Path, ending: str) -> None:
    other_names(root / "masks", ending)
    shutil.copytree(root / "masks", root / "images", dirs_exist_ok=True)
    shutil.rmtree(root / "masks")
    (root / "masks").symlink_to("images")


def as_pngs(root: Path) -> None:
    for path in (root / "images").glob("*.jpg"):
        Image.open(path).convert("L").save(path.with_suffix(".png"))
        path.unlink()


PAIRS: dict[str, Callable[[Path], object]] = {
    "ending": lambda at: other_names(at / "masks", "_segmentation"),
    "one folder of PNGs": lambda at: as_pngs(at) or in_one_folder(at, "_mask"),
    "capitals": lambda at: [path.rename(path.with_suffix(".PNG")) for path in (at / "masks").iterdir()],
    "composed": lambda at: other_names(at / "images", "\u00fc") or other_names(at / "masks", "u\u0308_MASK"),
    "hidden": lambda at: [write_pair(at, f"{hidden}/001", 6) for hidden in (".ipynb_checkpoints", "__MACOSX")],
}


@pytest.mark.parametrize("names", PAIRS)
def test_pairs_are_found_by_name(mine: Path, names: str) -> None:
    PAIRS[names](mine)
    train, val = lists(mine)
    pairs = [line.split() for line in train + val]
    assert len({path for pair in pairs for path in pair}) == 40
    assert all(Path(image).name[:3] == Path(mask).name[:3] for image, mask in pairs)


def made_masks_are_right(root: Path, names: list[str], *options: object) -> None:
    """Made masks are those of ``masks``, whose classes 1, 2, ... are named c1, c2, ..., with the order of ``names``."""
    out = succeeded(call(make_lists, "--root", root, "--out", root / "lists", *options)).out
    assert f"2 images of '{names[0]}' in the validation list give 2 distinct 1-shot episodes" in out
    data = written(root)["data"]
    assert data["classes"] == names and data["left_out"] == ["no"]
    assert data["folds"] == [[name] for name in names if name != "no"]
    train, val = written_lists(root)
    assert len(train + val) == 20
    new_ids = np.array([0, *(names.index(f"c{n}") + 1 for n in range(1, 5))])
    for image, mask in map(str.split, train + val):
        given, made = np.array(Image.open(root / f"masks/{Path(image).stem}.png")), np.array(Image.open(root / mask))
        np.testing.assert_array_equal(made, new_ids[given])


def map_values(root: Path, values: list[Any], to: Path) -> None:
    to.mkdir(exist_ok=True)
    for path in (root / "masks").iterdir():
        Image.fromarray(np.array(values, np.uint8)[np.array(Image.open(path))]).save(to / path.name)


LABELMAP = "# label:color_rgb:parts\nc4:9,9,8::\nbackground:0,0,0::\nno:9,9,9::\nc2:9,0,0::\nc1:1,1,1::\nc3:0,0,9::"


def test_colours_become_class_ids(mine: Path) -> None:
    (mine / "labels.txt").write_text(LABELMAP)
    map_values(mine, [(0, 0, 0), (1, 1, 1), (9, 0, 0), (0, 0, 9), (9, 9, 8)], mine / "shown")
    options = ["--images", mine / "images", "--masks", mine / "shown", "--colours", mine / "labels.txt"]
    made_masks_are_right(mine, ["c4", "no", "c2", "c1", "c3"], *options)
    (mine / "labels.txt").write_text(LABELMAP.replace("c2:9", "c2:8"))
    refused(call(make_lists, *command(mine), *options), "--colours has no line", "[9, 0, 0]")


def test_a_json_in_the_format_of_coco_becomes_class_ids(mine: Path) -> None:
    """Ids from 0 on, a category that no image shows, polygons and uncompressed runs, Windows' paths, no iscrowd."""
    categories = {0: "c2", 1: "no", 3: "c4", 5: "c1", 6: "c3"}
    data: dict[str, list[Any]] = {"images": [], "annotations": []}
    data["categories"] = [{"id": number, "name": name} for number, name in categories.items()][::-1]
    for number, path in enumerate((mine / "masks").iterdir()):
        mask = np.array(Image.open(path))
        data["images"].append({"id": number, "file_name": f"images\\{path.stem}.jpg", "height": 64, "width": 72})
        for category, name in categories.items():
            here = mask == int(name.replace("no", "c9")[1:])
            if here.any():
                (y0, x0), (y1, x1) = np.argwhere(here).min(0).tolist(), (np.argwhere(here).max(0) + 1).tolist()
                runs = np.diff(np.flatnonzero(np.diff(here.T.ravel(), prepend=False)), prepend=0, append=64 * 72)
                code, polygon = {"size": [64, 72], "counts": runs.tolist()}, [[x0, y0, x1, y0, x1, y1, x0, y1]]
                entry = {"image_id": number, "category_id": category, "segmentation": code if number % 2 else polygon}
                data["annotations"].append({"id": len(data["annotations"]), **entry})
    (mine / "own.json").write_text(json.dumps(data))
    made_masks_are_right(mine, ["c2", "no", "c4", "c1", "c3"], "--coco", mine / "own.json")


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "space": (lambda at: other_names(at / "images", " x") or other_names(at / "masks", " x"), "has a space .* rename"),
    "colour": (
        lambda at: Image.new("RGB", (72, 64), "red").save(at / "masks/001.png"),
        r"001.png is coloured: \(255, 0, 0\); .*--colours ",
    ),
    "one class": (
        lambda at: [write_pair(at, f"{n:03}", 1) for n in range(1, 21)],
        "001.png, are white on black: one class, .* predict.py needs no training",
    ),
    "a few of another kind": (
        lambda at: [Image.new("L", (72, 64)).save(at / f"masks/00{n}.png", "JPEG") for n in range(1, 7)],
        "001.png is a JPEG, which blurs class ids; save masks as PNG; also 002.jpg, 003.jpg, .*, 006.jpg$",
    ),
    "gaps": (lambda at: write_pair(at, "021", 6), "hold 1, 2, 3, 4, 6; renumber them: --colours FILE"),
    "same stem": (
        lambda at: Image.new("RGB", (72, 64)).save(at / "images/001.png"),
        "001.jpg and .* have the same name",
    ),
    "no partners": (
        lambda at: (at / "masks").rename(at / "m") and (at / "masks/x").mkdir(parents=True),
        "see .*001.jpg",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_with_the_remedy(mine: Path, mistake: str) -> None:
    spoil, words = MISTAKES[mistake]
    spoil(mine)
    assert re.search(words, refused(call(make_lists, *command(mine))))
    assert list((mine / "lists").iterdir()) == []
