"""Lists, images, class index, folds, episodes, transforms and loaders."""

import errno
import hashlib
import itertools
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse import csr_array
from torch.utils.data import DataLoader
from util.engine.rounds import EncodingSize, plan_rounds

from util.config import Config, DataConfig, load_config
from util.data import class_index
from util.data.class_index import ClassIndex, Item, load_class_index, read_list
from util.data.dataset import Episode, read_pair
from util.data.episodes import EpisodeFiles, EpisodeSampler
from util.data.folds import base_classes, novel_classes
from util.data.images import image_size, read_class_ids, read_image
from util.data.transforms import augment, fit, fitted_size, normalize, to_original
from util.engine.build import (
    build_eval_loader,
    build_eval_sampler,
    build_index,
    build_train_loader,
    build_train_sampler,
)
from util.errors import UserError
from util.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
MEAN_COLOUR = (124, 116, 104)  # 255 * (0.485, 0.456, 0.406) = 123.7, 116.3, 103.5

# ---------------------------------------------------------------- folds


def data_config(names: list[str], **changes: object) -> DataConfig:
    lists = {"dataset": "d", "root": "r", "train_list": "t", "val_list": "v"}
    return DataConfig.model_validate({**lists, "classes": names, **changes})


def names(count: int) -> list[str]:
    return [f"class{number}" for number in range(1, count + 1)]


@pytest.mark.parametrize("fold", range(4))
def test_novel_classes_of_pascal_fold_i_are_5i_plus_1_to_5(fold: int) -> None:
    data = data_config(names(20), fold=fold)
    assert novel_classes(data) == tuple(5 * fold + offset for offset in (1, 2, 3, 4, 5))


def test_coco_fold_0_holds_the_classes_that_the_literature_lists() -> None:
    data = load_config(ROOT / "configs/coco/resnet50_fold0_1shot.yaml").data
    assert {data.classes[c - 1] for c in novel_classes(data)} == {
        *("person", "airplane", "boat", "parking meter", "dog", "elephant", "backpack", "suitcase", "sports ball"),
        *("skateboard", "wine glass", "spoon", "sandwich", "hot dog", "chair", "dining table", "mouse", "microwave"),
        *("refrigerator", "scissors"),
    }


@pytest.mark.parametrize("count", [4, 80])
@pytest.mark.parametrize("scheme", ["contiguous", "interleaved"])
def test_base_and_novel_are_disjoint_and_cover_all_and_the_folds_partition_the_classes(count: int, scheme: str) -> None:
    held_back: list[int] = []
    for fold in range(4):
        data = data_config(names(count), fold=fold, fold_scheme=scheme)
        novel, base = novel_classes(data), base_classes(data)
        assert not set(novel) & set(base)
        assert sorted(novel + base) == list(range(1, count + 1))
        assert len(novel) == count // 4
        held_back += novel
    assert sorted(held_back) == list(range(1, count + 1))


def test_explicit_folds_are_found_by_name_whatever_their_order_and_size() -> None:
    folds = [["e", "a"], ["b"], ["a", "c", "d"]]
    expected = [((1, 5), (2, 3, 4)), ((2,), (1, 3, 4, 5)), ((1, 3, 4), (2, 5))]
    for fold, (novel, base) in enumerate(expected):
        data = data_config(["a", "b", "c", "d", "e"], folds=folds, fold=fold)
        assert (novel_classes(data), base_classes(data)) == (novel, base)


# ---------------------------------------------------------------- lists


def write_list(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"i/a.jpg m/a.png\ni/b.jpg m/b.png\n",
        b"i/a.jpg m/a.png\ni/b.jpg m/b.png",
        b"i/a.jpg m/a.png\r\ni/b.jpg m/b.png\r\n",
        b"\n\ni/a.jpg m/a.png\n   \n\t\ni/b.jpg m/b.png\n\n",
        b"/i/a.jpg /m/a.png\n//i/b.jpg m/b.png\n",
        b"  i/a.jpg\tm/a.png  \ni/b.jpg     m/b.png\n",
    ],
    ids=["plain", "no last newline", "windows line ends", "blank lines", "leading slashes", "other white space"],
)
def test_a_list_gives_its_lines_in_order_below_the_root(content: bytes, tmp_path: Path) -> None:
    items = read_list(write_list(tmp_path / "l.txt", content), Path("data/x"))
    assert items == (
        Item(Path("data/x/i/a.jpg"), Path("data/x/m/a.png")),
        Item(Path("data/x/i/b.jpg"), Path("data/x/m/b.png")),
    )


@pytest.mark.parametrize("line", ["only.jpg", "a.jpg a.png 3"])
def test_a_line_that_is_not_two_paths_is_refused_with_its_number(line: str, tmp_path: Path) -> None:
    path = write_list(tmp_path / "l.txt", f"x.jpg x.png\n\n{line}\n".encode())
    with pytest.raises(UserError, match=r"line 3: .*without spaces") as caught:
        read_list(path, tmp_path)
    assert str(path) in str(caught.value)
    assert line in str(caught.value)


@pytest.mark.parametrize("again", ["a.jpg a.png", "/a.jpg  a.png", "i/../a.jpg ./a.png"])
def test_a_line_that_stands_twice_is_refused_with_both_numbers(again: str, tmp_path: Path) -> None:
    path = write_list(tmp_path / "l.txt", f"x.jpg x.png\na.jpg a.png\n\nb.jpg b.png\n{again}\n".encode())
    with pytest.raises(UserError, match=r"line 5: the same as line 2"):
        read_list(path, tmp_path)


def test_one_photo_named_in_two_ways_is_one_photo(tmp_path: Path) -> None:
    detour = f"../{tmp_path.name}/i/a.jpg"
    lines = f"i/a.jpg m/a.png\n./i//a.jpg m/b.png\nm/../i/a.jpg m/c.png\n../b.jpg m/d.png\n{detour} m/e.png\n"
    path = write_list(tmp_path / "l.txt", lines.encode())
    index = ClassIndex(read_list(path, tmp_path), csr_array((5, 2), dtype=int), path, "", np.zeros(5, int))
    assert index.photos.tolist() == [0, 0, 0, 3, 0]


# ---------------------------------------------------------------- images

LABELS = np.array([[0, 1, 2], [20, 254, 255]], np.uint8).repeat(9, 0).repeat(7, 1)  # (18, 21)


def save_palette_mask(path: Path, mask: np.ndarray) -> None:
    image = Image.fromarray(mask, "L")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    assert image.mode == "P"
    image.save(path)


