"""predict.py: the real command line on real files, against the segmenter and plain loops over pixels."""

import contextlib
import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
from tests import harness
from tests.harness import ROOT, Result, beside_progress_bars, process, refused, succeeded
from tests.scenes import iou, scene
from util.data import synthetic
from util.photos.example import SEED, SHOWN
from util.photos.images import read_mask_on, read_upright
from util.photos.segmenter import NTRESegmenter

ORIENTATION = 0x0112


def call(*arguments: object) -> Result:
    """Run predict.py in this process."""
    return harness.call(predict, *arguments)


def save(path: Path, pixels: np.ndarray, orientation: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    image.save(path, exif=exif)
    return path


def load(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


SUPPORTS = [scene(1), scene(2, 40, 66)]
QUERIES = [scene(seed, height, width)[0] for seed, height, width in ((3, 50, 60), (4, 64, 40), (5, 48, 48))]


@pytest.fixture(scope="module")
def segmenter(checkpoint: Path) -> NTRESegmenter:
    """In the precision that predict.py chooses."""
    return NTRESegmenter.from_checkpoint(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, segmenter: NTRESegmenter) -> Iterator[Path]:
    """Checkpoint, two supports with masks, and three queries; nothing is written here by tests.

    At the threshold in 'threshold' the first support finds half of the first query.
    """
    root = tmp_path_factory.mktemp("predict")
    (root / "small.pt").symlink_to(checkpoint)
    for n, (image, mask) in enumerate(SUPPORTS):
        save(root / f"s{n}.png", image)
        save(root / f"m{n}.png", mask)
        save(root / f"ids{n}.png", np.where(mask, 3, 7).astype(np.uint8))
    for n, image in enumerate(QUERIES):
        save(root / f"q{n}.png", image)
    found = segmenter.segment(*SUPPORTS[0], QUERIES[0])
    (root / "threshold").write_text(str(np.median(found.probability)))
    yield root
    shutil.rmtree(root)


def supported(world: Path) -> list[object]:
    """Options that say what to find."""
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
    for hidden in (".ipynb_checkpoints/first.png", "._first.png", "@eaDir/first.png", "__MACOSX/first.png"):
        save(folder / hidden, QUERIES[1])
    save(out / "old_overlay.jpg", QUERIES[1])
    (folder / "phone.HEIC").write_text("no image that can be read")
    options = [*supported(world), "--query", world / "q2.png", "photos", "--out", out]
    result = succeeded(process(ROOT / "predict.py", *options, cwd=tmp_path))
    assert "note: cannot read phone.HEIC; convert" in result.out
    names = {"q2": QUERIES[2], "first": QUERIES[0], "deep/er/first": QUERIES[1]}
    expected = {f"{name}_{ending}" for name in names for ending in ("mask.png", "overlay.jpg")}
    assert files_in(out) == {*expected, "old_overlay.jpg", "results.csv", "results.json"}
    for name, image in names.items():
        mask, overlay = load(out / f"{name}_mask.png"), load(out / f"{name}_overlay.jpg")
        found = segmenter.segment(*zip(*SUPPORTS, strict=True), image).mask
        np.testing.assert_array_equal(mask, 255 * found.astype(np.uint8))
        assert overlay.shape == image.shape
        assert 0 < (mask > 0).mean() < 1
        untouched = np.abs(overlay.astype(int) - image)[mask == 0].mean()
        assert untouched < np.abs(overlay.astype(int) - image)[mask > 0].mean()


def test_maps_threshold_edges_and_cutout_are_the_segmenters(
    world: Path, segmenter: NTRESegmenter, tmp_path: Path
) -> None:
    threshold = float((world / "threshold").read_text())
    result = segmenter.segment(*SUPPORTS[0], QUERIES[0], threshold=threshold, edges=True)
    options = one_support(world, world / "s0.png", world / "m0.png", "--maps", "--cutout", "--edges")
    mask = mask_of(world, tmp_path, *options)
    np.testing.assert_array_equal(mask > 0, result.mask)
    assert (result.mask != (result.probability > threshold)).any()
    for name in ("probability", "prior", "bg", "distractor"):
        written = load(tmp_path / f"q0_{name}.png")
        assert written.dtype == np.uint8
        assert np.abs(written / 255 - getattr(result, name)).max() <= 0.5 / 255 + 1e-6
    np.testing.assert_array_equal(load(tmp_path / "q0_cutout.png"), np.dstack([QUERIES[0], mask]))


def test_a_rotated_photo_gives_what_the_upright_one_gives(world: Path, tmp_path: Path) -> None:
    def rotated(name: str, pixels: np.ndarray, orientation: int | None = 6) -> Path:
        """Orientation 6: to be rotated clockwise for display."""
        return save(tmp_path / name, np.rot90(pixels).copy(), orientation)

    support, _ = rotated("s.png", SUPPORTS[0][0]), rotated("q0.png", QUERIES[0])
    mask = SUPPORTS[0][1]
    upright = mask_of(world, tmp_path / "upright", *one_support(world, world / "s0.png", world / "m0.png"))
    for n, given in enumerate([rotated("m.png", mask, None), rotated("tagged.png", mask), world / "m0.png"]):
        found = mask_of(tmp_path, tmp_path / str(n), *one_support(world, support, given))
        np.testing.assert_array_equal(found, upright)


def test_if_a_turned_image_and_its_mask_have_one_size_the_mask_lies_as_seen_and_a_note_says_so(tmp_path: Path) -> None:
    image, mask = SUPPORTS[0]
    turned = read_upright(save(tmp_path / "s.png", np.rot90(image, 2).copy(), 3))
    for orientation, pixels in ((None, mask), (3, np.rot90(mask, 2).copy())):  # with an EXIF tag of its own no note
        path = save(tmp_path / "m.png", pixels, orientation)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            np.testing.assert_array_equal(read_mask_on(turned, path, None), mask)
        assert (f"note: EXIF turns the image of mask {path}" in said.getvalue()) == (orientation is None)


def naive_iou(mask: np.ndarray, truth: np.ndarray, target: int, ignored: int | None) -> float:
    both = either = 0
    for predicted, value in zip(mask.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if value == ignored:
            continue
        both += predicted == 255 and value == target
        either += predicted == 255 or value == target
    return 100 * both / either


def test_iou_is_that_of_a_loop_over_pixels(world: Path, tmp_path: Path) -> None:
    ground_truths = {f"q{n}": scene(n + 3, *QUERIES[n].shape[:2])[1] for n in range(3)}
    for name, truth in ground_truths.items():
        save(tmp_path / f"truth/{name}.png", 255 * truth.astype(np.uint8))
    out = tmp_path / "out"
    given = [world / f"q{n}.png" for n in range(3)]
    succeeded(call(*supported(world), "--query", *given, "--out", out, "--ground-truth", tmp_path / "truth"))
    report = json.loads((out / "results.json").read_text())
    expected = {
        name: naive_iou(load(out / f"{name}_mask.png"), mask, True, None) for name, mask in ground_truths.items()
    }
    rows = report["queries"]
    assert {row["query"]: row["iou"] for row in rows} == pytest.approx(expected)
    assert report["mean_iou"] == pytest.approx(sum(expected.values()) / 3)
    assert 1 < report["mean_iou"] < 99
    presences = [row["presence"] for row in rows]
    assert presences == sorted(presences, reverse=True) and 0 <= presences[-1] <= presences[0] <= 1
    with (out / "results.csv").open() as file:
        assert [row["query"] for row in csv.DictReader(file)] == [row["query"] for row in rows]


def test_a_ground_truth_of_class_ids_ignores_255(world: Path, tmp_path: Path) -> None:
    truth = np.where(scene(3, 50, 60)[1], 3, 7).astype(np.uint8)
    truth[20:30] = 255
    given = ["--class-id", 3, "--ground-truth", save(tmp_path / "any.png", truth)]
    mask = mask_of(world, tmp_path / "out", *one_support(world, world / "s0.png", world / "ids0.png", *given))
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert report["mean_iou"] == pytest.approx(naive_iou(mask, truth, 3, 255))
    assert report["mean_iou"] != pytest.approx(naive_iou(mask, truth, 3, None))


TARGETS = """\
zebra: {supports: [s0.png, s1.png], masks: [m0.png, m1.png]}
ape: {supports: [s1.png], masks: [ids1.png], class_id: 7}
"""


def test_a_labelled_map_shows_the_most_probable_target(
    world: Path, segmenter: NTRESegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world, tmp_path / "in")
    (tmp_path / "in/targets.yaml").write_text(TARGETS)
    monkeypatch.chdir(tmp_path)
    common = ["--checkpoint", world / "small.pt", "--device", "cpu", "--targets", "in/targets.yaml"]
    succeeded(call(*common, "--query", world / "q0.png", world / "q1.png", "--out", "out", "--threshold", 0.45))
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
        assert load(Path(f"out/q{n}_overlay.jpg")).shape == QUERIES[n].shape
    assert seen == {0, 1, 2}


def test_a_bad_query_among_others_is_named_and_the_others_are_done(world: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    save(folder / "b.png", QUERIES[0])
    save(folder / "e.png", QUERIES[1])
    whole = (world / "q0.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    (folder / "c.jpg").write_text("no image")
    result = call(*supported(world), "--query", folder, "--out", out)
    assert result.code == 2
    lines = beside_progress_bars(result.err)
    assert all(name in line for name, line in zip(("a.png", "c.jpg", "2 of 4 queries failed"), lines, strict=True))
    assert {path.name for path in out.glob("*_overlay.jpg")} == {"b_overlay.jpg", "e_overlay.jpg"}


def test_mistakes_end_in_one_line(world: Path, tmp_path: Path) -> None:
    same_name = save(tmp_path / "q0.jpg", QUERIES[0])
    truth = save(tmp_path / "truth/q9.png", QUERIES[0]).parent
    targets = tmp_path / "targets.yaml"
    targets.write_text(f"dog: {{supports: [{world}/s0.png], masks: [{world}/ids0.png]}}")
    given = supported(world)
    unmasked = given[: given.index("--mask")]
    mistakes: list[tuple[list[object], list[str]]] = [
        ([*given, "--query", world / "q0.png", same_name], ["q0.png", "q0.jpg", "rename"]),
        (["--targets", targets], ["ids0.png", "3, 7", "--class-id 3 or --class-id 7"]),
        (["--targets", tmp_path / "no.yaml"], ["--targets", "does not exist"]),
        ([*given, "--not", same_name], ["--not goes with --not-mask or --not-box"]),
        ([*unmasked, "--box", "10,10,12", "1,1,9,9"], ["--box must be x0,y0,x1,y1", "10,10,12"]),
        ([*unmasked, "--box", "1,1,9,9", "1,1,9,999"], ["does not lie in", "66 x 40"]),
        ([*given, "--threshold", 1.5], ["--threshold", "1.5"]),
        ([*given, "--ground-truth", truth], ["lacks 1 of 1", "q0"]),
        ([*given, "--ground-truth", world / "m0.png"], ["m0.png", "60 x 48", "60 x 50"]),
    ]
    for options, pieces in mistakes:
        refused(call("--query", world / "q0.png", "--out", tmp_path / "out", *options), *pieces)


@pytest.mark.usefixtures("small_side")
@pytest.mark.parametrize("edges", [True, False])
def test_without_a_checkpoint_the_masks_are_training_free_ones_with_edges(
    world: Path, tmp_path: Path, edges: bool
) -> None:
    options = [*supported(world)[2:], "--query", world / "q0.png", "--out", tmp_path, "--maps"]
    result = succeeded(call(*options, *([] if edges else ["--no-edges"])))
    assert "not the paper's network" in result.out and "efficientnet_lite0" in result.out
    written = {f"q0_{ending}" for ending in ("mask.png", "overlay.jpg", "probability.png")}
    assert files_in(tmp_path) == {*written, "results.csv", "results.json"}
    free = NTRESegmenter.training_free(device="cpu")
    found = free.segment(*zip(*SUPPORTS, strict=True), QUERIES[0], edges=edges)
    np.testing.assert_array_equal(load(tmp_path / "q0_mask.png") > 0, found.mask)
    assert found.mask.any()


@pytest.mark.usefixtures("small_side")
def test_what_it_is_not_is_found_less(world: Path, tmp_path: Path) -> None:
    """What was found in a query is said to be something else."""
    options = [*supported(world)[2:], "--query", world / "q0.png", "--no-edges"]
    found = mask_of(world, tmp_path / "a", *options[:-3], "--no-edges")
    other = ["--not", world / "q0.png", "--not-mask", tmp_path / "a/q0_mask.png"]
    succeeded(call(*options, "--out", tmp_path / "b", *other))
    assert (load(tmp_path / "b/q0_mask.png")[found > 0] > 0).mean() < 0.95
    rows = [json.loads((tmp_path / f"{run}/results.json").read_text())["queries"][0] for run in "ab"]
    assert rows[1]["presence"] < rows[0]["presence"]
    trained = [*supported(world), "--query", world / "q0.png", "--out", tmp_path / "c", *other]
    refused(call(*trained), "use no checkpoint")


def test_the_example_runs_as_typed_and_is_a_success(tmp_path: Path) -> None:
    result = succeeded(process(ROOT / "predict.py", "--example", "--out", "out", cwd=tmp_path))
    assert "this is --support out/example_support.jpg --mask out/example_mask.png --query out/ex" in result.out
    for number in (1, 2):
        labels = synthetic.make_image(SEED, "val", SHOWN[16][number], synthetic.EXAMPLE)[1]
        found = load(tmp_path / f"out/example_query{number}_mask.png") > 0
        assert iou(found[labels != 255], (labels == 16)[labels != 255]) > 0.8
    refused(call("--example", "--query", "q.png", "--out", tmp_path), "--example brings its own")


@pytest.mark.usefixtures("small_side")
def test_a_box_around_the_object_makes_its_mask(world: Path, tmp_path: Path) -> None:
    ys, xs = np.nonzero(SUPPORTS[0][1])
    ends = max(xs.min() - 3, 0), max(ys.min() - 3, 0), min(xs.max() + 3, 60), min(ys.max() + 3, 48)
    options = ["--support", world / "s0.png", "--query", world / "q0.png", "--out", tmp_path, "--device", "cpu"]
    result = succeeded(call(*options, "--box", ",".join(map(str, ends))))
    made = load(tmp_path / "box1_s0_mask.png") > 0
    assert str(tmp_path / "box1_s0_mask.png") in result.out
    assert iou(made, SUPPORTS[0][1]) > 0.9
    found = NTRESegmenter.training_free(device="cpu").segment(SUPPORTS[0][0], made, QUERIES[0], edges=True)
    np.testing.assert_array_equal(load(tmp_path / "q0_mask.png") > 0, found.mask)
