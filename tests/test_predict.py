"""predict.py and torch.hub: the real command lines on real files, against the segmenter and plain loops over pixels."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import ROOT, scene, write_checkpoint

import predict
from tests import harness
from tests.harness import Result, beside_progress_bars, process, refused, succeeded
from util.errors import UserError
from util.segment import pictures, queries
from util.segment.predictions import write_outputs
from util.segment.queries import QueryFile, read_ahead
from util.segment.segmenter import NTRESegmenter

ORIENTATION = 0x0112


def call(*arguments: object) -> Result:
    """Run predict.py in this process."""
    return harness.call(predict, *arguments)


def save(path: Path, pixels: np.ndarray, orientation: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    picture.save(path, exif=exif)
    return path


def load(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


SUPPORTS = [scene(1), scene(2, 40, 66)]
QUERIES = [scene(seed, height, width)[0] for seed, height, width in ((3, 50, 60), (4, 64, 40), (5, 48, 48))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Checkpoint, two supports with masks, and three queries; nothing is written here by tests.

    At the threshold in 'threshold' the first support finds half of the first query.
    """
    root = tmp_path_factory.mktemp("predict")
    write_checkpoint(root / "small.pt")
    for n, (picture, mask) in enumerate(SUPPORTS):
        save(root / f"s{n}.png", picture)
        save(root / f"m{n}.png", mask)
        save(root / f"ids{n}.png", np.where(mask, 3, 7).astype(np.uint8))
    for n, picture in enumerate(QUERIES):
        save(root / f"q{n}.png", picture)
    found = NTRESegmenter.from_checkpoint(root / "small.pt", device="cpu").segment(*SUPPORTS[0], QUERIES[0])
    (root / "threshold").write_text(str(np.median(found.probability)))
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def segmenter(world: Path) -> NTRESegmenter:
    return NTRESegmenter.from_checkpoint(world / "small.pt", device="cpu")


def supported(world: Path) -> list[object]:
    """Options that say what is to be found."""
    supports, masks = ([world / f"{letter}{n}.png" for n in range(2)] for letter in "sm")
    return ["--checkpoint", world / "small.pt", "--device", "cpu", "--support", *supports, "--mask", *masks]


def one_support(world: Path, support: Path, mask: Path, *options: object) -> list[object]:
    pair = ["--support", support, "--mask", mask, "--threshold", (world / "threshold").read_text()]
    return ["--checkpoint", world / "small.pt", "--device", "cpu", *pair, *options]


def mask_of(world: Path, out: Path, *options: object) -> np.ndarray:
    """Mask that predict.py writes for the first query."""
    succeeded(call(*options, "--query", world / "q0.png", "--out", out))
    mask = load(out / "q0_mask.png")
    assert 0.05 < (mask > 0).mean() < 0.95
    return mask


