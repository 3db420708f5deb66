"""Folds, lists, images, the class index, episodes, geometry, augmentation and loaders."""

import hashlib
import itertools
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.harness import ROOT, SYNTHETIC, data_at
from util.config import Config, DataConfig, load_config
from util.data import class_index
from util.data.class_index import ClassIndex, Item, load_class_index, read_list
from util.data.dataset import Episode, EpisodeDataset, read_image_and_ids
from util.data.episodes import EpisodeFiles, EpisodeList, EpisodeSampler
from util.data.folds import base_classes, novel_classes
from util.data.images import image_size, read_class_ids, read_image
from util.data.transforms import augment, fit, fitted_size, to_original
from util.engine.build import (
    build_eval_loader,
    build_eval_sampler,
    build_index,
    build_train_sampler,
    training_batches,
)
from util.errors import UserError
from util.photos.images import read_upright

MEAN_COLOUR = (124, 116, 104)  # 255 * (0.485, 0.456, 0.406) = 123.7, 116.3, 103.5

# ---------------------------------------------------------------- folds


def data_config(names: list[str], **changes: object) -> DataConfig:
    lists = {"dataset": "d", "root": "r", "train_list": "t", "val_list": "v"}
    return DataConfig.model_validate({**lists, "classes": names, **changes})


def names(count: int) -> list[str]:
    return [f"class{number}" for number in range(1, count + 1)]


def test_novel_classes_of_pascal_fold_i_are_5i_plus_1_to_5() -> None:
    for fold in range(4):
        novel = novel_classes(data_config(names(20), fold=fold))
        assert novel == tuple(5 * fold + offset for offset in (1, 2, 3, 4, 5))


def test_coco_fold_0_holds_the_classes_that_the_literature_lists() -> None:
    data = load_config(ROOT / "configs/coco/resnet50_fold0_1shot.yaml").data
    assert {data.classes[c - 1] for c in novel_classes(data)} == {
        *("person", "airplane", "boat", "parking meter", "dog", "elephant", "backpack", "suitcase", "sports ball"),
        *("skateboard", "wine glass", "spoon", "sandwich", "hot dog", "chair", "dining table", "mouse", "microwave"),
        *("refrigerator", "scissors"),
    }


@pytest.mark.parametrize("scheme", ["contiguous", "interleaved"])
def test_folds_partition_the_classes_and_base_classes_are_the_others(scheme: str) -> None:
    held_back: list[int] = []
    for fold in range(4):
        data = data_config(names(80), fold=fold, fold_scheme=scheme)
        novel = novel_classes(data)
        assert sorted(novel + base_classes(data)) == list(range(1, 81))
        held_back += novel
    assert sorted(held_back) == list(range(1, 81))


# ---------------------------------------------------------------- lists


