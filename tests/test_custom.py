"""make_lists.py on a folder of images and one of masks; tests/test_readme.py continues to a prediction."""

import math
import re
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


def test_the_table_counts_the_images_of_each_class_in_both_lists(mine: Path) -> None:
    rows = [line.split() for line in succeeded(call(make_lists, *command(mine))).out.splitlines()]
    both = written_lists(mine)
    for c in range(1, 5):
        expected = [sum(c in np.array(Image.open(mine / line.split()[1])) for line in lines) for lines in both]
        assert [f"class_{c}", *map(str, expected)] in rows


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


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "space": (lambda at: other_names(at / "images", " x") or other_names(at / "masks", " x"), "has a space .* rename"),
    "colour": (lambda at: Image.new("RGB", (72, 64)).save(at / "masks/001.png"), "001.png has mode RGB"),
    "other size": (
        lambda at: Image.new("L", (30, 30)).save(at / "masks/002.png"),
        "002.jpg is 72x64 but mask .* 30x30",
    ),
    "gaps": (lambda at: write_pair(at, "021", 6), r"\[1, 2, 3, 4, 6\]; renumber them"),
    "same stem": (
        lambda at: Image.new("RGB", (72, 64)).save(at / "images/001.png"),
        "001.jpg and .* have the same name",
    ),
    "no partners": (lambda at: other_names(at / "masks", "_mask"), "has a mask of the same name"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_with_the_remedy(mine: Path, mistake: str) -> None:
    spoil, words = MISTAKES[mistake]
    spoil(mine)
    assert re.search(words, refused(call(make_lists, *command(mine))))
    assert list((mine / "lists").iterdir()) == []