def test_predict_writes_mask_and_overlay_of_files_and_folders(
    world: Path, segmenter: NTRESegmenter, tmp_path: Path
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "photos/results"
    save(folder / "first.png", QUERIES[0])
    save(folder / "deep/er/first.PNG", QUERIES[1])
    save(folder / ".hidden/x.png", QUERIES[1])
    save(folder / ".x.png", QUERIES[1])
    save(out / "old_overlay.jpg", QUERIES[1])
    (folder / "notes.txt").write_text("no picture")
    options = [*supported(world), "--query", world / "q2.png", "photos", "--out", out]
    result = succeeded(process(ROOT / "predict.py", *options, cwd=tmp_path))
    assert "picture/s" in result.err
    names = {"q2": QUERIES[2], "first": QUERIES[0], "deep/er/first": QUERIES[1]}
    expected = {f"{name}_{ending}" for name in names for ending in ("mask.png", "overlay.jpg")}
    assert files_in(out) == {*expected, "old_overlay.jpg", "predict.json"}
    for name, picture in names.items():
        mask, overlay = load(out / f"{name}_mask.png"), load(out / f"{name}_overlay.jpg")
        probability = segmenter.segment(*zip(*SUPPORTS, strict=True), picture).mask
        np.testing.assert_array_equal(mask, 255 * probability.astype(np.uint8))
        assert overlay.shape == picture.shape
        assert 0 < (mask > 0).mean() < 1
        untouched = np.abs(overlay.astype(int) - picture)[mask == 0].mean()
        assert untouched < np.abs(overlay.astype(int) - picture)[mask > 0].mean()


def test_maps_are_the_segmenters_in_eight_bits(world: Path, segmenter: NTRESegmenter, tmp_path: Path) -> None:
    succeeded(call(*supported(world), "--query", world / "q0.png", "--out", tmp_path, "--maps"))
    result = segmenter.segment(*zip(*SUPPORTS, strict=True), QUERIES[0])
    for name in ("probability", "prior", "bg", "distractor"):
        written = load(tmp_path / f"q0_{name}.png")
        assert written.dtype == np.uint8
        assert np.abs(written / 255 - getattr(result, name)).max() <= 0.5 / 255 + 1e-6


def test_the_threshold_is_the_masks(world: Path, segmenter: NTRESegmenter, tmp_path: Path) -> None:
    probability = segmenter.segment(*zip(*SUPPORTS, strict=True), QUERIES[0]).probability
    threshold = float(np.quantile(probability, 0.9))
    mask = mask_of(world, tmp_path, *supported(world), "--threshold", threshold)
    np.testing.assert_array_equal(mask > 0, probability > threshold)
    assert 0.05 < (mask > 0).mean() < 0.15


# Encodings and orientation


def _rgba(mask: np.ndarray) -> Image.Image:
    picture = Image.fromarray(SUPPORTS[0][0]).convert("RGBA")
    picture.putalpha(Image.fromarray(255 * mask.astype(np.uint8)))
    return picture


def _palette(values: np.ndarray) -> Image.Image:
    picture = Image.fromarray(values.astype(np.uint8))
    picture.putpalette([7 * n % 256 for n in range(768)])
    return picture


@pytest.mark.parametrize(
    ("encode", "options"),
    [
        (lambda mask: Image.fromarray(255 * mask.astype(np.uint8)), ()),
        (lambda mask: Image.fromarray(255 * mask.astype(np.uint8)).convert("RGB"), ()),
        (_rgba, ()),
        (_palette, ()),
        (lambda mask: _palette(np.where(mask, 3, 9)), ("--class-id", 3)),
        (lambda mask: Image.fromarray(np.where(mask, 300, 9).astype(np.uint16)), ("--class-id", 300)),
    ],
    ids=["0 and 255", "rgb", "rgba", "palette", "palette of ids", "16-bit ids"],
)
def test_a_mask_file_is_the_same_in_every_encoding(
    world: Path, tmp_path: Path, encode: Callable[[np.ndarray], Image.Image], options: tuple[object, ...]
) -> None:
    encode(SUPPORTS[0][1]).save(tmp_path / "mask.png")
    reference = mask_of(world, tmp_path / "bits", *one_support(world, world / "s0.png", world / "m0.png"))
    other = mask_of(world, tmp_path / "other", *one_support(world, world / "s0.png", tmp_path / "mask.png", *options))
    np.testing.assert_array_equal(other, reference)


STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda seen: seen[:, ::-1],
    6: lambda seen: np.rot90(seen, 1),  # to be turned clockwise for display
    5: lambda seen: np.swapaxes(seen, 0, 1),
}
"""EXIF orientation: pixels as stored, of a picture as seen"""


@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_that_exif_turns_gives_what_the_turned_picture_gives(
    world: Path, tmp_path: Path, orientation: int
) -> None:
    picture, mask = SUPPORTS[0]
    turn = STORED[orientation]
    support = save(tmp_path / "s.png", np.ascontiguousarray(turn(picture)), orientation)
    stored_mask = save(tmp_path / "m.png", np.ascontiguousarray(turn(mask)))
    tagged_mask = save(tmp_path / "tagged.png", np.ascontiguousarray(turn(mask)), orientation)
    save(tmp_path / "q0.png", np.ascontiguousarray(turn(QUERIES[0])), orientation)
    upright = mask_of(world, tmp_path / "upright", *one_support(world, world / "s0.png", world / "m0.png"))
    masks = [stored_mask, tagged_mask, *([world / "m0.png"] if orientation > 4 else [])]
    for number, given in enumerate(masks):
        turned = mask_of(tmp_path, tmp_path / str(number), *one_support(world, support, given))
        np.testing.assert_array_equal(turned, upright)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_exif_turns_a_file_of_any_format_and_the_mask_of_its_stored_pixels(tmp_path: Path, suffix: str) -> None:
    picture, mask = SUPPORTS[0]
    path = save(tmp_path / f"s.{suffix}", np.ascontiguousarray(STORED[6](picture)), 6)
    read = pictures.read_picture(path)
    assert np.abs(read.pixels.astype(int) - picture).mean() < 20  # lossy; turned otherwise it would not even fit
    for seen in (mask, STORED[6](mask)):
        values = pictures.read_mask_on(read, save(tmp_path / "m.png", np.ascontiguousarray(seen)))
        np.testing.assert_array_equal(values, mask)