@pytest.mark.parametrize(
    "content",
    [
        b"i/a.jpg m/a.png\ni/b.jpg m/b.png",
        b"\xef\xbb\xbfi/a.jpg m/a.png\r\ni/b.jpg m/b.png\r\n",
        "i/a.jpg m/a.png\r\ni/b.jpg m/b.png\r\n".encode("utf-16"),
        b"\n/i/a.jpg\t//m/a.png \n   \n  i/b.jpg     m/b.png\n\n",
    ],
    ids=["plain, no last newline", "windows", "powershell", "blank lines, leading slashes and white space"],
)
def test_a_list_gives_its_lines_in_order_below_the_root(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "l.txt"
    path.write_bytes(content)
    items = read_list(path, Path("data/x"))
    assert items == tuple(Item(Path(f"data/x/i/{n}.jpg"), Path(f"data/x/m/{n}.png")) for n in "ab")


@pytest.mark.parametrize("line", ["only.jpg", "a b.jpg a.png", "/i/../x.jpg  ./x.png"])
def test_a_line_that_is_not_two_paths_or_is_repeated_is_refused_with_its_number(line: str, tmp_path: Path) -> None:
    path = tmp_path / "l.txt"
    path.write_text(f"x.jpg x.png\n\n{line}\n")
    with pytest.raises(UserError, match=rf"{path} line 3: "):
        read_list(path, tmp_path)


# ---------------------------------------------------------------- images

LABELS = np.array([[0, 1, 2], [20, 254, 255]], np.uint8).repeat(9, 0).repeat(7, 1)  # (18, 21)


def photograph(height: int, width: int) -> np.ndarray:
    """An image (H, W, 3) that does not compress to nothing."""
    noise = np.random.default_rng(7).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3)).astype(np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def test_an_image_is_read_as_predict_reads_it_with_transparent_pixels_in_white(tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    clear = np.arange(16).reshape(4, 4) > 8
    Image.fromarray(np.dstack([pixels, 255 * ~clear]).astype(np.uint8)).save(tmp_path / "rgba.png")
    Image.fromarray(pixels[..., 0]).convert("P").save(tmp_path / "palette.png", transparency=0)
    for name, image, hidden in (("rgba.png", pixels, clear), ("palette.png", pixels[..., :1], pixels[..., 0] == 0)):
        expected = np.where(hidden[..., None], 255, image + np.zeros(3, np.uint8))
        np.testing.assert_array_equal(read_image(tmp_path / name), expected)
        np.testing.assert_array_equal(read_upright(tmp_path / name).pixels, expected)


def test_class_ids_are_the_same_however_they_are_stored(tmp_path: Path) -> None:
    palette = Image.fromarray(LABELS)
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    assert palette.mode == "P"
    grey, deep = Image.fromarray(LABELS), Image.fromarray(LABELS.astype(np.uint16))
    for image, suffix in itertools.product(
        (palette, grey, grey.convert("RGB"), grey.convert("LA"), deep), ("png", "tif")
    ):
        image.save(tmp_path / f"m.{suffix}")
        mask = read_class_ids(tmp_path / f"m.{suffix}")
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, LABELS)


def test_the_orientation_tag_of_a_camera_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph(40, 70)).save(tmp_path / "i.jpg", exif=exif)
    assert read_image(tmp_path / "i.jpg").shape == (40, 70, 3)
    assert image_size(tmp_path / "i.jpg") == (40, 70)


# ---------------------------------------------------------------- class index


def write_tree(root: Path, masks: list[np.ndarray]) -> Path:
    """Images, masks and a list below ``root``; the path of the list."""
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for number, mask in enumerate(masks):
        Image.fromarray(np.zeros((*mask.shape, 3), np.uint8)).save(root / f"images/{number}.png")
        Image.fromarray(mask).save(root / f"masks/{number}.png")
    lines = [f"images/{number}.png masks/{number}.png\n" for number in range(len(masks))]
    (root / "train.txt").write_text("".join(lines))
    return root / "train.txt"


def load(path: Path, num_classes: int = 6) -> ClassIndex:
    return load_class_index(path, path.parent, num_classes, progress=False)


def assert_counts(path: Path, masks: Iterable[np.ndarray], num_classes: int = 6) -> None:
    expected = [np.bincount(mask.ravel(), minlength=256)[: num_classes + 1] for mask in masks]
    np.testing.assert_array_equal(load(path, num_classes).pixels, expected)


@pytest.fixture
def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.choice([*range(7), 255], tuple(rng.integers(5, 30, 2))).astype(np.uint8) for _ in range(12)]


@pytest.fixture
def path(masks: list[np.ndarray], tmp_path: Path) -> Path:
    """The list of ``masks``."""
    return write_tree(tmp_path, masks)


def test_the_index_counts_every_value_of_every_mask(masks: list[np.ndarray], path: Path) -> None:
    index = load(path)
    assert_counts(path, masks)
    assert index.ignored.tolist() == [int((mask == 255).sum()) for mask in masks]
    assert (index.items, index.list_path) == (read_list(path, path.parent), path)
    assert index.list_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for class_id in range(1, 7):
        areas = [int((mask == class_id).sum()) for mask in masks]
        for area in {*areas, min(areas) + 1, max(areas) + 1}:
            assert index.qualifying(class_id, area).tolist() == [i for i, a in enumerate(areas) if a >= area]


