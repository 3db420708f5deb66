"""Data of one folder for each class, such as FSS-1000: lists, index, episodes, and the real commands."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from scripts import make_lists
from tests.harness import ROOT, Result, call, process, refused, succeeded, test_command
from util.config import Config, load_config
from util.data.folds import base_classes, novel_classes
from util.data.readers import read_binary_mask
from util.engine.build import build_eval_sampler, build_index, build_train_sampler
from util.errors import UserError

CONFIG = ROOT / "configs/fss/resnet50_1shot.yaml"
IMAGES = 10


def write_folders(root: Path, names: list[str], side: int) -> None:
    """Ten images of each class with an RGB mask of 0 and 255: a square of side / 4 + the image's number."""
    first, *others = [root / name for name in names]
    for folder in (first, *others):
        folder.mkdir(parents=True)
    for n in range(1, IMAGES + 1):
        mask = np.zeros((side, side, 3), np.uint8)
        mask[2 : 2 + side // 4 + n, 2 : 2 + side // 4 + n] = 255
        image = np.where(mask > 0, 200, np.random.default_rng(n).integers(0, 120, mask.shape)).astype(np.uint8)
        for pixels, name in ((image, f"{n}.jpg"), (mask, f"{n}.png")):
            Image.fromarray(pixels).save(first / name)
            for folder in others:
                (folder / name).hardlink_to(first / name)


def lists_of(root: Path, out: Path) -> Result:
    return call(make_lists, "--root", root, "--out", out)


def overrides(root: Path, lists: Path) -> list[str]:
    return [
        f"data.root={root}",
        *(f"data.{split}_list={lists}/{split}.txt" for split in ("train", "val")),
        f"data.classes={lists}/classes.txt",
        f"data.base_classes={lists}/train_classes.txt",
        f"data.folds=[{lists}/val_classes.txt, {lists}/test_classes.txt]",
        "device=cpu",
    ]


def names_in(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture(scope="module")
def fss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Root and lists of 300 classes, more than a byte can number; 72 published test classes are among them."""
    folder = tmp_path_factory.mktemp("fss")
    root, lists = folder / "data", folder / "lists"
    published = names_in(ROOT / "lists/fss/test_classes.txt")[:72]
    write_folders(root, [*published, *(f"other_{n:03}" for n in range(228))], side=16)
    lists.mkdir()
    (lists / "test_classes.txt").write_text("".join(f"{name}\n" for name in published))
    succeeded(lists_of(root, lists))
    return root, lists


@pytest.fixture(scope="module")
def config(fss: tuple[Path, Path]) -> Config:
    return load_config(CONFIG, overrides(*fss))


def test_24_percent_of_the_classes_are_for_validation_and_24_for_test_as_published(
    fss: tuple[Path, Path], config: Config
) -> None:
    root, lists = fss
    parts = {part: names_in(lists / f"{part}_classes.txt") for part in ("train", "val", "test")}
    assert [len(names) for names in parts.values()] == [156, 72, 72]
    published = names_in(ROOT / "lists/fss/test_classes.txt")
    assert len(set(published)) == 240 and parts["test"] == published[:72]
    all_names = sorted(itertools.chain(*parts.values()))
    assert all_names == names_in(lists / "classes.txt") == sorted(p.name for p in root.iterdir())
    for fold, part in enumerate(("val", "test")):
        data = config.data.model_copy(update={"fold": fold})
        assert [data.classes[c - 1] for c in novel_classes(data)] == parts[part]
        assert [data.classes[c - 1] for c in base_classes(data)] == parts["train"]


def test_the_index_holds_one_class_an_image_and_its_pixels(config: Config) -> None:
    for split, lines in (("train", 1560), ("val", 1440)):
        index = build_index(config, split)
        assert index.pixels.shape == (lines, 301) and np.count_nonzero(index.pixels) == 2 * lines
        for line in range(0, lines, 37):
            item = index.items[line]
            area = (16 // 4 + int(item.image.stem)) ** 2
            class_id = config.data.classes.index(item.image.parent.name) + 1
            assert index.pixels[line, [0, class_id]].tolist() == [256 - area, area]
        again = build_index(config, split)  # from the cache
        assert np.array_equal(again.pixels, index.pixels) and again.items == index.items


def test_episodes_stay_within_a_folder_and_within_the_split(config: Config) -> None:
    test = config.model_copy(update={"data": config.data.model_copy(update={"fold": 1, "shots": 5})})
    sampler = build_eval_sampler(test, build_index(test, "val"), seed=0)
    trained = build_train_sampler(config, build_index(config, "train"))
    assert len(sampler) == 720 and len(trained) == 1560
    for source, numbers in ((sampler, range(720)), (trained, range(500))):
        allowed = novel_classes(test.data) if source is sampler else base_classes(config.data)
        for episode in map(source, numbers):
            items = [source.index.items[line] for line in (episode.query, *episode.supports)]
            assert {item.image.parent.name for item in items} == {config.data.classes[episode.class_id - 1]}
            assert len({item.image for item in items}) == 1 + source.shots
            assert episode.class_id in allowed
    assert len({sampler(n).query for n in range(720)}) == 720, "every test image is a query once"


def test_what_is_seen_decides_and_class_ids_are_refused(tmp_path: Path) -> None:
    target = np.zeros((20, 20), np.uint8)
    target[5:15, 5:15] = 1
    Image.fromarray(255 * target).quantize(2).save(tmp_path / "white_first.png")
    np.testing.assert_array_equal(read_binary_mask(tmp_path / "white_first.png"), target)
    target[:3], target[-3:] = 2, 3
    Image.fromarray(target).save(tmp_path / "ids.png")
    with pytest.raises(UserError, match=r"ids.png holds 0, 1, 2, 3; a mask of one class is white on black"):
        read_binary_mask(tmp_path / "ids.png")


@pytest.mark.parametrize(
    ("values", "mode", "expected"),
    [
        ([0, 90, 127, 128, 255], "L", [0, 0, 0, 1, 1]),
        ([0, 255], "RGB", [0, 1]),
        ([0, 1, 255], "L", [0, 1, 255]),
        ([0, 38], "L", [0, 1]),
    ],
)
def test_a_mask_of_one_class_is_read_whatever_its_white_is(
    values: list[int], mode: str, expected: list[int], tmp_path: Path
) -> None:
    image = Image.fromarray(np.repeat(np.array([values], np.uint8), 3, 0))
    image.convert(mode).save(tmp_path / "m.png")
    assert read_binary_mask(tmp_path / "m.png")[0].tolist() == expected


def test_own_folders_lead_from_lists_to_a_test_on_novel_classes(tmp_path: Path) -> None:
    root, lists = tmp_path / "mine", tmp_path / "mine_lists"
    write_folders(root, [f"kind_{n}" for n in range(8)], side=64)
    write_folders(root, [".ipynb_checkpoints"], side=64)
    (root / "kind_1/1.png").rename(root / "kind_1/1.PNG")
    succeeded(lists_of(root, lists))
    assert names_in(lists / "classes.txt") == [f"kind_{n}" for n in range(8)]
    given = [
        *overrides(root, lists),
        *("data.dataset=Mine", "data.image_size=65", "data.scale=[0.9, 1.1]", "loss.bank_size=10", "workers=1"),
        *("model.backbone=efficientnet_lite0", "model.weights=random", "model.fem_scales=[1, 0.5]"),
        *("model.channels=8", "model.prototype_channels=8", "train.epochs=1", "train.batch_size=8"),
        *("eval.episodes=6", f"run_dir={tmp_path}/run"),
    ]
    assert "255" not in succeeded(process("scripts/check_data.py", "--config", CONFIG, *given)).out, "no mask holds it"
    succeeded(call(train, "--config", CONFIG, *given))
    best = f"{tmp_path}/run/best.pt"
    out = succeeded(call(test_command, "--config", CONFIG, "--checkpoint", best, *given, "data.fold=1")).out
    assert "Mine fold 1 of 2, 1-shot" in out
    assert all(name in out for name in names_in(lists / "test_classes.txt"))


def test_mistakes_in_folders_and_lists_are_named(tmp_path: Path) -> None:
    root, lists = tmp_path / "data", tmp_path / "lists"
    write_folders(root, ["a", "b", "c", "d"], side=16)
    succeeded(lists_of(root, lists))
    (lists / "val.txt").write_text("e/1.jpg a/1.png\n")
    with pytest.raises(UserError, match=r"line 1: .*folder 'e', which is not among data.classes"):
        build_index(load_config(CONFIG, overrides(root, lists)), "val")
    (lists / "test_classes.txt").write_text("a\nz\n")
    refused(lists_of(root, lists), "without a folder: z")
    (root / "b/3.png").unlink()
    refused(lists_of(root, lists), "have no mask", "b/3.jpg")