def test_an_untagged_rotated_query_is_not_turned(world: Path, tmp_path: Path) -> None:
    save(tmp_path / "q0.png", np.ascontiguousarray(np.rot90(QUERIES[0])))
    options = one_support(world, world / "s0.png", world / "m0.png")
    mask = mask_of(tmp_path, tmp_path / "out", *options)
    assert mask.shape == QUERIES[0].shape[1::-1]


# Continuing


def test_a_second_run_leaves_what_is_finished_and_does_what_is_not(world: Path, tmp_path: Path) -> None:
    given = [world / f"q{n}.png" for n in range(3)]
    options = [*supported(world), "--query", *given, "--out", tmp_path]
    assert "finished" not in succeeded(call(*options)).out
    for path in tmp_path.glob("q*"):
        os.utime(path, (1, 1))
    (tmp_path / "q1_overlay.jpg").unlink()
    assert "2 of 3 queries are finished already" in succeeded(call(*options)).out
    renewed = {path.name for path in tmp_path.glob("q*") if path.stat().st_mtime > 1}
    assert renewed == {"q1_mask.png", "q1_overlay.jpg"}
    assert "finished" not in succeeded(call(*options, "--overwrite")).out
    assert all(path.stat().st_mtime > 1 for path in tmp_path.glob("q*"))


def test_predictions_of_other_settings_are_not_mixed(world: Path, tmp_path: Path) -> None:
    options = ["--query", world / "q0.png", "--out", tmp_path]
    succeeded(call(*supported(world), *options))
    refused(call(*supported(world), *options, "--threshold", 0.7), tmp_path, "another threshold", "--overwrite")
    one = one_support(world, world / "s0.png", world / "m0.png")
    refused(call(*one, *options), tmp_path, "another targets, another threshold", "--overwrite")
    succeeded(call(*one, *options, "--overwrite"))


def test_a_file_that_cannot_be_written_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_outputs(tmp_path, "q", {"mask.png": Image.new("L", (2, 2))})
    assert files_in(tmp_path) == set()


def test_only_a_few_pictures_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(queries, "read_picture", read.append)
    streamed = read_ahead([QueryFile(Path(str(n)), str(n)) for n in range(100)])
    for done in range(1, 101):
        query, reading = next(streamed)
        reading.result()
        time.sleep(0.0005)
        assert query.name == str(done - 1)
        assert done <= len(read) <= done + queries.AHEAD


# Truth