def test_a_mask_list_or_number_of_classes_that_changes_is_noticed_before_and_after_indexing(
    masks: list[np.ndarray], path: Path
) -> None:
    masks[1][:] = 1
    file = path.parent / "masks/1.png"
    Image.fromarray(masks[1]).save(file)
    load(path)
    before = file.stat()
    masks[1][:] = 5  # the file has the same size
    Image.fromarray(masks[1]).save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert file.stat().st_size == before.st_size
    assert_counts(path, masks)
    assert_counts(path, masks, num_classes=9)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)))
    assert_counts(path, masks[::-1])
    index = load(path)
    Image.fromarray(0 * masks[1]).save(file)
    with pytest.raises(UserError, match=r"1\.png has changed since it was indexed"):
        read_image_and_ids(index, len(masks) - 2)


@pytest.mark.parametrize("writable", [True, False])
def test_the_index_comes_from_a_cache_next_to_the_list_or_in_the_users_folder(
    writable: bool, masks: list[np.ndarray], path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if not writable:
        path.with_name("train.txt.index.npz").mkdir()  # nothing can be written there, not even by root
    assert_counts(path, masks)
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == (not writable)
    monkeypatch.setattr(class_index, "count_pixels", None)  # no mask is counted again
    assert_counts(path, masks)


# ---------------------------------------------------------------- episodes

MIN_AREA = 2048


def random_index(seed: int = 0) -> ClassIndex:
    """60 images, in each of which each of 8 classes is absent, small or large."""
    rng = np.random.default_rng(seed)
    small, large = rng.integers(1, MIN_AREA, (60, 9)), rng.integers(MIN_AREA, 9 * MIN_AREA, (60, 9))
    return index_of(np.choose(rng.choice(3, (60, 9), p=[0.6, 0.15, 0.25]), [0, small, large]))


def index_of(pixels: np.ndarray, photos: Sequence[int] | None = None) -> ClassIndex:
    """An index of these counts; ``photos`` numbers the image of each line, by default each its own."""
    numbers = photos or range(len(pixels))
    items = tuple(Item(Path(f"{number}.jpg"), Path(f"{line}.png")) for line, number in enumerate(numbers))
    return ClassIndex(items, pixels, Path("some/list.txt"), "", np.zeros(len(pixels), int))


def everywhere(images: int) -> ClassIndex:
    """Every image shows classes 2, 3 and 5."""
    pixels = np.zeros((images, 9), int)
    pixels[:, [2, 3, 5]] = MIN_AREA
    return index_of(pixels)


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
        assert query in in_fold and class_id in classes and index.pixels[query, class_id] > 0
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


def test_an_episode_is_a_function_of_seed_and_number_alone() -> None:
    numbers = [*range(150), 10_000, 123_456_789, 2**40]
    sampler = sampler_of(random_index())
    expected = {number: sampler(number) for number in numbers}
    np.random.seed(5)
    torch.manual_seed(5)
    fresh = sampler_of(random_index())
    assert {number: fresh(number) for number in random.Random(0).sample(numbers, len(numbers))} == expected


def test_the_seed_changes_the_order_of_queries_the_classes_and_the_supports_each() -> None:
    samplers = [sampler_of(everywhere(30), seed=seed, shots=1) for seed in range(10)]
    for field in ("query", "class_id", "supports"):
        assert len({tuple(getattr(sampler(number), field) for number in range(30)) for sampler in samplers}) == 10


def test_a_query_is_about_each_of_its_classes_and_each_other_image_supports_it_equally_often() -> None:
    sampler = sampler_of(everywhere(6), shots=2)
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


def test_an_image_with_several_lines_is_never_its_own_support() -> None:
    """Images 0 ... 19 have a line for class 2 and one for class 3; images 0 ... 4 have a second mask of class 3."""
    pixels = np.zeros((45, 9), int)
    pixels[:20, 2] = pixels[20:, 3] = MIN_AREA
    photo_of = [*range(20), *range(20), *range(5)]
    index = index_of(pixels, photo_of)
    sampler = sampler_of(index, classes=(2, 3), shots=4)
    episodes = [sampler(number) for number in range(2000)]
    assert all(len({photo_of[line] for line in (query, *supports)}) == 5 for query, supports, _ in episodes)
    assert {episode.query for episode in episodes} == set(range(45))
    chosen = Counter(line for episode in episodes if episode.class_id == 3 for line in episode.supports)
    assert chosen.keys() == set(range(20, 45))
    assert all(abs(chosen[n] + chosen.get(n + 20, 0) - sum(chosen.values()) / 20) < 85 for n in range(20, 40))
    with pytest.raises(UserError, match="'class3' has 20 images"):
        sampler_of(index, classes=(3,), shots=20)
    pixels[30, 7] = 1
    avoiding = sampler_of(index_of(pixels, photo_of), classes=(2, 3), avoid=(7,))
    assert {avoiding(number).query for number in range(500)} == set(range(45)) - {10, 30}


# ---------------------------------------------------------------- geometry of evaluation


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (375, 500, 473, (352, 472)),  # 375 * 473 / 500 = 354.75
        (240, 160, 161, (160, 104)),  # 107.33
        (8, 1000, 473, (8, 472)),  # 3.78, but not nothing
    ],
)
def test_fitted_sizes_computed_by_hand(height: int, width: int, size: int, expected: tuple[int, int]) -> None:
    assert fitted_size(height, width, size) == expected
    image, mask = fit(np.full((height, width, 3), 9, np.uint8), np.ones((height, width), np.uint8), size)
    assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
    assert (mask.shape, mask.dtype) == ((size, size), np.uint8)
    inside = np.zeros((size, size), bool)
    inside[: expected[0], : expected[1]] = True
    np.testing.assert_array_equal(image, np.where(inside, 9, 0)[..., None].repeat(3, 2))
    np.testing.assert_array_equal(mask, np.where(inside, 1, 255))


