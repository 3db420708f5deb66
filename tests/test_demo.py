"""The demo: its steps as plain functions, its command line, and its page in a real browser.

The browser test needs chromium, and in the environment requirements-demo.txt and `pip install playwright==1.65.2`;
without them it is skipped.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest
from PIL import Image
from scenes import ROOT, scene, write_checkpoint

from demo import require_free
from util.data import synthetic
from util.demo import steps
from util.errors import UserError
from util.segment.segmenter import NTRESegmenter

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ORIENTATION = 0x0112
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = write_checkpoint(tmp_path_factory.mktemp("demo") / "small.pt")
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def segmenter(checkpoint: Path) -> NTRESegmenter:
    return NTRESegmenter.from_checkpoint(checkpoint, device="cpu", precision="fp32")


def editor(seed: int, paint: bool = True) -> dict[str, Any]:
    """What the page's editor gives for a scene: RGBA, with paint on the disc, half transparent as the brush."""
    pixels, disc = scene(seed)
    layer = np.zeros((*disc.shape, 4), np.uint8)
    layer[disc & paint] = (230, 60, 60, 140)
    background = np.dstack([pixels, np.full(disc.shape, 255, np.uint8)])
    return {"background": background, "layers": [layer], "composite": background}


def save(path: Path, pixels: np.ndarray, orientation: int = 1) -> str:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return str(path)


def photo(seed: int, height: int = 48, width: int = 60) -> steps.Photo:
    return steps.Photo(f"scene{seed}", scene(seed, height, width)[0], (height, width))


def test_what_is_painted_is_what_the_segmenter_is_given(segmenter: NTRESegmenter) -> None:
    photos = [photo(4), photo(5, 97, 50)]
    results, cost = steps.segment(segmenter, editor(1), [], photos)
    for result, one in zip(results, photos, strict=True):
        expected = segmenter.segment(*scene(1), one.pixels)
        for found, wanted in zip(result, expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert cost.startswith("2 photos from 1 support in ")


def test_kept_supports_are_used_with_the_one_in_the_editor(segmenter: NTRESegmenter) -> None:
    kept = steps.add_support(editor(2), steps.add_support(editor(1), []))
    expected = segmenter.segment([scene(n)[0] for n in (1, 2, 3)], [scene(n)[1] for n in (1, 2, 3)], scene(4)[0])
    for last in (editor(3), editor(3, paint=False), None):
        results, _ = steps.segment(segmenter, last, kept, [photo(4)])
        same = np.array_equal(results[0].probability, expected.probability)
        assert same == (last is not None and last["layers"][0].any())


@pytest.mark.parametrize("unpainted", [None, editor(1, paint=False), {**editor(1), "background": None}])
def test_nothing_painted_is_said_in_plain_words(segmenter: NTRESegmenter, unpainted: dict[str, Any] | None) -> None:
    with pytest.raises(UserError, match=r"^paint the object first"):
        steps.segment(segmenter, unpainted, [], [photo(4)])
    with pytest.raises(UserError, match=r"^paint the object first"):
        steps.add_support(unpainted, [])


def test_no_photo_is_said_in_plain_words(segmenter: NTRESegmenter) -> None:
    with pytest.raises(UserError, match="drop a photo to search in"):
        steps.segment(segmenter, editor(1), [], [])


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.9])
def test_the_threshold_decides_the_mask_in_the_file_and_on_the_photo(
    segmenter: NTRESegmenter, tmp_path: Path, threshold: float
) -> None:
    photos = [photo(4), photo(5)]
    results, _ = steps.segment(segmenter, editor(1), [], photos)
    levels = np.linspace(0, 1, 48 * 60, dtype=np.float32).reshape(48, 60)  # the network's own may all lie on one side
    results[1] = results[1]._replace(probability=levels)
    seen = steps.view(photos, results, 1, threshold, tmp_path)
    assert seen.mask_file is not None and seen.photo is not None
    mask = np.asarray(Image.open(seen.mask_file))
    np.testing.assert_array_equal(mask, np.where(levels > threshold, 255, 0))
    untouched = (seen.photo == photos[1].pixels).all(axis=2)
    assert untouched[mask == 0].mean() > 0.9
    assert untouched[mask == 255].mean() < 0.1
    assert Path(seen.mask_file).name == "scene5_mask.png"


def test_before_the_network_ran_the_photo_is_shown_alone(tmp_path: Path) -> None:
    seen = steps.view([photo(4)], [], 0, 0.5, tmp_path)
    np.testing.assert_array_equal(seen.photo, scene(4)[0])
    assert seen[1:] == (None, None, None, None)
    assert steps.view([], [], 0, 0.5, tmp_path) == (None,) * 5