def naive_iou(mask: np.ndarray, truth: np.ndarray, target: int, ignored: int | None) -> float:
    both = either = 0
    for predicted, value in zip(mask.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if value == ignored:
            continue
        both += predicted == 255 and value == target
        either += predicted == 255 or value == target
    return 100 * both / either


def test_iou_with_a_truth_is_that_of_a_loop_over_pixels(world: Path, tmp_path: Path) -> None:
    ground_truths = {f"q{n}": scene(n + 3, *QUERIES[n].shape[:2])[1] for n in range(3)}
    for name, truth in ground_truths.items():
        save(tmp_path / f"truth/{name}.png", 255 * truth.astype(np.uint8))
    out = tmp_path / "out"
    given = [world / f"q{n}.png" for n in range(3)]
    options = [*supported(world), "--query", *given, "--out", out, "--ground-truth", tmp_path / "truth"]
    succeeded(call(*options))
    report = json.loads((out / "iou.json").read_text())
    expected = {
        name: naive_iou(load(out / f"{name}_mask.png"), truth, True, None) for name, truth in ground_truths.items()
    }
    assert report["queries"] == pytest.approx(expected)
    assert report["mean"] == pytest.approx(sum(expected.values()) / 3)
    assert 1 < report["mean"] < 99
    (out / "iou.json").unlink()
    (out / "q1_mask.png").unlink()
    result = succeeded(call(*options))  # what is finished is scored all the same
    assert "2 of 3 queries are finished" in result.out
    assert json.loads((out / "iou.json").read_text()) == report


def test_a_truth_of_class_ids_ignores_255(world: Path, tmp_path: Path) -> None:
    truth = np.where(scene(3, 50, 60)[1], 3, 7).astype(np.uint8)
    truth[20:30] = 255
    save(tmp_path / "any.png", truth)
    options = one_support(world, world / "s0.png", world / "ids0.png", "--class-id", 3, "--truth", tmp_path / "any.png")
    mask = mask_of(world, tmp_path / "out", *options)
    report = json.loads((tmp_path / "out/iou.json").read_text())
    assert report["mean"] == pytest.approx(naive_iou(mask, truth, 3, 255))
    assert report["mean"] != pytest.approx(naive_iou(mask, truth, 3, None))


# Several targets

TARGETS = """\
zebra: {supports: [s0.png, s1.png], masks: [m0.png, m1.png]}
ape: {supports: [s1.png], masks: [ids1.png], class_id: 7}
"""


def test_a_labelled_map_shows_the_most_probable_target(
    world: Path, segmenter: NTRESegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = tmp_path / "in/targets.yaml"
    yaml.parent.mkdir()
    yaml.write_text(TARGETS)
    for path in world.glob("*.png"):
        shutil.copy(path, yaml.parent)
    encoded: list[object] = []
    encode = segmenter.model.encode_query
    monkeypatch.setattr(type(segmenter.model), "encode_query", lambda _, image: encoded.append(0) or encode(image))
    monkeypatch.chdir(tmp_path)
    common = ["--checkpoint", world / "small.pt", "--device", "cpu", "--targets", "in/targets.yaml"]
    succeeded(call(*common, "--query", world / "q0.png", world / "q1.png", "--out", "out", "--threshold", 0.45))
    assert len(encoded) == 2  # once a query
    assert json.loads(Path("out/labels.json").read_text()) == {"0": "background", "1": "zebra", "2": "ape"}
    seen = set()
    for n in range(2):
        zebra = segmenter.segment(*zip(*SUPPORTS, strict=True), QUERIES[n]).probability
        ape = segmenter.segment(SUPPORTS[1][0], ~SUPPORTS[1][1], QUERIES[n]).probability
        labels = Image.open(f"out/q{n}_labels.png")
        assert labels.mode == "P"
        for (y, x), label in np.ndenumerate(np.asarray(labels)):
            candidates = {0: 0.45, 1: zebra[y, x], 2: ape[y, x]}
            assert label == max(candidates, key=lambda key: candidates[key])
            seen.add(int(label))
        palette = np.array(labels.getpalette()).reshape(-1, 3)
        assert palette[0].tolist() == [0, 0, 0]
        overlay = load(Path(f"out/q{n}_overlay.jpg"))
        height, width = QUERIES[n].shape[:2]
        legend = overlay[height:].astype(int)
        assert overlay.shape[1] >= width
        for colour in palette[1:3]:
            assert (np.abs(legend - colour).sum(2) < 60).sum() > 20
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("dog: {supports: [s0.png, s1.png], masks: [m0.png]}", ["dog", "2 supports", "1 masks"]),
        ("dog: {supports: [s0.png], masks: [no.png]}", ["dog", "no.png", "does not exist"]),
        ("dog: {supports: [s0.png]}", ["dog.masks", "required"]),
        ("dog: {supports: [s0.png], masks: [ids0.png]}", ["ids0.png", "3, 7", "class_id"]),
        ("{}", ["1 to 254"]),
    ],
)
def test_a_wrong_targets_file_is_refused(world: Path, tmp_path: Path, text: str, pieces: list[str]) -> None:
    for name in ("s0.png", "s1.png", "m0.png", "ids0.png"):
        shutil.copy(world / name, tmp_path)
    (tmp_path / "t.yaml").write_text(text)
    options = ["--checkpoint", world / "small.pt", "--device", "cpu", "--targets", tmp_path / "t.yaml"]
    refused(call(*options, "--query", world / "q0.png", "--out", tmp_path / "out"), *pieces)


