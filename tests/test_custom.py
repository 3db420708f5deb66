"""What make_lists.py makes of two folders; tests/test_readme.py goes on from there to a prediction."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from scenes import ROOT, write_pair

from scripts import make_lists
from util.config import load_config
from util.engine.build import build_index, build_train_sampler
from util.errors import UserError


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """data/mine as README says: 20 pictures, two of four classes in each."""
    root = tmp_path / "data/mine"
    for n in range(20):
        write_pair(root, f"{n + 1:03}", 1 + n % 4, 1 + (n + 1) % 4)
    return root


def lists(monkeypatch: pytest.MonkeyPatch, root: Path, *options: str) -> tuple[list[str], list[str]]:
    """Lines of train.txt and val.txt."""
    places = ["--root", root, "--images", root / "images", "--masks", root / "masks", "--out", root / "lists"]
    monkeypatch.setattr(sys, "argv", ["make_lists.py", *map(str, places), *options])
    make_lists.main()
    train, val = ((root / "lists" / f"{name}.txt").read_text().splitlines() for name in ("train", "val"))
    return train, val


def test_lists_hold_every_pair_once_relative_to_the_root(mine: Path, monkeypatch) -> None:
    train, val = lists(monkeypatch, mine)
    assert sorted(train + val) == [f"images/{n:03}.jpg masks/{n:03}.png" for n in range(1, 21)]
    assert lists(monkeypatch, mine) == (train, val)
    assert lists(monkeypatch, mine, "--seed", "1") != (train, val)


def written(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / f"lists/{root.name}.yaml").read_text())


def test_scale_brings_pictures_to_the_size_they_are_evaluated_at(mine: Path, monkeypatch) -> None:
    lists(monkeypatch, mine)
    low, high = written(mine)["data"]["scale"]
    assert (low + high) / 2 * 72 == pytest.approx(321, abs=1)


def test_the_config_of_these_pictures_says_what_the_shipped_one_explains(tmp_path, monkeypatch, mine) -> None:
    monkeypatch.chdir(tmp_path)
    lists(monkeypatch, Path("data/mine"))
    shipped, found = yaml.safe_load((ROOT / "configs/custom.yaml").read_text()), written(mine)
    assert (mine / "lists" / found.pop("base")).resolve() == ROOT / "configs/custom.yaml"
    for section, values in found.items():
        for key in values.keys() - {"scale", "min_area"}:  # they go with the pictures' size
            assert shipped[section][key] == values[key], key


def test_a_config_that_was_changed_is_left_as_it_is(mine: Path, monkeypatch, capsys) -> None:
    lists(monkeypatch, mine)
    path = mine / "lists/mine.yaml"
    text = path.read_text()
    lists(monkeypatch, mine)
    assert "left as it is" not in capsys.readouterr().out
    path.write_text(f"{text}seed: 3\n")
    lists(monkeypatch, mine)
    assert path.read_text() == f"{text}seed: 3\n"
    assert f"left as it is; for these lists it could say:\n\n{text}" in capsys.readouterr().out


@pytest.mark.parametrize("count", [12, 40])
def test_the_config_takes_enough_steps_whatever_the_data(tmp_path: Path, monkeypatch, count: int) -> None:
    for n in range(count):
        write_pair(tmp_path / "mine", f"{n:03}", 1 + n % 3)
    lists(monkeypatch, tmp_path / "mine")
    config = load_config(tmp_path / "mine/lists/mine.yaml")
    images = len(build_train_sampler(config, build_index(config, "train")))
    steps = max(1, images // config.train.batch_size) * config.train.epochs
    assert 600 <= steps < 700
    assert 4 <= config.train.epochs // config.eval.every <= 5
    assert config.data.min_area == round(0.005 * 64 * 72)


def test_the_table_counts_images_and_pixels_of_each_class_in_both_lists(mine: Path, monkeypatch, capsys) -> None:
    both = lists(monkeypatch, mine)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for c in range(1, 5):
        expected = []
        for lines in both:
            counts = [int((np.array(Image.open(mine / line.split()[1])) == c).sum()) for line in lines]
            expected += [str(sum(count > 0 for count in counts)), str(sum(counts))]
        assert [str(c), f"class_{c}", *expected] in rows


def test_every_class_is_in_both_lists_twice_where_there_are_four_images_of_it() -> None:
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


def test_files_without_a_partner_are_named_and_left_out(mine: Path, monkeypatch, capsys) -> None:
    (mine / "masks/003.png").unlink()
    (mine / "images/005.jpg").unlink()
    train, val = lists(monkeypatch, mine)
    assert len(train + val) == 18
    out = capsys.readouterr().out
    assert f"no mask: {mine / 'images/003.jpg'}" in out and f"no image: {mine / 'masks/005.png'}" in out


def test_names_come_from_a_file(mine: Path, monkeypatch) -> None:
    names = mine / "names.txt"
    names.write_text("cat\ndog\nyes\ncoffee cup\n")
    lists(monkeypatch, mine, "--classes", str(names))
    assert written(mine)["data"]["classes"] == ["cat", "dog", "yes", "coffee cup"]


def replaced(path: Path, values: dict[int, int]) -> None:
    mask = np.array(Image.open(path))
    Image.fromarray(np.vectorize(lambda v: values.get(v, v), otypes=[np.uint8])(mask)).save(path)


def with_space(root: Path) -> None:
    for path in (root / "images/001.jpg", root / "masks/001.png"):
        path.rename(path.with_stem("my picture"))


def coloured(root: Path) -> None:
    Image.open(root / "masks/001.png").convert("RGB").save(root / "masks/001.png")


def other_size(root: Path) -> None:
    Image.open(root / "masks/002.png").resize((30, 30)).save(root / "masks/002.png")


def only_255(root: Path) -> None:
    for path in (root / "masks").iterdir():
        replaced(path, {1: 255, 2: 255, 3: 255, 4: 255})


def with_gaps(root: Path) -> None:
    for path in (root / "masks").iterdir():
        replaced(path, {2: 7, 4: 38})


def same_stem(root: Path) -> None:
    Image.new("RGB", (72, 64)).save(root / "images/001.png")


def no_partners(root: Path) -> None:
    for path in (root / "masks").iterdir():
        path.rename(path.with_stem(path.stem + "_mask"))


def no_pictures(root: Path) -> None:
    for path in (root / "images").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (with_space, "my picture.jpg.* has a space .* rename"),
        (coloured, "001.png has mode RGB"),
        (other_size, "002.jpg is 72x64 but mask .*002.png is 30x30"),
        (only_255, "nothing but 0 .background. and 255"),
        (with_gaps, r"\[1, 3, 7, 38\]; write 3 as 2, 7 as 3, 38 as 4"),
        (same_stem, "001.jpg and .*001.png have the same name"),
        (no_partners, "has a mask of the same name"),
        (no_pictures, "holds no pictures"),
    ],
)
def test_what_no_list_can_be_made_of_is_refused_with_the_remedy(mine: Path, monkeypatch, spoil, words) -> None:
    spoil(mine)
    with pytest.raises(UserError, match=words):
        lists(monkeypatch, mine)
    assert list((mine / "lists").iterdir()) == []


def test_folders_beside_the_root_and_wrong_names_are_refused(mine: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="not below --root"):
        lists(monkeypatch, mine, "--root", str(mine / "images"))
    names = mine / "names.txt"
    names.write_text("cat\ndog\n")
    with pytest.raises(UserError, match="must hold 4 different names"):
        lists(monkeypatch, mine, "--classes", str(names))
    with pytest.raises(UserError, match="--val must lie between 0 and 1"):
        lists(monkeypatch, mine, "--val", "1")