def test_a_network_without_elimination_has_only_the_prior(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    off = ("model.bgem=false", "model.doem=false", "loss.pcl=false")
    path = write_checkpoint(tmp_path_factory.mktemp("demo_pfenet") / "pfenet.pt", *off)
    results, _ = steps.segment(NTRESegmenter.from_checkpoint(path, "cpu"), editor(1), [], [photo(4)])
    path.unlink()
    seen = steps.view([photo(4)], results, 0, 0.5, tmp_path)
    assert (seen.bg, seen.distractor) == (None, None)
    assert seen.prior is not None and seen.prior.shape == (48, 60, 3)


def test_a_large_turned_photo_is_shrunk_and_its_mask_has_the_size_a_person_sees(
    segmenter: NTRESegmenter, tmp_path: Path
) -> None:
    pixels, disc = scene(4, 1200, 1600)
    path = save(tmp_path / "IMG_1.png", np.rot90(pixels).copy(), orientation=6)  # to be turned clockwise
    one = steps.read_photo(path)
    assert (one.pixels.shape, one.size) == ((768, 1024, 3), (1200, 1600))
    np.testing.assert_array_equal(one.pixels, cv2.resize(pixels, (1024, 768), interpolation=cv2.INTER_AREA))
    results, _ = steps.segment(segmenter, editor(1), [], [one])
    results[0] = results[0]._replace(probability=cv2.resize(disc.astype(np.float32), (1024, 768)))
    mask = np.asarray(Image.open(str(steps.view([one], results, 0, 0.5, tmp_path).mask_file))) > 0
    assert mask.shape == disc.shape
    assert (mask & disc).sum() / (mask | disc).sum() > 0.98


def test_what_cannot_be_read_is_named_and_the_other_photos_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    good = save(tmp_path / "good.jpg", scene(4)[0])
    photos, complaints = steps.read_photos([str(tmp_path / "notes.png"), good])
    assert [one.name for one in photos] == ["good"]
    assert complaints == ["notes.png is no picture in JPEG, PNG, WEBP, TIFF, BMP; convert it"]
    with pytest.raises(UserError, match=r"^notes\.png is no picture"):
        steps.open_support(str(tmp_path / "notes.png"))


def test_too_many_photos_or_supports_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", scene(4)[0])
    photos, complaints = steps.read_photos([path] * (steps.MOST + 2))
    assert len(photos) == steps.MOST
    assert complaints == [f"{steps.MOST} photos are the most at a time; the other 2 are left out"]
    with pytest.raises(UserError, match="are the most"):
        steps.add_support(editor(1), steps.painted(editor(1)) * steps.MOST)


@pytest.mark.parametrize("fold", range(4))
def test_the_example_shows_a_class_that_the_network_was_not_trained_on(segmenter: NTRESegmenter, fold: int) -> None:
    data = segmenter.config.data.model_copy(update={"fold": fold})
    support, photos = steps.example(data)
    again, _ = steps.example(data)
    np.testing.assert_array_equal(support.pixels, again.pixels)
    held = [set(synthetic.classes_of(steps.EXAMPLE_SEED, "val", index)) for index in range(32)]
    novel = 5 * fold + 1
    first, second, third = [index for index in range(32) if novel in held[index]][:3]
    for one, index in zip(photos, (second, third), strict=True):
        drawn = synthetic.make_image(steps.EXAMPLE_SEED, "val", index)[0]
        assert one.size == tuple(steps.EXAMPLE_ZOOM * side for side in drawn.shape[:2])
    labels = synthetic.make_image(steps.EXAMPLE_SEED, "val", first)[1]
    share = (support.mask & np.kron(labels == novel, np.ones((4, 4), bool))).sum() / support.mask.sum()
    assert share > 0.95
    (painted,) = steps.painted(steps.editor_of(support))
    np.testing.assert_array_equal(painted.mask, support.mask)


def demo(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "demo.py", *map(str, arguments)],
        cwd=ROOT,
        env={**ENVIRONMENT, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_gradio_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError('hidden', name='gradio')\n")
    done = demo("--checkpoint", "any.pt", environment={"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr == "error: the demo needs gradio; pip install -r requirements-demo.txt\n"
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".pyc"] in (
        ["gradio.py"],
        ["__pycache__", "gradio.py"],
        ["gradio.py", "__pycache__"],
    )


def test_a_port_in_use_is_refused_with_the_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^port {port} cannot be used .*choose another with --port$"):
            require_free(port)
    require_free(port)


needs_browser = pytest.mark.skipif(
    CHROMIUM is None or not all(map(importlib.util.find_spec, ("gradio", "playwright"))),
    reason="needs chromium, requirements-demo.txt and playwright",
)


class Served:
    """demo.py on a free port, with a temporary folder of its own."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "demo.py", "--checkpoint", str(checkpoint), "--port", str(self.port), "--device", "cpu"],
            cwd=ROOT,
            env={**ENVIRONMENT, "TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(f"open http://127.0.0.1:{self.port}"), line + self.process.stdout.read()
        self.address = f"http://127.0.0.1:{self.port}"

    def end(self, how: signal.Signals) -> str:
        self.process.send_signal(how)
        return self.process.communicate(timeout=30)[0]


@needs_browser
@pytest.mark.browser
def test_the_page_works_in_a_browser_without_any_other_host_and_leaves_no_files(
    checkpoint: Path, tmp_path: Path
) -> None:
    from playwright.sync_api import sync_playwright

    folder = tmp_path / "tmp"
    folder.mkdir()
    photo_file = save(tmp_path / "upright.jpg", np.rot90(scene(4, 300, 400)[0]).copy(), orientation=6)
    support_file = save(tmp_path / "support.png", scene(1, 240, 320)[0])
    (tmp_path / "notes.png").write_text("not a picture")
    with sync_playwright() as playwright:
        served = Served(checkpoint, folder)
        assert CHROMIUM is not None
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            walk(page, served.address, photo_file, support_file, str(tmp_path / "notes.png"), tmp_path)
            for width in (390, 360):
                phone = browser.new_page(viewport={"width": width, "height": 800})
                phone.goto(served.address)
                phone.wait_for_selector("#found img")
                phone.wait_for_timeout(1500)
                assert phone.evaluate("document.documentElement.scrollWidth") == width
                phone.screenshot(path=tmp_path / f"phone{width}.png", full_page=True)
        finally:
            browser.close()
            printed = served.end(signal.SIGTERM)
    assert served.process.returncode == 0
    assert "Traceback" not in printed
    assert list(folder.iterdir()) == []


def walk(page: Any, address: str, photo_file: str, support_file: str, text_file: str, out: Path) -> None:
    """What a newcomer does, and what they see."""
    hosts: set[str | None] = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(address)
    page.wait_for_selector("#found img")
    page.wait_for_timeout(3000)  # the editor draws itself
    page.screenshot(path=out / "start.png", full_page=True)

    first = mask_of(page)
    assert segment(page) == "2 photos from 1 support"
    np.testing.assert_array_equal(mask_of(page), first)  # the paint went to the browser and back unharmed

    page.locator("#photos button").nth(1).click()
    page.wait_for_timeout(1500)
    assert not np.array_equal(mask_of(page), first)

    drop(page, "#support-file", text_file)
    assert "notes.png is no picture" in toast(page)
    drop(page, "#photo-files", text_file)
    assert "notes.png is no picture" in toast(page)

    drop(page, "#support-file", support_file)
    page.wait_for_timeout(2000)
    page.click("#segment")
    assert "paint the object first" in toast(page)
    paint(page)
    page.screenshot(path=out / "painted.png", full_page=True)
    drop(page, "#photo-files", photo_file)
    page.wait_for_function("document.querySelectorAll('#photos img').length == 1")
    assert segment(page) == "1 photo from 1 support"
    assert mask_of(page).shape == (300, 400)
    page.screenshot(path=out / "own.png", full_page=True)

    page.click("#add")
    page.wait_for_selector("#supports img")
    page.wait_for_timeout(1000)
    assert segment(page) == "1 photo from 1 support"
    page.screenshot(path=out / "kept.png", full_page=True)
    page.click("#remove")
    page.wait_for_selector("#supports", state="hidden")
    assert hosts <= {"127.0.0.1", None}


def segment(page: Any) -> str:
    """Press Segment; what the status says without the time."""
    before = page.inner_text("#status")
    page.click("#segment")
    page.wait_for_function("text => document.querySelector('#status').innerText != text", arg=before, timeout=20000)
    page.wait_for_timeout(1500)
    return str(page.inner_text("#status")).rsplit(" in ", 1)[0]


def mask_of(page: Any) -> np.ndarray:
    with page.expect_download() as download:
        page.click("#download")
    return np.asarray(Image.open(download.value.path()))


def drop(page: Any, where: str, path: str) -> None:
    page.set_input_files(f"{where} input[type=file]", path)


def toast(page: Any) -> str:
    """The message on screen, which is then closed."""
    message = page.wait_for_selector(".toast-body").inner_text()
    page.click(".toast-close")
    page.wait_for_selector(".toast-body", state="detached")
    return str(message)


def paint(page: Any) -> None:
    box = page.locator("#editor canvas").last.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y)
    page.mouse.down()
    for step in range(12):
        page.mouse.move(x - 60 + 10 * step, y + (20 if step % 2 else -20))
    page.mouse.up()
    page.wait_for_timeout(500)