# What is wrong


def halved(path: Path, source: Path) -> Path:
    data = source.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def test_a_bad_query_among_others_is_named_and_the_others_are_done(world: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    save(folder / "b.png", QUERIES[0])
    save(folder / "e.png", QUERIES[1])
    halved(folder / "a.png", world / "q0.png")
    (folder / "c.jpg").write_text("no picture")
    result = process(ROOT / "predict.py", *supported(world), "--query", folder, "--out", out, cwd=tmp_path)
    assert result.code == 2
    lines = beside_progress_bars(result.err)
    assert len(lines) == 3, lines
    assert "a.png" in lines[0]
    assert "c.jpg" in lines[1]
    assert lines[2].startswith("error: 2 of 4 queries failed")
    assert {path.name for path in out.glob("*_mask.png")} == {"b_mask.png", "e_mask.png"}


@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        (lambda w, t: {"--query": [t / "none.jpg"]}, ["none.jpg", "does not exist"]),
        (lambda w, t: {"--query": [t]}, ["holds no pictures"]),
        (lambda w, t: {"--query": [w / "q0.png", save(t / "q0.jpg", QUERIES[0])]}, ["q0.png", "q0.jpg", "rename"]),
        (lambda w, t: {"--query": [w], "--out": [w]}, ["--out", "name another"]),
        (lambda w, t: {"--out": [w / "q0.png"]}, ["cannot be written"]),
        (lambda w, t: {"--mask": [w / "m0.png"]}, ["2 supports", "1 masks"]),
        (lambda w, t: {"--mask": [w / "m0.png", w / "m0.png"]}, ["m0.png", "60 x 48", "66 x 40"]),
        (
            lambda w, t: {"--mask": [w / "m0.png", save(t / "e.png", SUPPORTS[1][1] & False)]},
            ["e.png", "shows nothing"],
        ),
        (lambda w, t: {"--mask": [w / "m0.png", w / "ids1.png"]}, ["ids1.png", "3, 7", "class_id"]),
        (lambda w, t: {"--mask": [w / "ids0.png", w / "ids1.png"], "--class-id": [5]}, ["ids0.png", "class 5", "3, 7"]),
        (lambda w, t: {"--class-id": [255]}, ["class_id", "255"]),
        (lambda w, t: {"--mask": None}, ["--mask", "--targets"]),
        (lambda w, t: {"--targets": [t / "t.yaml"]}, ["--targets"]),
        (lambda w, t: {"--threshold": [1.5]}, ["--threshold", "1.5"]),
        (lambda w, t: {"--ground-truth": [t / "none"]}, ["--ground-truth", "does not exist"]),
        (lambda w, t: {"--truth": [save(t / "truth/q9.png", QUERIES[0]).parent]}, ["lacks 1 of 1", "q0"]),
        (lambda w, t: {"--truth": [w / "m0.png"]}, ["m0.png", "60 x 48", "60 x 50"]),
        (lambda w, t: {"--device": ["tpu"]}, ["device", "tpu"]),
    ],
)
def test_a_mistake_ends_in_one_line(
    world: Path, tmp_path: Path, change: Callable[[Path, Path], dict[str, list[object] | None]], pieces: list[str]
) -> None:
    options: dict[str, list[object] | None] = {
        "--checkpoint": [world / "small.pt"],
        "--support": [world / "s0.png", world / "s1.png"],
        "--mask": [world / "m0.png", world / "m1.png"],
        "--query": [world / "q0.png"],
        "--out": [tmp_path / "out"],
        "--device": ["cpu"],
    }
    options |= change(world, tmp_path)
    refused(call(*[word for key, values in options.items() if values for word in (key, *values)]), *pieces)