def photograph(height: int = 60, width: int = 90) -> np.ndarray:
    """A picture (H, W, 3) that does not compress to nothing."""
    noise = np.random.default_rng(7).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3)).astype(np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def test_palette_and_greyscale_masks_hold_the_same_values(tmp_path: Path) -> None:
    save_palette_mask(tmp_path / "palette.png", LABELS)
    Image.fromarray(LABELS).save(tmp_path / "grey.png")
    for name in ("palette.png", "grey.png"):
        mask = read_class_ids(tmp_path / name)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, LABELS)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palette_masks_of_few_colours_keep_their_values(bits: int, tmp_path: Path) -> None:
    labels = LABELS.astype(int) % 2**bits
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    image.save(tmp_path / "m.png", bits=bits)
    assert (tmp_path / "m.png").read_bytes()[24] == bits, "bit depth in the PNG's header"
    np.testing.assert_array_equal(read_class_ids(tmp_path / "m.png"), labels)


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_masks_that_are_neither_palette_nor_greyscale_are_refused(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(LABELS.astype(np.uint16)) if mode == "I;16" else Image.fromarray(LABELS).convert(mode)
    image.save(tmp_path / "m.png")
    with pytest.raises(UserError, match=f"mode {mode}") as caught:
        read_class_ids(tmp_path / "m.png")
    assert str(tmp_path / "m.png") in str(caught.value)


def test_cmyk_jpegs_become_rgb(tmp_path: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]], np.uint8)
    picture = np.broadcast_to(colours.repeat(16, 0), (32, 80, 3))
    Image.fromarray(picture).convert("CMYK").save(tmp_path / "i.jpg", quality=95)
    assert Image.open(tmp_path / "i.jpg").mode == "CMYK"
    image = read_image(tmp_path / "i.jpg")
    assert (image.shape, image.dtype) == ((32, 80, 3), np.uint8)
    difference = np.abs(image.astype(int) - picture)[:, np.arange(80) % 16 // 4 == 1]
    assert difference.max() < 12


def test_the_orientation_tag_of_a_camera_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph(40, 70)).save(tmp_path / "i.jpg", exif=exif)
    assert read_image(tmp_path / "i.jpg").shape == (40, 70, 3)
    assert image_size(tmp_path / "i.jpg") == (40, 70)


def test_a_pair_is_read_as_target_other_and_ignored(tmp_path: Path) -> None:
    Image.fromarray(photograph(18, 21)).save(tmp_path / "i.jpg")
    save_palette_mask(tmp_path / "m.png", LABELS)
    item = Item(tmp_path / "i.jpg", tmp_path / "m.png")
    for class_id in (1, 2, 20, 254):
        image, mask = read_pair(item, class_id)
        assert (image.shape, mask.dtype) == ((18, 21, 3), np.uint8)
        for value, seen in zip(LABELS.ravel().tolist(), mask.ravel().tolist(), strict=True):
            assert seen == (255 if value == 255 else int(value == class_id))


def test_a_pair_of_different_sizes_is_refused(tmp_path: Path) -> None:
    Image.fromarray(photograph(21, 18)).save(tmp_path / "i.jpg")
    save_palette_mask(tmp_path / "m.png", LABELS)
    with pytest.raises(UserError, match=r"i\.jpg.*m\.png"):
        read_pair(Item(tmp_path / "i.jpg", tmp_path / "m.png"), 1)


# ---------------------------------------------------------------- class index


def write_tree(root: Path, masks: list[np.ndarray], name: str = "train.txt") -> Path:
    """Images, masks and a list below ``root``; the path of the list."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "masks").mkdir(exist_ok=True)
    for number, mask in enumerate(masks):
        Image.fromarray(np.zeros((*mask.shape, 3), np.uint8)).save(root / f"images/{number}.png")
        Image.fromarray(mask).save(root / f"masks/{number}.png")
    lines = [f"images/{number}.png masks/{number}.png\n" for number in range(len(masks))]
    (root / name).write_text("".join(lines))
    return root / name


def random_masks(count: int, num_classes: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    values = [*range(num_classes + 1), 255]
    return [rng.choice(values, tuple(rng.integers(5, 30, 2))).astype(np.uint8) for _ in range(count)]


def counted(masks: Iterable[np.ndarray], num_classes: int) -> np.ndarray:
    return np.stack([np.bincount(mask.ravel(), minlength=256)[: num_classes + 1] for mask in masks])


def load(path: Path, num_classes: int = 6) -> ClassIndex:
    return load_class_index(path, path.parent, num_classes, progress=False)


def loaded_pixels(path: Path, num_classes: int = 6) -> np.ndarray:
    return load(path, num_classes).pixels.toarray()


def forbid_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a mask was counted again")

    monkeypatch.setattr(class_index, "count_pixels", fail)


@pytest.fixture
def masks() -> list[np.ndarray]:
    return random_masks(12, 6)


def test_the_index_counts_every_value_of_every_mask(masks: list[np.ndarray], tmp_path: Path) -> None:
    path = write_tree(tmp_path, masks)
    index = load(path)
    np.testing.assert_array_equal(index.pixels.toarray(), counted(masks, 6))
    assert index.pixels.shape == (12, 7)
    assert index.ignored.tolist() == [int((mask == 255).sum()) for mask in masks]
    assert index.items == read_list(path, tmp_path)
    assert index.list_path == path
    assert index.list_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_qualifying_images_hold_at_least_the_area(masks: list[np.ndarray], tmp_path: Path) -> None:
    index = load(write_tree(tmp_path, masks))
    for class_id in range(1, 7):
        areas = [int((mask == class_id).sum()) for mask in masks]
        for area in {*areas, min(areas) + 1, max(areas) + 1}:
            assert index.qualifying(class_id, area).tolist() == [i for i, a in enumerate(areas) if a >= area]


def test_the_second_time_the_index_comes_from_its_cache(
    masks: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tree(tmp_path, masks)
    load(path)
    forbid_counting(monkeypatch)
    index = load(path)
    np.testing.assert_array_equal(index.pixels.toarray(), counted(masks, 6))
    assert np.issubdtype(index.pixels.dtype, np.integer)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_mask_that_changed_at_the_same_size_is_noticed_by_its_time(tmp_path: Path) -> None:
    masks = [np.full((8, 8), value, np.uint8) for value in (1, 2, 3)]
    path = write_tree(tmp_path, masks)
    load(path)
    file = tmp_path / "masks/1.png"
    before = file.stat()
    masks[1][:] = 5
    Image.fromarray(masks[1]).save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert file.stat().st_size == before.st_size
    np.testing.assert_array_equal(loaded_pixels(path), counted(masks, 6))


def test_an_image_that_changed_is_noticed(masks: list[np.ndarray], tmp_path: Path) -> None:
    path = write_tree(tmp_path, masks)
    load(path)
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "images/7.png")
    with pytest.raises(UserError, match=r"images/7\.png is 50x40 but mask"):
        load(path)


def test_a_changed_list_is_noticed(masks: list[np.ndarray], tmp_path: Path) -> None:
    path = write_tree(tmp_path, masks)
    load(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)))
    np.testing.assert_array_equal(loaded_pixels(path), counted(masks[::-1], 6))
    path.write_text("\n".join(lines[:5]))
    np.testing.assert_array_equal(loaded_pixels(path), counted(masks[:5], 6))


def test_another_number_of_classes_is_noticed(masks: list[np.ndarray], tmp_path: Path) -> None:
    path = write_tree(tmp_path, masks)
    load(path, 6)
    np.testing.assert_array_equal(loaded_pixels(path, 9), counted(masks, 9))
    with pytest.raises(UserError, match="holds the value"):
        load(path, 5)


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_done_without_a_cache(
    reason: int, masks: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under EROFS, a read-only mount, Linux refuses to unlink even a file that is not there."""
    path = write_tree(tmp_path, masks)
    os_open, path_unlink = os.open, Path.unlink

    def open_(file: str, flags: int, *args: int, **kwargs: int) -> int:
        if tmp_path in Path(file).parents and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(reason, os.strerror(reason), str(file))
        return os_open(file, flags, *args, **kwargs)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if tmp_path in self.parents and reason == errno.EROFS:
            raise OSError(reason, os.strerror(reason), str(self))
        path_unlink(self, missing_ok)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        np.testing.assert_array_equal(loaded_pixels(path), counted(masks, 6))
    assert not list(tmp_path.rglob("*.npz"))


