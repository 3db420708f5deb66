"""check_data.py on damaged data sets, and episodes written to and read from a file."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import check_data
from tests.harness import call, copied, process, succeeded
from util.config import Config, load_config
from util.data import class_index
from util.data.episodes import EpisodeFiles, EpisodeSampler, read_episodes, write_episodes
from util.data.folds import base_classes, novel_classes
from util.data.published import PUBLISHED, Published
from util.data.synthetic import CLASS_NAMES
from util.engine.build import build_eval_sampler, build_index
from util.errors import UserError

CONFIG = Path("configs/synthetic/efficientnet_lite0_fold0_1shot.yaml")
Data = tuple[Path, list[str]]
"""root of a data set, and the overrides that select it"""


@pytest.fixture
def data(synthetic: Path, tmp_path: Path) -> Data:
    return copied(synthetic, tmp_path)


def check(*overrides: str) -> tuple[int, str]:
    """Exit code and output of check_data.py."""
    done = call(check_data, "--config", CONFIG, *overrides)
    return done.code, done.out


def test_the_counts_of_a_good_data_set_are_right(data: Data) -> None:
    root, overrides = data
    out = succeeded(process("scripts/check_data.py", "--config", CONFIG, *overrides)).out
    assert "WARNING" not in out and out.endswith("fold 0: ready to train\n")
    sha256 = hashlib.sha256((root / "lists/val.txt").read_bytes()).hexdigest()
    title = "not a published list of PASCAL-5i"
    assert f"val   {root}/lists/val.txt: {title}; 40 of 40 masks hold 255; SHA-256 {sha256[:16]}\n" in out
    rows = {" ".join(line.split()[:2]): line.split(maxsplit=3)[2:] for line in out.splitlines() if line[:1].isdigit()}
    masks = [np.array(Image.open(p)) for p in sorted((root / "SegmentationClassAug").glob("val_*.png"))]
    for fold in range(4):
        novel = range(5 * fold + 1, 5 * fold + 6)
        images = {f"{CLASS_NAMES[c - 1]} {sum(int((m == c).sum()) >= 1024 for m in masks)}" for c in novel}
        total, shown = rows[f"{fold} val"]
        assert set(shown.split(", ")) == images
        assert int(total) == sum(any((m == c).sum() >= 1024 for c in novel) for m in masks)
    assert rows["0 train"][1].endswith(", ...")
    epoch = int(rows["0 train"][0]) // 8
    assert f"\nfold 0: {8 * epoch} training steps, in 8 epochs of {epoch}\n" in out


def test_a_class_that_cannot_give_an_episode_fails_the_check(data: Data) -> None:
    code, out = check(*data[1], "data.shots=30")
    assert code == 1 and "fold 0: training would be wrong" in out
    assert re.search("PROBLEM fold 0: 30-shot episodes need 31 images .* in the val list, found striped_star", out)
    assert re.search("WARNING fold 1: 30-shot episodes need 31 images .* in the val list", out)


def test_a_class_with_too_few_images_can_be_left_out_of_every_fold(data: Data) -> None:
    root, overrides = data
    lines = (root / "lists/val.txt").read_text().splitlines(keepends=True)
    stars = [line for line in lines if (np.array(Image.open(root / line.split()[1])) == 1).sum() >= 1024]
    (root / "lists/val.txt").write_text("".join(line for line in lines if line not in stars[1:]))
    code, out = check(*overrides)
    assert code == 1 and re.search("found striped_star 1: .* or name these classes in data.left_out", out)
    code, out = check(*overrides, "data.left_out=[striped_star]")
    assert code == 0 and "striped_star" not in out
    for fold, novel in ((0, range(2, 6)), (1, range(6, 11))):
        settings = load_config(CONFIG, [*overrides, "data.left_out=[striped_star]", f"data.fold={fold}"]).data
        assert novel_classes(settings) == tuple(novel)
        assert base_classes(settings) == tuple(c for c in range(2, 21) if c not in novel)
    every = ", ".join(CLASS_NAMES[:5])
    assert "PROBLEM data.left_out names all classes of fold 0" in check(*overrides, f"data.left_out=[{every}]")[1]


@pytest.mark.parametrize("name", ["pascal", "coco"])
def test_without_data_the_command_that_prepares_them_is_named_once(name: str, tmp_path: Path) -> None:
    config = f"configs/{name}/resnet50_fold0_1shot.yaml"
    out = call(check_data, "--config", config, f"data.root={tmp_path / 'none'}").out
    assert out.count(f"scripts/prepare_{name}.py") == out.count("PROBLEM data.root") == out.count("PROBLEM") == 1


@pytest.fixture
def pascal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    """Four classes of VOC-like data under the ids of tiny 'published' lists; 3 of 12 training masks hold 255."""
    root = tmp_path / "pascal"
    for split in ("train", "val"):
        ids = [f"20{split == 'val':02}_{number:06}" for number in range(12)]
        lines = []
        for number, name in enumerate(ids):
            mask = np.zeros((20, 30), np.uint8)
            mask[3:9, 3:20] = 1 + number % 4
            mask[2] = 255 if split == "val" or number % 4 == 0 else 0
            image = np.full((20, 30, 3), (100 * (split == "val"), number * 9, 0), np.uint8)
            for file, values in ((f"JPEGImages/{name}.jpg", image), (f"SegmentationClassAug/{name}.png", mask)):
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / file)
            lines.append(f"JPEGImages/{name}.jpg SegmentationClassAug/{name}.png\n")
        (root / f"{split}.txt").write_text("".join(lines))
        digest = hashlib.sha256("".join(f"{name}\n" for name in ids).encode()).hexdigest()
        monkeypatch.setitem(PUBLISHED, digest, Published(f"the tiny {split}", split, 3 if split == "train" else 12))
    changes = [f"data.root={root}", f"data.train_list={root}/train.txt", f"data.val_list={root}/val.txt"]
    return root, [*changes, "data.dataset=PASCAL-5i", "data.classes=[a, b, c, d]", "data.min_area=9"]


def test_published_lists_are_recognised_whatever_their_order_and_line_ends(pascal: Data) -> None:
    root, overrides = pascal
    lines = (root / "train.txt").read_text().splitlines()
    (root / "train.txt").write_bytes("\r\n".join(f"/{line}" for line in reversed(lines)).encode())
    code, out = check(*overrides)
    assert code == 0 and "WARNING list" not in out
    for split, ignored in (("train", 3), ("val", 12)):
        assert f"{root}/{split}.txt: the tiny {split}; {ignored} of 12 masks hold 255" in out


def test_a_pascal_list_that_no_paper_uses_gives_a_warning(pascal: Data) -> None:
    root, overrides = pascal
    lines = (root / "train.txt").read_text().splitlines(keepends=True)
    (root / "train.txt").write_text("".join(lines[:-1]))
    code, out = check(*overrides)
    assert code == 0 and f"WARNING list {root}/train.txt is not a train list that papers use (not a published" in out


def test_a_lost_border_fails_a_published_list(pascal: Data) -> None:
    root, overrides = pascal
    for path in sorted((root / "SegmentationClassAug").glob("2001_*"))[1:]:
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 255, 0, mask)).save(path)
    code, out = check(*overrides)
    assert code == 1 and f"PROBLEM list {root}/val.txt: 1 of 12 masks hold 255, of the published ones 12" in out


def test_shared_images_are_an_error_on_benchmarks_and_a_warning_elsewhere(pascal: Data) -> None:
    root, overrides = pascal
    with (root / "val.txt").open("a") as file:
        file.write("SegmentationClassAug/../JPEGImages/2000_000003.jpg SegmentationClassAug/2000_000003.png\n")
    message = f"1 images are in both the training and the validation list ({root}/JPEGImages"
    for dataset, kind in (("PASCAL-5i", "PROBLEM"), ("Mine", "WARNING")):
        code, out = check(*overrides, f"data.dataset={dataset}")
        assert code == (kind == "PROBLEM") and f"{kind} {message}" in out


def test_only_sound_lists_leave_their_index_for_training(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    root, overrides = data
    broken = root / "JPEGImages/val_00003.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-2000])
    check(*overrides)
    assert not list((root / "lists").glob("*.npz"))
    broken.write_bytes(whole)
    check(*overrides)
    monkeypatch.setattr(class_index, "count_pixels", None)  # no mask is counted again
    assert len(build_index(load_config(CONFIG, overrides), "train").items) == 60


def test_a_damaged_index_is_counted_again(data: Data) -> None:
    config, path = load_config(CONFIG, data[1]), data[0] / "lists/val.txt.index.npz"
    index = build_index(config, "val")
    with np.load(path) as stored:
        arrays = dict(stored)
    for change in ({"counts": np.ones((39, 22), np.int32)}, {"key": np.array("another")}):
        np.savez(path, **(arrays | change))
        np.testing.assert_array_equal(build_index(config, "val").pixels, index.pixels)
    path.write_bytes(path.read_bytes()[:-200])
    np.testing.assert_array_equal(build_index(config, "val").pixels, index.pixels)


def test_images_that_exif_turns_are_counted_in_a_warning(data: Data) -> None:
    root, overrides = data
    path = root / "JPEGImages/val_00003.jpg"
    exif = Image.Exif()
    exif[0x0112] = 3  # 180 degrees: the size does not tell
    Image.open(path).save(path, exif=exif)
    code, out = check(*overrides)
    assert code == 0 and f"WARNING list {root}/lists/val.txt: EXIF turns 1 images on screen" in out


@pytest.fixture
def sampler(data: Data) -> tuple[Config, EpisodeSampler]:
    config = load_config(CONFIG, [*data[1], "data.shots=2"])
    return config, build_eval_sampler(config, build_index(config, "val"), 3)


def recorded(config: Config, path: Path, shots: int | None = None) -> list[EpisodeFiles]:
    index, classes = build_index(config, "val"), novel_classes(config.data)
    return read_episodes(path, index, root=Path(config.data.root), classes=classes, shots=shots or config.data.shots)


def test_episodes_come_back_from_a_file(sampler: tuple[Config, EpisodeSampler], tmp_path: Path) -> None:
    config, episodes = sampler
    path = tmp_path / "e.jsonl"
    write_episodes(path, episodes, 25, root=Path(config.data.root), class_names=config.data.classes)
    assert recorded(config, path) == [episodes(n) for n in range(25)]
    for shots in (1, 3):
        with pytest.raises(UserError, match=f"2 supports, but data.shots is {shots}"):
            recorded(config, path, shots)


def test_a_file_that_does_not_fit_is_refused_at_its_first_mismatch(
    sampler: tuple[Config, EpisodeSampler], tmp_path: Path
) -> None:
    config, episodes = sampler
    path = tmp_path / "e.jsonl"
    write_episodes(path, episodes, 5, root=Path(config.data.root), class_names=config.data.classes)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    query = Image.open(Path(config.data.root) / lines[3]["query"].split()[1])
    other = min(set(novel_classes(config.data)) - set(np.unique(query).tolist()))
    for key, value, words in (
        ("query", "JPEGImages/other.jpg", "not an episode of this list"),
        ("supports", ["JPEGImages/val_00001.jpg SegmentationClassAug/val_00001.png"], "1 supports"),
        ("class_id", 17, "is not novel in this fold"),
        ("class_id", other, f"holds no pixel of class {other}"),
    ):
        changed = [*lines[:3], lines[3] | {key: value}, *lines[4:]]
        path.write_text("".join(json.dumps(line) + "\n" for line in changed))
        with pytest.raises(UserError, match=f"line 4: .*{words}"):
            recorded(config, path)