def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", QUERIES[0].shape[0] * QUERIES[0].shape[1] - 1)
    cut = halved(tmp_path / "cut.png", world / "q0.png")  # to decode it would be another error
    with pytest.raises(UserError, match="megapixels"):
        pictures.read_picture(cut)
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot be read"):
        pictures.read_picture(cut)


# Without a checkpoint, with edges, and where nothing is found


def test_without_a_checkpoint_the_masks_are_training_free_ones_with_edges(world: Path, tmp_path: Path) -> None:
    options = [*supported(world)[2:], "--query", world / "q0.png", world / "q1.png"]
    result = succeeded(process(ROOT / "predict.py", *options, "--out", "out", "--maps", cwd=tmp_path))
    assert "not the paper's network" in result.out and "efficientnet_lite0" in result.out
    free = NTRESegmenter.training_free(device="cpu")
    endings = ("mask.png", "overlay.jpg", "probability.png")
    assert files_in(tmp_path / "out") == {f"q{n}_{ending}" for n in (0, 1) for ending in endings} | {"predict.json"}
    for n in (0, 1):
        found = free.segment(*zip(*SUPPORTS, strict=True), QUERIES[n], edges=True)
        np.testing.assert_array_equal(load(tmp_path / f"out/q{n}_mask.png") > 0, found.mask)
        assert found.mask.any()
    succeeded(call(*options, "--out", tmp_path / "plain", "--no-edges"))
    plain = free.segment(*zip(*SUPPORTS, strict=True), QUERIES[0])
    np.testing.assert_array_equal(load(tmp_path / "plain/q0_mask.png") > 0, plain.mask)
    refused(call(*options, "--checkpoint", world / "small.pt", "--backbone", "resnet50", "--out", "o"), "--backbone")


def test_edges_are_drawn_for_a_network_where_asked_for(world: Path, segmenter: NTRESegmenter, tmp_path: Path) -> None:
    threshold = float((world / "threshold").read_text())
    found = segmenter.segment(*SUPPORTS[0], QUERIES[0], threshold=threshold, edges=True)
    mask = mask_of(world, tmp_path, *one_support(world, world / "s0.png", world / "m0.png"), "--edges")
    np.testing.assert_array_equal(mask > 0, found.mask)
    assert (found.mask != (found.probability > threshold)).any()


def test_the_end_says_where_nothing_was_found_and_what_to_try(world: Path, tmp_path: Path) -> None:
    options = [*supported(world), "--query", *(world / f"q{n}.png" for n in range(3)), "--out", tmp_path]
    result = succeeded(call(*options, "--threshold", 0.9999))
    assert "nothing found in 3 of 3 pictures (q0, q1, q2); try a lower --threshold (now 0.9999)" in result.out
    assert "trained on Synthetic-5i, fold 0, at 65 pixels (drawings, not photos" in result.out
    assert "nothing found" not in succeeded(call(*options, "--threshold", 0.0001, "--overwrite")).out


# Masks that are a box or have a soft border, pictures that are not read, cut-outs


def test_a_box_around_the_object_makes_its_mask(world: Path, tmp_path: Path) -> None:
    ys, xs = np.nonzero(SUPPORTS[0][1])
    ends = max(xs.min() - 3, 0), max(ys.min() - 3, 0), min(xs.max() + 3, 60), min(ys.max() + 3, 48)
    around = ",".join(map(str, ends))
    options = ["--support", world / "s0.png", "--query", world / "q0.png", "--out", tmp_path, "--device", "cpu"]
    result = succeeded(call(*options, "--box", around))
    made = load(tmp_path / "box1_s0_mask.png") > 0
    assert str(tmp_path / "box1_s0_mask.png") in result.out
    assert (made & SUPPORTS[0][1]).sum() / (made | SUPPORTS[0][1]).sum() > 0.9
    found = NTRESegmenter.training_free(device="cpu").segment(SUPPORTS[0][0], made, QUERIES[0], edges=True)
    np.testing.assert_array_equal(load(tmp_path / "q0_mask.png") > 0, found.mask)
    refused(call(*options, "--box", "0,0,9,9999"), "does not lie in", "60 x 48")
    refused(call(*options, "--box", "10,10,12"), "--box must be x0,y0,x1,y1", "got 10,10,12")
    refused(call(*options, "--box", around, around), "a --box of its own")
    refused(call(*options, "--box", around, "--mask", world / "m0.png"), "--support and --box")