def resample(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear samples of (H, W) at all rows x columns, positions beyond the rim clamped."""
    down = np.stack([np.interp(rows, np.arange(len(values)), column) for column in values.T], 1)
    return np.stack([np.interp(columns, np.arange(values.shape[1]), row) for row in down])


def half_pixel(length: int, source: int) -> np.ndarray:
    """Positions of the centres of ``length`` pixels among ``source`` pixels of the same extent."""
    return (np.arange(length) + 0.5) * source / length - 0.5


def test_fit_resizes_images_bilinearly_and_takes_mask_values_from_their_own_position() -> None:
    height, width = 300, 211
    image, mask = photograph(height, width), labels(height, width)
    fitted_image, fitted = fit(image, mask, 97)
    h, w = fitted_size(height, width, 97)
    rows, columns = half_pixel(h, height), half_pixel(w, width)
    for channel in range(3):
        expected = resample(image[..., channel].astype(float), rows, columns)
        assert np.abs(fitted_image[:h, :w, channel] - expected).max() <= 1
    reach = max(1.0, 0.5 * height / h + 0.5)
    for (i, y), (j, x) in itertools.product(enumerate(rows), enumerate(columns)):
        top, left = max(0, int(np.floor(y - reach))), max(0, int(np.floor(x - reach)))
        assert fitted[i, j] in mask[top : int(np.ceil(y + reach)) + 1, left : int(np.ceil(x + reach)) + 1]


@pytest.mark.parametrize(("height", "width"), [(100, 61), (33, 47)])
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


# ---------------------------------------------------------------- augmentation


def coordinates(height: int, width: int) -> np.ndarray:
    """An image that encodes x and y of every pixel, as finely as it can, and by 255 that it is inside the image."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * unit(width), y * unit(height), np.full_like(x, 255)], -1).astype(np.uint8)


def unit(length: int) -> int:
    """The step from one pixel to the next in an image of coordinates."""
    return 255 // (length - 1)


def labels(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(0).choice([0, 1, 255], (height // 15 + 1, width // 15 + 1), p=[0.5, 0.4, 0.1])
    return small.astype(np.uint8).repeat(15, 0).repeat(15, 1)[:height, :width]


def recover(image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """From a warped image of coordinates: the 2x3 map from its (x, y) to the source's, and which are inside."""
    inside = cv2.erode((image[..., 2] == 255).astype(np.uint8), np.ones((3, 3), np.uint8)) == 1
    y, x = np.nonzero(inside)
    source = image[inside][:, :2] / [unit(width), unit(height)]
    solution = np.linalg.lstsq(np.stack([x, y, np.ones_like(x)], 1).astype(float), source, rcond=None)[0]
    return solution.T, inside


def test_image_and_mask_go_the_same_way() -> None:
    height, width = 150, 210
    image, mask = coordinates(height, width), labels(height, width)
    for seed in range(40):
        warped, warped_mask = augment(image, mask, 1, 121, np.random.default_rng(seed), (0.8, 1.25), 10.0)
        to_source, inside = recover(warped, height, width)
        y, x = np.nonzero(inside)
        position = (to_source @ np.stack([x, y, np.ones_like(x)])).T
        expected = mask[position[:, 1].round().astype(int), position[:, 0].round().astype(int)]
        edge = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        sure = ~edge[position[:, 1].round().astype(int), position[:, 0].round().astype(int)]
        assert sure.mean() > 0.5
        np.testing.assert_array_equal(warped_mask[inside][sure], expected[sure])


def test_positions_beyond_the_image_hold_the_mean_colour_and_are_ignored() -> None:
    image, mask = coordinates(60, 80), np.ones((60, 80), np.uint8)
    for seed in range(30):
        warped, warped_mask = augment(image, mask, 1, 121, np.random.default_rng(seed), (0.8, 1.25), 10.0)
        to_source, _ = recover(warped, 60, 80)
        y, x = np.mgrid[:121, :121]
        position = to_source @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
        gap = np.max([-position[0], position[0] - 79, -position[1], position[1] - 59], 0).reshape(121, 121)
        # a mask's pixel reaches half a pixel beyond its centre, interpolation a whole one; 0.2 for the recovery
        assert (warped_mask[gap > 0.7] == 255).all()
        assert (warped_mask[gap < 0.3] == 1).all()
        assert (warped[gap > 1.2] == MEAN_COLOUR).all()
        assert (gap > 1.2).mean() > 0.3


def test_scale_rotation_and_flip_are_drawn_as_the_paper_says() -> None:
    """Scale uniform in its range; rotation within +-10 degrees in half of the images; flips in half of them."""
    image, mask = coordinates(200, 200), np.zeros((200, 200), np.uint8)
    scales, angles, flips = [], [], []
    for seed in range(400):
        warped, _ = augment(image, mask, 1, 161, np.random.default_rng(seed), (0.8, 1.25), 10.0)
        to_target = np.linalg.inv(recover(warped, 200, 200)[0][:, :2])
        determinant = np.linalg.det(to_target)
        scales.append(np.sqrt(abs(determinant)))
        flips.append(determinant < 0)
        angles.append(np.degrees(np.arctan2(to_target[1, 0], to_target[1, 1])))
        # nothing but these three: no shear, no different scale along x and y
        np.testing.assert_allclose(to_target @ to_target.T, abs(determinant) * np.eye(2), atol=0.01)
    assert -10.02 < min(angles) < -9 and 9 < max(angles) < 10.02
    scales, angles = np.array(scales), np.abs(angles)
    assert 0.799 < scales.min() < 0.82 and 1.23 < scales.max() < 1.251
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
        warped, _ = augment(image, mask, 1, 97, np.random.default_rng(seed), (1.0, 1.0), 0.0)
        assert (warped[..., 2] == 255).all()
        corners.append(warped[..., :2].reshape(-1, 2).min(0) // [unit(250), unit(130)])
    corners = np.array(corners)
    for axis, room in ((0, 250 - 97), (1, 130 - 97)):
        assert corners[:, axis].min() <= 0.03 * room + 1
        assert corners[:, axis].max() >= 0.97 * room - 1
        assert np.histogram(corners[:, axis], 3, (0, room))[0].min() > 35


def test_an_image_smaller_than_the_crop_is_in_its_middle_untouched() -> None:
    image, mask = photograph(61, 83), labels(61, 83)
    warped, warped_mask = augment(image, mask, 1, 97, np.random.default_rng(0), (1.0, 1.0), 0.0)
    middle = slice(18, 18 + 61), slice(7, 7 + 83)
    if not np.array_equal(warped[middle], image):
        image, mask = np.fliplr(image), np.fliplr(mask)
    np.testing.assert_array_equal(warped[middle], image)
    np.testing.assert_array_equal(warped_mask[middle], mask)


@pytest.mark.parametrize("target", [1, 7])
def test_a_crop_keeps_85_percent_of_the_target_if_it_can(target: int) -> None:
    image, mask = coordinates(240, 240), np.zeros((240, 240), np.uint8)
    mask[70:130, 70:130] = target  # a crop drawn once would keep that much of it in half of the cases
    mask[180:] = 3  # another class: no crop is drawn again for it
    for seed in range(60):
        _, warped_mask = augment(image, mask, target, 130, np.random.default_rng(seed), (1.0, 1.0), 0.0)
        assert (warped_mask == target).sum() >= 0.85 * 60 * 60 - 1
    mask[:] = target  # larger than the crop
    _, warped_mask = augment(image, mask, target, 97, np.random.default_rng(0), (1.0, 1.0), 10.0)
    assert (warped_mask == target).all()


def test_a_share_of_the_images_is_blurred() -> None:
    image, mask = photograph(97, 97), labels(97, 97)
    plain, blurred, half = (
        [augment(image, mask, 1, 97, np.random.default_rng(seed), (1.0, 1.0), 0.0, blur)[0] for seed in range(40)]
        for blur in (0.0, 1.0, 0.5)
    )
    for sharp, soft in zip(plain, blurred, strict=True):
        np.testing.assert_array_equal(soft, cv2.GaussianBlur(sharp, (5, 5), 0))
    assert 8 <= sum(np.array_equal(*pair) for pair in zip(half, plain, strict=True)) <= 32


# ---------------------------------------------------------------- loaders


def config_of(root: Path, *overrides: str) -> Config:
    given = ["data.image_size=97", "data.shots=2", "workers=0", "device=cpu"]
    return load_config(SYNTHETIC, [*data_at(root), *given, *overrides])


def joined(batches: Iterable[Episode]) -> Episode:
    """One batch of all episodes."""
    pixels, class_ids, targets, names = zip(*batches, strict=True)
    return Episode(torch.cat(pixels), torch.cat(class_ids), torch.cat(targets), [n for batch in names for n in batch])


def assert_same(a: Episode, b: Episode) -> None:
    for first, second in zip(a[:3], b[:3], strict=True):
        assert first.dtype == second.dtype and torch.equal(first, second)
    assert a.names == b.names


def eval_batches(root: Path, *overrides: str) -> Iterable[Episode]:
    config = config_of(root, *overrides)
    return build_eval_loader(config, build_eval_sampler(config, build_index(config, "val"), 3), range(21))


def train_batches(root: Path, start: int, stop: int, *overrides: str) -> list[Episode]:
    config = config_of(root, *overrides)
    sampler = build_train_sampler(config, build_index(config, "train"))
    return list(training_batches(config, sampler, start=start, stop=stop))


@pytest.fixture(scope="module")
def evaluated(synthetic: Path) -> Episode:
    return joined(eval_batches(synthetic, "eval.batch_size=1"))


@pytest.fixture(scope="module")
def trained(synthetic: Path) -> Episode:
    return joined(train_batches(synthetic, 0, 24, "train.batch_size=1"))


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 8), (1, 8), (2, 1)])
def test_evaluation_and_training_see_the_same_for_any_workers_and_batch_size(
    workers: int, batch_size: int, synthetic: Path, evaluated: Episode, trained: Episode
) -> None:
    """Neither depends on global random states."""
    torch.manual_seed(1234)
    np.random.seed(1234)
    random.seed(1234)
    options = f"workers={workers}", f"eval.batch_size={batch_size}", f"train.batch_size={batch_size}"
    batches = list(eval_batches(synthetic, *options))
    assert [len(batch.names) for batch in batches] == ([1] * 21 if batch_size == 1 else [8, 8, 5])
    assert_same(joined(batches), evaluated)
    batches = train_batches(synthetic, 0, 24 // batch_size, *options)
    assert [len(batch.names) for batch in batches] == [batch_size] * (24 // batch_size)
    assert_same(joined(batches), trained)


@pytest.mark.parametrize(("start", "batch_size"), [(5, 1), (4, 3)])
def test_training_resumed_at_a_step_sees_the_tail_of_a_run_from_the_beginning(
    start: int, batch_size: int, synthetic: Path, trained: Episode
) -> None:
    tail = joined(train_batches(synthetic, start, 24 // batch_size, f"train.batch_size={batch_size}"))
    assert_same(tail, Episode(*(field[start * batch_size :] for field in trained)))


def test_a_batch_holds_the_files_that_the_sampler_names(synthetic: Path, evaluated: Episode) -> None:
    config = config_of(synthetic)
    index = build_index(config, "val")
    sampler = build_eval_sampler(config, index, 3)
    for number in range(21):
        query, supports, class_id = sampler(number)
        assert evaluated.class_id[number] == evaluated.target[number] == class_id
        pairs = [
            (evaluated.query[number], evaluated.query_mask[number]),
            *zip(evaluated.supports[number], evaluated.support_masks[number], strict=True),
        ]
        for line, (image, mask) in zip((query, *supports), pairs, strict=True):
            item = index.items[line]
            ids = np.asarray(Image.open(item.mask))
            assert (ids == class_id).any() and str(item.image) in evaluated.names[number]
            pixels, fitted = fit(np.asarray(Image.open(item.image)), ids, 97)
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)
            np.testing.assert_array_equal(mask.numpy(), np.where(fitted == 255, 255, fitted == class_id))
            if line == query:
                np.testing.assert_array_equal(evaluated.query_classes[number].numpy(), fitted)
    assert evaluated.supports.shape == (21, 2, 3, 97, 97)


def test_an_episode_about_a_mask_of_one_class_has_its_class_id(tmp_path: Path) -> None:
    """In the mask 1 is the target and 0 the rest; the class has any id."""
    mask = np.array([[0, 1, 1], [0, 255, 0]], np.uint8)
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "i.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    items = (Item(tmp_path / "i.png", tmp_path / "m.png", class_id=300),) * 2
    index = ClassIndex(items, np.full((2, 301), 3), tmp_path / "l.txt", "", np.zeros(2, int))
    episodes = EpisodeList(index, [EpisodeFiles(0, (1,), 300)])
    episode = EpisodeDataset(episodes, transform=lambda image, ids, target, rng: (image, ids * (target == 1)))[0]
    for found in (episode.query_mask, episode.support_masks[0]):
        np.testing.assert_array_equal(found.numpy(), mask)
    np.testing.assert_array_equal(episode.query_classes.numpy(), np.where(mask == 1, 300, mask.astype(int)))


def test_every_image_of_every_episode_of_every_seed_is_augmented_by_numbers_of_its_own(synthetic: Path) -> None:
    draws: list[float] = []

    def transform(image: np.ndarray, _: np.ndarray, __: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        draws.append(rng.random())
        return image[:9, :9], image[:9, :9, 0]

    for seed in (0, 1, 0):
        config = config_of(synthetic, f"seed={seed}")
        dataset = EpisodeDataset(build_train_sampler(config, build_index(config, "train")), transform=transform)
        for number in range(40):
            dataset[number]
    assert len(draws) == 3 * 120 and len(set(draws)) == 2 * 120
    assert draws[240:] == draws[:120]


def test_training_is_about_base_classes_and_evaluation_about_novel_ones(synthetic: Path) -> None:
    config = config_of(synthetic, "data.fold=2")
    train = build_train_sampler(config, build_index(config, "train"))
    val = build_eval_sampler(config, build_index(config, "val"), 0)
    novel = {11, 12, 13, 14, 15}
    assert {val(number).class_id for number in range(200)} == novel
    assert {train(number).class_id for number in range(400)} == set(range(1, 21)) - novel
    assert (train.seed, val.seed, train.shots, val.shots) == (config.seed, 0, 2, 2)


def test_each_split_reads_its_own_list(synthetic: Path) -> None:
    for split, count in (("val", 40), ("train", 60)):
        index = build_index(config_of(synthetic), split)
        assert len(index.items) == count and all(item.image.name.startswith(split) for item in index.items)