def test_a_folder_that_cannot_be_written_has_its_index_in_the_users_cache(
    masks: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    path = write_tree(root, masks)
    path.with_name("train.txt.index.npz").mkdir()  # nothing can be put there, not even by root
    other = write_tree(tmp_path / "other", masks[::-1])
    other.with_name("train.txt.index.npz").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    load(path)
    load(other)
    assert len(list(cache.rglob("*.npz"))) == len(list(cache.rglob("*.*"))) == 2
    with monkeypatch.context() as patch:
        forbid_counting(patch)
        np.testing.assert_array_equal(loaded_pixels(path), counted(masks, 6))
        np.testing.assert_array_equal(loaded_pixels(other), counted(masks[::-1], 6))
        patch.chdir(root)
        np.testing.assert_array_equal(
            load_class_index(Path("train.txt"), Path(), 6, progress=False).pixels.toarray(), counted(masks, 6)
        )
    masks[4][:] = 0
    Image.fromarray(masks[4]).save(root / "masks/4.png")
    np.testing.assert_array_equal(loaded_pixels(path), counted(masks, 6))


def test_an_index_killed_while_it_is_written_leaves_no_files_once_it_is_there(
    masks: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tree(tmp_path, masks)
    before = set(tmp_path.iterdir())

    def die(file: BinaryIO, **_: object) -> None:
        file.write(bytes(10_000))
        file.flush()
        os._exit(9)

    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            monkeypatch.setattr(np, "savez_compressed", die)
            load(path)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    load(path)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "train.txt.index.npz"}
    assert np.load(tmp_path / "train.txt.index.npz")["shape"].tolist() == [len(masks), 7]


def test_processes_that_write_one_file_at_a_time_disturb_neither_it_nor_each_other(tmp_path: Path) -> None:
    children = []
    for child in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(50):
                    write_atomically(tmp_path / "file", lambda file, n=child: file.write(bytes([n]) * (1000 + n)))  # type: ignore[misc]
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0, 0]
    (only,) = tmp_path.iterdir()
    data = only.read_bytes()
    assert data == data[:1] * (1000 + data[0])


@pytest.mark.parametrize(("value", "refused"), [(6, False), (255, False), (7, True), (254, True)])
def test_a_mask_value_that_is_no_class_is_refused_by_file_and_value(
    value: int, refused: bool, masks: list[np.ndarray], tmp_path: Path
) -> None:
    masks[5][2, 3] = value
    path = write_tree(tmp_path, masks)
    if not refused:
        np.testing.assert_array_equal(loaded_pixels(path), counted(masks, 6))
        return
    with pytest.raises(UserError, match=rf"masks/5\.png holds the value {value}, .* 6\b"):
        load(path)


@pytest.mark.parametrize(("kind", "cached"), [("image", True), ("mask", True), ("mask", False)])
def test_a_missing_file_is_refused_by_name_cached_or_not(
    kind: str, cached: bool, masks: list[np.ndarray], tmp_path: Path
) -> None:
    path = write_tree(tmp_path, masks)
    if cached:
        load(path)
    file = tmp_path / f"{kind}s/9.png"
    file.unlink()
    with pytest.raises(UserError, match=f"{kind} .* does not exist") as caught:
        load(path)
    assert str(file) in str(caught.value)
    assert str(path) in str(caught.value)