def test_a_soft_border_is_cut_in_its_middle_with_a_note_and_ids_are_not(world: Path, tmp_path: Path) -> None:
    soft = np.where(SUPPORTS[0][1], 255, 0).astype(np.uint8)
    soft[0, :4], soft[1, :4] = 127, 128
    save(tmp_path / "soft.png", soft)
    expected = SUPPORTS[0][1].copy()
    expected[0, :4], expected[1, :4] = False, True
    save(tmp_path / "hard.png", expected)
    masks = []
    for name in ("soft", "hard"):
        options = ["--support", world / "s0.png", "--mask", tmp_path / f"{name}.png", "--query", world / "q0.png"]
        result = succeeded(call(*options, "--device", "cpu", "--out", tmp_path / name))
        notes = [line for line in beside_progress_bars(result.err) if line.startswith("note: ")]
        assert len(notes) == (name == "soft") and all("soft border" in note for note in notes)
        masks.append(load(tmp_path / name / "q0_mask.png"))
    np.testing.assert_array_equal(*masks)
    ids = np.zeros((4, 4), np.uint8)
    ids[0], ids[1] = 80, 255
    with pytest.raises(UserError, match="--class-id"):
        pictures.target_mask(ids, None, "mask")


def test_pictures_that_are_not_read_are_named(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    save(folder / "a.png", QUERIES[0])
    for name in ("b.HEIC", "deep.gif"):
        (folder / name).write_bytes(b"anything")
    options = [*supported(world), "--query", folder]
    assert (
        "skipped 2 pictures that are not read (b.HEIC, deep.gif)"
        in succeeded(call(*options, "--out", tmp_path / "o")).out
    )
    (folder / "a.png").unlink()
    refused(call(*options, "--out", tmp_path / "o"), "holds no pictures", "b.HEIC")


def test_a_cut_out_is_the_picture_with_the_mask_as_its_alpha(world: Path, tmp_path: Path) -> None:
    mask = mask_of(world, tmp_path, *one_support(world, world / "s0.png", world / "m0.png"), "--cutout")
    cut = load(tmp_path / "q0_cutout.png")
    np.testing.assert_array_equal(cut[..., :3], QUERIES[0])
    np.testing.assert_array_equal(cut[..., 3], mask)


# torch.hub

HUB = """
import torch
from PIL import Image

def load(backbone):
    return torch.hub.load({root!r}, "ntrenet_" + backbone, source="local", checkpoint={checkpoint!r}, device="cpu")

segmenter = load("efficientnet_lite0")
result = segmenter.segment(Image.open({support!r}), Image.open({mask!r}), Image.open({query!r}))
print(type(segmenter).__name__, result.mask.shape, result.mask.sum())
for backbone in ("resnet50", "resnet101", "vgg16_bn"):
    try:
        load(backbone)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_hub_loads_a_segmenter_from_elsewhere_and_refuses_other_backbones(
    world: Path, segmenter: NTRESegmenter, tmp_path: Path
) -> None:
    paths = {"checkpoint": "small.pt", "support": "s0.png", "mask": "m0.png", "query": "q1.png"}
    values = {key: str(world / name) for key, name in paths.items()}
    (tmp_path / "load.py").write_text(HUB.format(root=str(ROOT), **values))
    first, *others = succeeded(process("load.py", cwd=tmp_path)).out.splitlines()
    assert first == f"NTRESegmenter (64, 40) {segmenter.segment(*SUPPORTS[0], QUERIES[1]).mask.sum()}"
    assert len(others) == 3
    for line in others:
        assert line.startswith("UserError checkpoint")
        assert line.endswith("load it with ntrenet_efficientnet_lite0")


def test_hub_gives_a_segmenter_without_a_checkpoint() -> None:
    free = torch.hub.load(str(ROOT), "training_free", source="local", device="cpu")
    assert free.segment(*SUPPORTS[0], SUPPORTS[0][0]).mask[SUPPORTS[0][1]].mean() > 0.5