def test_many_masks_are_counted_on_all_cores_with_the_same_result(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    masks = [rng.choice([*range(7), 255], (8, 8)).astype(np.uint8) for _ in range(520)]
    path = write_tree(tmp_path, masks)
    np.testing.assert_array_equal(loaded_pixels(path), counted(masks, 6))
    for number, value in ((413, 77), (205, 88), (519, 99)):
        masks[number][1, 1] = value
        Image.fromarray(masks[number]).save(tmp_path / f"masks/{number}.png")
    for _ in range(5):
        with pytest.raises(UserError, match=r"masks/205\.png holds the value 88") as caught:
            load(path)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- episodes

MIN_AREA = 2048


def random_index(images: int = 60, num_classes: int = 8, seed: int = 0) -> ClassIndex:
    """An index, of no files, in which a class is absent, small or large in an image."""
    rng = np.random.default_rng(seed)
    small = rng.integers(1, MIN_AREA, (images, num_classes + 1))
    large = rng.integers(MIN_AREA, 9 * MIN_AREA, (images, num_classes + 1))
    pixels = np.choose(rng.choice(3, (images, num_classes + 1), p=[0.6, 0.15, 0.25]), [0, small, large])
    return index_of(pixels)


def index_of(pixels: np.ndarray, photos: Sequence[int] | None = None) -> ClassIndex:
    """An index of these counts; ``photos`` numbers the photo of each line, by default each its own."""
    lines = range(len(pixels))
    items = tuple(
        Item(Path(f"{photo}.jpg"), Path(f"{line}.png")) for line, photo in zip(lines, photos or lines, strict=True)
    )
    return ClassIndex(items, csr_array(pixels), Path("some/list.txt"), "", np.zeros(len(pixels), int))


def sampler_of(index: ClassIndex, **changes: object) -> EpisodeSampler:
    options = {"classes": (2, 3, 5), "shots": 3, "min_area": MIN_AREA, "seed": 1, "class_names": names(8)}
    return EpisodeSampler(index, **{**options, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("seed", range(3))
def test_every_episode_keeps_the_protocol(shots: int, seed: int) -> None:
    index = random_index(seed=seed)
    classes = (2, 3, 5)
    sampler = sampler_of(index, shots=shots, seed=seed)
    in_fold = {i for i in range(60) if any(index.pixels[i, c] >= MIN_AREA for c in classes)}
    assert len(sampler) == len(in_fold)
    for number in range(4 * len(sampler)):
        query, supports, class_id = sampler(number)
        assert query in in_fold
        assert class_id in classes
        assert index.pixels[query, class_id] > 0
        assert len(supports) == shots
        assert len({query, *supports}) == shots + 1, "all different, and never the query"
        assert all(index.pixels[support, class_id] >= MIN_AREA for support in supports)


def test_every_run_of_len_numbers_visits_every_image_of_the_fold_once() -> None:
    index = random_index()
    sampler = sampler_of(index)
    in_fold = [i for i in range(60) if index.pixels[i, [2, 3, 5]].max() >= MIN_AREA]
    orders = []
    for run in range(5):
        queries = [sampler(run * len(sampler) + place).query for place in range(len(sampler))]
        assert sorted(queries) == in_fold
        orders.append(tuple(queries))
    assert len(set(orders)) == 5, "in another order each time"
    assert tuple(in_fold) not in orders


def test_an_episode_is_a_function_of_seed_and_number_alone() -> None:
    index = random_index()
    numbers = [*range(150), 10_000, 123_456_789, 2**40]
    first = sampler_of(index)
    expected = {number: first(number) for number in numbers}
    shuffled = random.Random(0).sample(numbers, len(numbers))
    np.random.seed(5)
    torch.manual_seed(5)
    fresh = sampler_of(random_index())
    assert {number: fresh(number) for number in shuffled} == expected
    assert {number: sampler_of(index)(number) for number in shuffled[:20]} == {n: expected[n] for n in shuffled[:20]}
    assert all(first(number) == episode for number, episode in expected.items())


def test_the_seed_changes_the_order_of_queries_the_classes_and_the_supports_each() -> None:
    pixels = np.zeros((30, 9), int)
    pixels[:, [2, 3, 5]] = MIN_AREA  # anything goes with anything
    samplers = [sampler_of(index_of(pixels), seed=seed, shots=1) for seed in range(10)]
    for field in ("query", "class_id", "supports"):
        assert len({tuple(getattr(sampler(number), field) for number in range(30)) for sampler in samplers}) == 10


def test_other_episodes_of_the_same_query_have_other_supports() -> None:
    pixels = np.zeros((30, 9), int)
    pixels[:, 2] = 5000
    sampler = sampler_of(index_of(pixels), classes=(2,), shots=5)
    of_query: dict[int, set] = {}
    for number in range(10 * len(sampler)):
        episode = sampler(number)
        of_query.setdefault(episode.query, set()).add(frozenset(episode.supports))
    assert all(len(supports) >= 9 for supports in of_query.values())


def test_a_query_is_about_each_of_its_classes_and_each_other_image_supports_it_equally_often() -> None:
    pixels = np.zeros((6, 9), int)
    pixels[:, [2, 3, 5]] = MIN_AREA
    sampler = sampler_of(index_of(pixels), shots=2)
    episodes = [sampler(number) for number in range(6000)]
    # five standard deviations of a binomial distribution
    by_class = Counter((episode.query, episode.class_id) for episode in episodes)
    assert len(by_class) == 18
    assert all(abs(count - 6000 / 18) < 5 * 18 for count in by_class.values())
    for place in (0, 1):
        by_support = Counter((episode.query, episode.supports[place]) for episode in episodes)
        assert len(by_support) == 30
        assert all(abs(count - 200) < 5 * 14 for count in by_support.values())


def test_a_class_of_a_query_counts_whatever_its_area_but_not_among_supports() -> None:
    pixels = np.zeros((9, 9), int)
    pixels[:4, 2] = MIN_AREA
    pixels[4:8, 3] = MIN_AREA
    pixels[0, 3] = 1  # too small to support class 3
    pixels[8, 2] = MIN_AREA - 1  # not in the fold
    sampler = sampler_of(index_of(pixels), classes=(2, 3), shots=3)
    assert len(sampler) == 8
    episodes = [sampler(number) for number in range(800)]
    assert {episode.class_id for episode in episodes if episode.query == 0} == {2, 3}
    assert {support for e in episodes if e.class_id == 3 for support in e.supports} == {4, 5, 6, 7}
    assert {support for e in episodes if e.class_id == 2 for support in e.supports} == {0, 1, 2, 3}
    assert 8 not in {episode.query for episode in episodes}


def test_images_with_a_pixel_of_an_avoided_class_are_left_out() -> None:
    index = random_index(images=200)
    avoid = (1, 7)
    sampler = sampler_of(index, avoid=avoid)
    bare = {i for i in range(200) if index.pixels[i, 1] == 0 and index.pixels[i, 7] == 0}
    in_fold = {i for i in bare if index.pixels[i, [2, 3, 5]].max() >= MIN_AREA}
    assert 0 < len(in_fold) == len(sampler) < len(sampler_of(index))
    for number in range(2 * len(sampler)):
        query, supports, _ = sampler(number)
        assert query in in_fold
        assert set(supports) <= bare


@pytest.mark.parametrize("shots", [1, 3])
def test_a_class_with_too_few_images_is_refused_by_name_and_numbers(shots: int) -> None:
    pixels = np.zeros((30, 9), int)
    pixels[:20, 2] = MIN_AREA
    pixels[20 : 20 + shots, 3] = MIN_AREA
    pixels[20 + shots :, 3] = MIN_AREA - 1
    with pytest.raises(UserError) as caught:
        sampler_of(index_of(pixels), classes=(2, 3), shots=shots)
    message = str(caught.value)
    assert f"class 'class3' has {shots} images with at least 2048 pixels" in message
    assert f"{shots}-shot episodes need {shots + 1}" in message
    assert "some/list.txt" in message
    pixels[20 + shots, 3] = MIN_AREA
    sampler_of(index_of(pixels), classes=(2, 3), shots=shots)(0)


def test_a_photo_with_a_mask_a_line_is_never_its_own_support() -> None:
    """Photos 0 ... 19 have a line for class 2 and one for class 3, which has a second mask of photos 0 ... 4."""
    pixels = np.zeros((45, 9), int)
    pixels[:20, 2] = pixels[20:, 3] = MIN_AREA
    photo_of = [*range(20), *range(20), *range(5)]
    sampler = sampler_of(
        index_of(pixels, photo_of),
        classes=(2, 3),
        shots=4,
    )
    episodes = [sampler(number) for number in range(2000)]
    assert all(len({photo_of[place] for place in (query, *supports)}) == 5 for query, supports, _ in episodes)
    assert {episode.query for episode in episodes} == set(range(45))
    chosen = Counter(place for episode in episodes if episode.class_id == 3 for place in episode.supports)
    assert chosen.keys() == set(range(20, 45))
    assert all(abs(chosen[n] + chosen.get(n + 20, 0) - sum(chosen.values()) / 20) < 85 for n in range(20, 40))
    with pytest.raises(UserError, match="'class3' has 20 images"):
        sampler_of(
            index_of(pixels, photo_of),
            classes=(3,),
            shots=20,
        )
    pixels[30, 7] = 1
    avoiding = sampler_of(
        index_of(pixels, photo_of),
        classes=(2, 3),
        avoid=(7,),
    )
    assert {avoiding(number).query for number in range(500)} == set(range(45)) - {10, 30}


# ---------------------------------------------------------------- geometry of evaluation


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (375, 500, 473, (352, 472)),  # 375 * 473 / 500 = 354.75
        (500, 375, 473, (472, 352)),
        (333, 500, 473, (312, 472)),  # 315.02
        (500, 334, 473, (472, 312)),  # 315.96
        (480, 640, 473, (352, 472)),  # 354.75
        (281, 500, 473, (264, 472)),  # 265.83
        (500, 500, 473, (472, 472)),
        (473, 473, 473, (472, 472)),
        (50, 100, 473, (232, 472)),  # 236.50
        (160, 240, 161, (104, 160)),  # 107.33
        (8, 1000, 473, (8, 472)),  # 3.78, but not nothing
    ],
)
def test_fitted_sizes_computed_by_hand(height: int, width: int, size: int, expected: tuple[int, int]) -> None:
    assert fitted_size(height, width, size) == expected
    picture, mask = fit(np.full((height, width, 3), 9, np.uint8), np.ones((height, width), np.uint8), size)
    assert (picture.shape, picture.dtype) == ((size, size, 3), np.uint8)
    assert (mask.shape, mask.dtype) == ((size, size), np.uint8)
    inside = np.zeros((size, size), bool)
    inside[: expected[0], : expected[1]] = True
    np.testing.assert_array_equal(picture, np.where(inside, 9, 0)[..., None].repeat(3, 2))
    np.testing.assert_array_equal(mask, np.where(inside, 1, 255))


def resample(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear samples of (H, W) at all rows x columns, positions beyond the rim clamped."""
    down = np.stack([np.interp(rows, np.arange(len(values)), column) for column in values.T], 1)
    return np.stack([np.interp(columns, np.arange(values.shape[1]), row) for row in down])


def half_pixel(length: int, source: int) -> np.ndarray:
    """Where the pixel centres of ``length`` pixels lie among ``source`` pixels of the same extent."""
    return (np.arange(length) + 0.5) * source / length - 0.5


@pytest.mark.parametrize(("height", "width"), [(101, 67), (300, 211)])
def test_fit_resizes_the_image_bilinearly(height: int, width: int) -> None:
    image = photograph(height, width)
    picture, _ = fit(image, np.zeros((height, width), np.uint8), 97)
    h, w = fitted_size(height, width, 97)
    for channel in range(3):
        expected = resample(image[..., channel].astype(float), half_pixel(h, height), half_pixel(w, width))
        assert np.abs(picture[:h, :w, channel] - expected).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(101, 67), (300, 211)])
def test_fit_takes_every_mask_value_from_its_own_place(height: int, width: int) -> None:
    mask = np.random.default_rng(0).choice([0, 1, 255], (height // 9 + 1, width // 9 + 1)).astype(np.uint8)
    mask = mask.repeat(9, 0).repeat(9, 1)[:height, :width]
    _, fitted = fit(np.zeros((height, width, 3), np.uint8), mask, 97)
    h, w = fitted_size(height, width, 97)
    rows, columns = half_pixel(h, height), half_pixel(w, width)
    reach = max(1.0, 0.5 * height / h + 0.5)
    for (i, y), (j, x) in itertools.product(enumerate(rows), enumerate(columns)):
        top, left = max(0, int(np.floor(y - reach))), max(0, int(np.floor(x - reach)))
        near = mask[top : int(np.ceil(y + reach)) + 1, left : int(np.ceil(x + reach)) + 1]
        assert fitted[i, j] in near


def blob(height: int, width: int) -> np.ndarray:
    """A mask of two ellipses and a hole."""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    first = ((x - 0.4) / 0.3) ** 2 + ((y - 0.5) / 0.4) ** 2 < 1
    second = ((x - 0.85) / 0.12) ** 2 + ((y - 0.85) / 0.13) ** 2 < 1
    hole = (x - 0.35) ** 2 + (y - 0.45) ** 2 < 0.01
    return ((first | second) & ~hole).astype(np.uint8)


SIZES = [(375, 500), (601, 457), (473, 473)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_exact_geometry_maps_places_onto_themselves(height: int, width: int) -> None:
    h, w = fitted_size(height, width, 473)
    ramp = np.full((2, 473, 473), 1e6, np.float32)  # what lies beyond the image must not matter
    ramp[0, :h, :w] = (np.arange(h)[:, None] + 0.5) * height / h - 0.5
    ramp[1, :h, :w] = (np.arange(w) + 0.5) * width / w - 0.5
    rows = to_original(torch.from_numpy(ramp[:1]), height, width, "exact")[0].numpy()
    columns = to_original(torch.from_numpy(ramp[1:]), height, width, "exact")[0].numpy()
    # half of a pixel at the rim, where there is nothing to interpolate with; the rest exactly
    inner = slice(3, -3)
    np.testing.assert_allclose(rows[inner, inner], np.mgrid[:height, :width][0][inner, inner], atol=0.01)
    np.testing.assert_allclose(columns[inner, inner], np.mgrid[:height, :width][1][inner, inner], atol=0.01)
    assert np.abs(rows - np.mgrid[:height, :width][0]).max() < 1
    assert np.abs(columns - np.mgrid[:height, :width][1]).max() < 1


@pytest.mark.parametrize(("height", "width"), [(75, 100), (100, 61), (90, 90), (33, 47)])
@pytest.mark.parametrize("geometry", ["lineage", "exact"])
def test_both_geometries_equal_a_direct_recomputation(height: int, width: int, geometry: str) -> None:
    logits = np.random.default_rng(0).standard_normal((1, 73, 73)).astype(np.float32)
    if geometry == "lineage":  # the whole square to a square of the longer side, corners on corners; then a crop
        side = np.linspace(0, 72, max(height, width))
        expected = resample(logits[0], side, side)[:height, :width]
    else:
        h, w = fitted_size(height, width, 73)
        expected = resample(logits[0, :h, :w], half_pixel(height, h), half_pixel(width, w))
    result = to_original(torch.from_numpy(logits), height, width, geometry)
    assert result.shape == (1, height, width)
    np.testing.assert_allclose(result[0].numpy(), expected, atol=1e-4)


def test_lineage_geometry_leaves_a_mask_of_a_pascal_image_3_px_off_at_most() -> None:
    height, width = 375, 500
    mask = blob(height, width)
    _, fitted = fit(np.zeros((height, width, 3), np.uint8), mask, 473)
    logits = torch.from_numpy(np.where(fitted == 1, 1.0, -1.0).astype(np.float32))[None]
    back = to_original(logits, height, width, "lineage")[0].numpy() > 0
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))  # 3 px, and 1 for two roundings
    assert not (back & (cv2.dilate(mask, disc) == 0)).any()
    assert back[cv2.erode(mask, disc) == 1].all()


# ---------------------------------------------------------------- augmentation


def coordinates(height: int, width: int) -> np.ndarray:
    """A picture that tells of every pixel its x and y, as finely as it can, and by 255 that it lies in the picture."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * unit(width), y * unit(height), np.full_like(x, 255)], -1).astype(np.uint8)


def unit(length: int) -> int:
    """What a step of one pixel is worth in a picture of coordinates."""
    return 255 // (length - 1)


def labels(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).choice([0, 1, 255], (height // 15 + 1, width // 15 + 1), p=[0.5, 0.4, 0.1])
    return small.astype(np.uint8).repeat(15, 0).repeat(15, 1)[:height, :width]


def recover(picture: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """From a warped picture of coordinates: the 2x3 map from its pixels (x, y) to the source's, and where it is."""
    inside = cv2.erode((picture[..., 2] == 255).astype(np.uint8), np.ones((3, 3), np.uint8)) == 1
    y, x = np.nonzero(inside)
    source = picture[inside][:, :2] / [unit(width), unit(height)]
    solution = np.linalg.lstsq(np.stack([x, y, np.ones_like(x)], 1).astype(float), source, rcond=None)[0]
    return solution.T, inside


def test_augmentation_is_a_function_of_its_generator() -> None:
    image, mask = photograph(130, 170), labels(130, 170)
    before = image.copy(), mask.copy()
    results = []
    for seed in [0, 1, 2, 3, 0, 1, 2, 3]:
        np.random.seed(len(results))
        results.append(augment(image, mask, 97, np.random.default_rng(seed), (0.8, 1.25), 10.0))
    for first, second in zip(results[:4], results[4:], strict=True):
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])
    assert all(not np.array_equal(a[0], b[0]) for a, b in itertools.combinations(results[:4], 2))
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(mask, before[1])


def test_image_and_mask_go_the_same_way() -> None:
    height, width = 150, 210
    image, mask = coordinates(height, width), labels(height, width)
    for seed in range(40):
        picture, warped = augment(image, mask, 121, np.random.default_rng(seed), (0.8, 1.25), 10.0)
        to_source, inside = recover(picture, height, width)
        y, x = np.nonzero(inside)
        place = (to_source @ np.stack([x, y, np.ones_like(x)])).T
        expected = mask[place[:, 1].round().astype(int), place[:, 0].round().astype(int)]
        edge = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        sure = ~edge[place[:, 1].round().astype(int), place[:, 0].round().astype(int)]
        assert sure.mean() > 0.5
        np.testing.assert_array_equal(warped[inside][sure], expected[sure])


def test_places_beyond_the_image_hold_the_mean_colour_and_are_ignored() -> None:
    image, mask = coordinates(60, 80), np.ones((60, 80), np.uint8)
    for seed in range(30):
        picture, warped = augment(image, mask, 121, np.random.default_rng(seed), (0.8, 1.25), 10.0)
        to_source, _ = recover(picture, 60, 80)
        y, x = np.mgrid[:121, :121]
        place = to_source @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
        gap = np.maximum(np.maximum(-place[0], place[0] - 79), np.maximum(-place[1], place[1] - 59)).reshape(121, 121)
        # a mask's pixel reaches half a pixel beyond its centre, interpolation a whole one; 0.2 for the recovery
        assert (warped[gap > 0.7] == 255).all()
        assert (warped[gap < 0.3] == 1).all()
        assert (picture[gap > 1.2] == MEAN_COLOUR).all()
        assert (gap > 1.2).mean() > 0.3


def test_scale_rotation_and_flip_are_drawn_as_the_paper_says() -> None:
    """Scale uniform in its range; rotation within +-10 degrees in half of the images; flips in half of them."""
    image, mask = coordinates(200, 200), np.zeros((200, 200), np.uint8)
    scales, angles, flips = [], [], []
    for seed in range(400):
        picture, _ = augment(image, mask, 161, np.random.default_rng(seed), (0.8, 1.25), 10.0)
        to_target = np.linalg.inv(recover(picture, 200, 200)[0][:, :2])
        determinant = np.linalg.det(to_target)
        scales.append(np.sqrt(abs(determinant)))
        flips.append(determinant < 0)
        angles.append(np.degrees(np.arctan2(to_target[1, 0], to_target[1, 1])))
        # nothing but these three: no shear, no different scale along x and y
        np.testing.assert_allclose(to_target @ to_target.T, abs(determinant) * np.eye(2), atol=0.01)
    assert -10.02 < min(angles) < -9, "to the one side"
    assert 9 < max(angles) < 10.02, "and to the other"
    scales, angles = np.array(scales), np.abs(angles)
    assert 0.799 < scales.min() < 0.82
    assert 1.23 < scales.max() < 1.251
    assert np.histogram(scales, 3, (0.8, 1.25))[0].min() > 90
    rotated = angles > 0.02
    assert 150 < rotated.sum() < 250
    assert 3.5 < angles[rotated].mean() < 6.5
    assert 150 < sum(flips) < 250
    assert 50 < sum(r and f for r, f in zip(rotated, flips, strict=True)) < 150


def test_crops_come_from_everywhere_and_stay_in_the_image() -> None:
    image, mask = coordinates(130, 250), np.zeros((130, 250), np.uint8)
    corners = []
    for seed in range(200):
        picture, _ = augment(image, mask, 97, np.random.default_rng(seed), (1.0, 1.0), 0.0)
        assert (picture[..., 2] == 255).all()
        corners.append(picture[..., :2].reshape(-1, 2).min(0) // [unit(250), unit(130)])
    corners = np.array(corners)
    for axis, room in ((0, 250 - 97), (1, 130 - 97)):
        assert corners[:, axis].min() <= 0.03 * room + 1
        assert corners[:, axis].max() >= 0.97 * room - 1
        assert np.histogram(corners[:, axis], 3, (0, room))[0].min() > 35


def test_without_scale_and_rotation_an_image_of_the_right_size_is_itself_or_its_mirror_image() -> None:
    image, mask = photograph(97, 97), labels(97, 97)
    seen = Counter()
    for seed in range(40):
        picture, warped = augment(image, mask, 97, np.random.default_rng(seed), (1.0, 1.0), 0.0)
        mirrored = not np.array_equal(picture, image)
        np.testing.assert_array_equal(picture, np.fliplr(image) if mirrored else image)
        np.testing.assert_array_equal(warped, np.fliplr(mask) if mirrored else mask)
        seen[mirrored] += 1
    assert min(seen[True], seen[False]) >= 8


def test_an_image_smaller_than_the_crop_stands_in_its_middle_untouched() -> None:
    image, mask = photograph(61, 83), labels(61, 83)
    picture, warped = augment(image, mask, 97, np.random.default_rng(0), (1.0, 1.0), 0.0)
    middle = slice(18, 18 + 61), slice(7, 7 + 83)
    rim = np.ones((97, 97), bool)
    rim[middle] = False
    assert (picture[rim] == MEAN_COLOUR).all()
    assert (warped[rim] == 255).all()
    if not np.array_equal(picture[middle], image):
        image, mask = np.fliplr(image), np.fliplr(mask)
    np.testing.assert_array_equal(picture[middle], image)
    np.testing.assert_array_equal(warped[middle], mask)


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.5, 2.0])
def test_scaling_is_that_of_cv2_resize(factor: float) -> None:
    size = 120
    source = round(size / factor)
    image = cv2.GaussianBlur(photograph(source, source), (0, 0), 3)
    mask = np.zeros((source, source), np.uint8)
    mask[source // 4 : source // 2, source // 3 : source // 2] = 1
    expected = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    area = mask.sum() * factor**2
    for seed in range(6):
        picture, warped = augment(image, mask, size, np.random.default_rng(seed), (factor, factor), 0.0)
        inner = slice(2, -2)  # beyond the outermost pixel centres the mean colour begins
        difference = [np.abs(p[inner, inner].astype(int) - expected[inner, inner]) for p in (picture, picture[:, ::-1])]
        assert min(d.max() for d in difference) <= 4
        assert min(d.mean() for d in difference) < 0.6
        assert abs((warped == 1).sum() - area) < 0.1 * area


def test_a_crop_keeps_85_percent_of_the_target_where_it_can() -> None:
    image, mask = coordinates(240, 240), np.zeros((240, 240), np.uint8)
    mask[70:130, 70:130] = 1  # a crop drawn once would keep that much of it in half of the cases
    for seed in range(60):
        _, warped = augment(image, mask, 130, np.random.default_rng(seed), (1.0, 1.0), 0.0)
        assert (warped == 1).sum() >= 0.85 * 60 * 60 - 1


def test_a_target_larger_than_the_crop_still_gives_a_crop() -> None:
    image, mask = coordinates(240, 240), np.ones((240, 240), np.uint8)
    picture, warped = augment(image, mask, 97, np.random.default_rng(0), (1.0, 1.0), 10.0)
    assert (warped == 1).all()
    assert (picture[..., 2] == 255).all()


def test_crops_are_not_drawn_again_for_the_sake_of_other_or_ignored_pixels() -> None:
    image = coordinates(240, 240)
    plain, busy = np.zeros((240, 240), np.uint8), np.zeros((240, 240), np.uint8)
    busy[10:40, 10:40] = 255
    for seed in range(10):
        pictures = [augment(image, m, 97, np.random.default_rng(seed), (1.0, 1.0), 0.0)[0] for m in (plain, busy)]
        np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("shape", [(2, 5, 3, 9, 7)])
def test_normalize_is_imagenets(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = np.moveaxis((np.moveaxis(images, -3, -1) / 255 - mean) / std, -1, -3)
    result = normalize(torch.from_numpy(images))
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


# ---------------------------------------------------------------- loaders


def config_of(root: Path, *overrides: str) -> Config:
    return load_config(
        ROOT / "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml",
        [
            f"data.root={root}",
            f"data.train_list={root}/lists/train.txt",
            f"data.val_list={root}/lists/val.txt",
            "data.image_size=97",
            "data.shots=2",
            "workers=0",
            "device=cpu",
            *overrides,
        ],
    )


def joined(batches: Iterable[Episode]) -> Episode:
    """One batch of all episodes."""
    batches = list(batches)
    pixels, class_ids = (torch.cat([batch[field] for batch in batches]) for field in range(2))
    return Episode(pixels, class_ids, [name for batch in batches for name in batch.names])


def assert_same(a: Episode, b: Episode) -> None:
    for first, second in ((a.pixels, b.pixels), (a.class_id, b.class_id)):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    assert a.names == b.names


def part(episodes: Episode, start: int, stop: int) -> Episode:
    return Episode(*(field[start:stop] for field in episodes))


def eval_batches(root: Path, episodes: int, *overrides: str, seed: int = 3) -> DataLoader[Episode]:
    config = config_of(root, *overrides)
    return build_eval_loader(config, build_eval_sampler(config, build_index(config, "val"), seed), range(episodes))


def train_batches(root: Path, start: int, stop: int, *overrides: str) -> DataLoader[Episode]:
    config = config_of(root, *overrides)
    sampler = build_train_sampler(config, build_index(config, "train"))
    return build_train_loader(config, sampler, start=start, stop=stop)


@pytest.fixture(scope="module")
def evaluated(synthetic: Path) -> Episode:
    return joined(eval_batches(synthetic, 21, "eval.batch_size=1"))


@pytest.fixture(scope="module")
def trained(synthetic: Path) -> Episode:
    return joined(train_batches(synthetic, 0, 24, "train.batch_size=1"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("workers", "batch_size"), [(0, 8), (1, 8), (4, 1)])
def test_evaluation_sees_the_same_for_any_workers_and_batch_size(
    workers: int, batch_size: int, synthetic: Path, evaluated: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)  # there is at most one worker a core
    loader = eval_batches(synthetic, 21, f"workers={workers}", f"eval.batch_size={batch_size}")
    assert loader.num_workers == workers
    batches = list(loader)
    assert [len(batch.names) for batch in batches] == [1] * 21 if batch_size == 1 else [8, 8, 5]
    assert_same(joined(batches), evaluated)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("workers", "batch_size"), [(0, 8), (1, 8), (4, 1)])
def test_training_sees_the_same_for_any_workers_and_batch_size(
    workers: int, batch_size: int, synthetic: Path, trained: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)  # there is at most one worker a core
    options = f"workers={workers}", f"train.batch_size={batch_size}"
    loader = train_batches(synthetic, 0, 24 // batch_size, *options)
    assert loader.num_workers == workers
    batches = list(loader)
    assert [len(batch.names) for batch in batches] == [batch_size] * (24 // batch_size)
    assert_same(joined(batches), trained)


@pytest.mark.parametrize(("workers", "start", "batch_size"), [(0, 2, 8), (2, 5, 1), (0, 4, 3)])
def test_training_resumed_at_a_step_sees_the_tail_of_a_run_from_the_beginning(
    start: int, batch_size: int, workers: int, synthetic: Path, trained: Episode
) -> None:
    options = f"workers={workers}", f"train.batch_size={batch_size}"
    tail = joined(train_batches(synthetic, start, 24 // batch_size, *options))
    assert_same(tail, part(trained, start * batch_size, 24))


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_neither_touch_nor_heed_the_global_random_states(
    workers: int, synthetic: Path, evaluated: Episode, trained: Episode
) -> None:
    torch.manual_seed(1234)
    np.random.seed(1234)
    random.seed(1234)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert_same(joined(eval_batches(synthetic, 21, f"workers={workers}")), evaluated)
    assert_same(joined(train_batches(synthetic, 0, 3, f"workers={workers}")), trained)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1][1])
    assert np.random.get_state()[2] == before[1][2]
    assert random.getstate() == before[2]


def stored(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture
def expected_files(synthetic: Path) -> Iterator[tuple[int, Item, list[Item], int]]:
    """Number, query, supports and class of the evaluated episodes, from the sampler."""
    config = config_of(synthetic)
    index = build_index(config, "val")
    sampler = build_eval_sampler(config, index, 3)

    def generate() -> Iterator[tuple[int, Item, list[Item], int]]:
        for number in range(21):
            query, supports, class_id = sampler(number)
            yield number, index.items[query], [index.items[i] for i in supports], class_id

    return generate()


def test_a_batch_holds_the_files_that_the_sampler_names(
    evaluated: Episode, expected_files: Iterator[tuple[int, Item, list[Item], int]]
) -> None:
    for number, query, supports, class_id in expected_files:
        assert evaluated.class_id[number] == class_id
        truth = stored(query.mask)
        truth = np.where(truth == 255, 255, truth == class_id)
        assert (truth == 1).any()
        pairs = [
            (query, evaluated.query[number], evaluated.query_mask[number]),
            *zip(supports, evaluated.supports[number], evaluated.support_masks[number], strict=True),
        ]
        for item, image, mask in pairs:
            values = stored(item.mask)
            binary = np.where(values == 255, 255, values == class_id).astype(np.uint8)
            picture, fitted = fit(stored(item.image), binary, 97)
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), picture)
            np.testing.assert_array_equal(mask.numpy(), fitted)
            assert str(item.image) in evaluated.names[number]


def test_tensors_of_a_batch_have_the_documented_shapes(synthetic: Path) -> None:
    for batches in (eval_batches(synthetic, 4, "eval.batch_size=4"), train_batches(synthetic, 0, 1)):
        batch = next(iter(batches))
        count = len(batch.names)
        assert batch.query.shape == (count, 3, 97, 97)
        assert batch.query_mask.shape == (count, 97, 97)
        assert batch.supports.shape == (count, 2, 3, 97, 97)
        assert batch.support_masks.shape == (count, 2, 97, 97)
        assert batch.class_id.shape == (count,)
        assert batch.pixels.dtype == torch.uint8 and batch.pixels.is_contiguous()
        assert batch.class_id.dtype == torch.int64
        assert batch.query_classes is None, "nobody asked for them"


def draws_of(root: Path, seed: int) -> list[float]:
    """The first number that each image of 40 training episodes draws for its augmentation."""
    config = config_of(root, "train.batch_size=1", f"seed={seed}")
    sampler = build_train_sampler(config, build_index(config, "train"))
    dataset = build_train_loader(config, sampler, start=0, stop=40).dataset
    draws: list[float] = []

    def transform(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        draws.append(rng.random())
        return image[:9, :9], mask[:9, :9]

    dataset.transform = transform  # type: ignore[attr-defined]
    for number in range(40):
        dataset[number]
    return draws


def test_every_image_of_every_episode_of_every_seed_is_augmented_by_numbers_of_its_own(synthetic: Path) -> None:
    first, second = draws_of(synthetic, 0), draws_of(synthetic, 1)
    assert len(first) == len(second) == 40 * 3
    assert len({*first, *second}) == 2 * 40 * 3
    assert draws_of(synthetic, 0) == first


@pytest.mark.parametrize("fold", range(4))
def test_training_is_about_base_classes_and_evaluation_about_novel_ones(fold: int, synthetic: Path) -> None:
    config = config_of(synthetic, f"data.fold={fold}")
    train = build_train_sampler(config, build_index(config, "train"))
    val = build_eval_sampler(config, build_index(config, "val"), 0)
    novel = set(range(5 * fold + 1, 5 * fold + 6))
    assert {val(number).class_id for number in range(200)} == novel
    assert {train(number).class_id for number in range(400)} == set(range(1, 21)) - novel
    assert (train.seed, val.seed, train.shots, val.shots) == (config.seed, 0, 2, 2)


@pytest.mark.parametrize("min_area", [256, 2000])
@pytest.mark.parametrize("split", ["train", "val"])
def test_samplers_heed_the_area_of_the_config(split: str, min_area: int, synthetic: Path) -> None:
    config = config_of(synthetic, f"data.min_area={min_area}", "data.shots=1")
    index = build_index(config, split)
    sampler = build_train_sampler(config, index) if split == "train" else build_eval_sampler(config, index, 0)
    pixels = index.pixels.toarray()
    largest = pixels[:, 6:21].max(1) if split == "train" else pixels[:, 1:6].max(1)
    in_fold = np.flatnonzero(largest >= min_area).tolist()
    assert sorted(sampler(number).query for number in range(len(sampler))) == in_fold
    assert (len(in_fold) < (largest > 0).sum()) == (min_area == 2000), "the larger area leaves some out"


def test_training_reads_the_training_list_and_evaluation_the_validation_list(synthetic: Path) -> None:
    for split, count in (("train", 60), ("val", 40)):
        index = build_index(config_of(synthetic), split)
        assert index.list_path == synthetic / f"lists/{split}.txt"
        assert len(index.items) == index.pixels.shape[0] == count
        assert all(item.image.name.startswith(split) for item in index.items)


def test_training_heeds_the_scale_and_the_rotation_of_the_config(synthetic: Path) -> None:
    def extents(*options: str) -> np.ndarray:
        """Height and width of what the queries' pictures cover, as shares of their original sizes."""
        episodes = joined(train_batches(synthetic, 0, 3, "data.image_size=257", *options))
        covered = [np.nonzero((picture.numpy().T != MEAN_COLOUR).any(2).T) for picture in episodes.query]
        sides = [[np.ptp(y) + 1, np.ptp(x) + 1] for y, x in covered]
        queries = [re.match("query (.*), supports", name)[1] for name in episodes.names]
        return np.array(sides) / [image_size(Path(query)) for query in queries]

    np.testing.assert_allclose(extents("data.scale=[0.5, 0.5]", "data.rotation=0"), 0.5, atol=0.02)
    np.testing.assert_allclose(extents("data.scale=[1.25, 1.25]", "data.rotation=0"), 1.25, atol=0.02)
    turned = extents("data.scale=[1, 1]", "data.rotation=40").max(1) > 1.02
    assert 4 <= turned.sum() <= 20, "about half of 24"


def test_images_with_novel_classes_are_kept_or_dropped_in_training(synthetic: Path) -> None:
    options = "data.shots=1", "data.min_area=256"
    index = build_index(config_of(synthetic), "train")
    keep = build_train_sampler(config_of(synthetic, *options), index)
    novel = index.pixels[:, 1:6].sum(1) > 0
    assert any(novel[keep(number).query] for number in range(len(keep)))
    drop = build_train_sampler(config_of(synthetic, *options, "data.novel_in_train=drop"), index)
    assert 0 < len(drop) < len(keep)
    for number in range(3 * len(drop)):
        query, supports, _ = drop(number)
        assert not novel[[query, *supports]].any()


# ---------------------------------------------------------------- rounds of an evaluation


def some_index(areas: np.ndarray) -> ClassIndex:
    """Images of 1000 pixels; ``areas`` (images, classes) of them are of a class."""
    items = tuple(Item(Path(f"{i}.jpg"), Path(f"{i}.png")) for i in range(len(areas)))
    return ClassIndex(
        items, csr_array(np.column_stack([1000 - areas.sum(1), areas])), Path("l.txt"), "", 0 * areas[:, 0]
    )


def random_episodes(rng: np.random.Generator, images: int, shots: int, count: int) -> list[EpisodeFiles]:
    chosen = [rng.choice(images, 1 + shots, replace=False).tolist() for _ in range(count)]
    return [EpisodeFiles(query, tuple(supports), int(rng.integers(1, 4))) for query, *supports in chosen]


@pytest.mark.parametrize("limit", [0, 60, 1e9])
@pytest.mark.parametrize("shots", [1, 5])
def test_rounds_hold_every_episode_once_with_its_images_within_the_limit(shots: int, limit: float) -> None:
    rng = np.random.default_rng(shots)
    index = some_index(rng.integers(50, 300, (30, 3)))
    episodes = random_episodes(rng, 30, shots, 80)
    size = EncodingSize(query=10, whole=8)
    rounds = plan_rounds(episodes, index, size, limit)
    assert sorted(number for part in rounds for number in part.episodes) == list(range(80))
    for part in rounds:
        assert {episodes[number].class_id for number in part.episodes} == {part.class_id}
        needed = {(episodes[n].query, "query") for n in part.episodes}
        needed |= {(image, "support") for n in part.episodes for image in episodes[n].supports}
        assert {(image, role) for image, roles in part.images.items() for role in roles} == needed
        memory = sum(size.of(index, image, part.class_id, role) for image, role in needed)
        assert memory <= limit or len(part.episodes) == 1
    assert (len(rounds) == 3) == (limit == 1e9)  # a class each, where memory suffices


def test_a_supports_share_of_memory_follows_its_area_up_to_the_whole_map() -> None:
    index = some_index(np.array([[0], [250], [1000]]))
    size = EncodingSize(query=7, whole=100)
    assert [size.of(index, image, 1, "query") for image in range(3)] == [7, 7, 7]
    assert [size.of(index, image, 1, "support") for image in range(3)] == pytest.approx([2, 32, 100])
