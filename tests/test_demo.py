"""The demo: its steps as plain functions, its command line, and its page in a real browser.

The browser test needs chromium, and in the environment requirements-demo.txt and `pip install playwright==1.65.2`;
without them it is skipped.
"""

import importlib.util
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest
from PIL import Image
from scenes import ROOT, scene, write_checkpoint

from util.data import synthetic
from util.demo import server, steps
from util.demo.server import is_own, require_free
from util.errors import UserError
from util.segment.segmenter import NTRESegmenter, Segmentation

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
    layer[disc & paint] = (*steps.PAINT, 140)
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
    findings = steps.segment(segmenter, editor(1), [], photos)
    for one in photos:
        found = findings.of(one, 0)
        assert found is not None
        for values, wanted in zip(found, segmenter.segment(*scene(1), one.pixels), strict=True):
            np.testing.assert_array_equal(values, wanted)
    assert findings.sentence.startswith("2 photos from 1 support in ")


def test_kept_supports_are_used_with_the_one_in_the_editor(segmenter: NTRESegmenter) -> None:
    kept = steps.add_support(editor(2), steps.add_support(editor(1), []))
    expected = segmenter.segment([scene(n)[0] for n in (1, 2, 3)], [scene(n)[1] for n in (1, 2, 3)], scene(4)[0])
    for last in (editor(3), editor(3, paint=False), None):
        found = steps.segment(segmenter, last, kept, [photo(4)]).of(photo(4), 0)
        assert found is not None
        same = np.array_equal(found.probability, expected.probability)
        assert same == (last is not None and last["layers"][0].any())


def test_what_is_found_is_of_its_own_photo_and_its_own_supports(segmenter: NTRESegmenter) -> None:
    """Photos and supports that come while a request runs are not shown with what it finds."""
    findings = steps.segment(segmenter, editor(1), [], [photo(4)], number=3)
    assert findings.of(photo(4), 3) is not None
    assert findings.of(photo(5), 3) is None
    assert findings.of(photo(4), 4) is None


@pytest.mark.parametrize("unpainted", [None, editor(1, paint=False), {**editor(1), "background": None}])
def test_nothing_painted_is_said_in_plain_words(segmenter: NTRESegmenter, unpainted: dict[str, Any] | None) -> None:
    with pytest.raises(UserError, match=r"^paint the object first"):
        steps.segment(segmenter, unpainted, [], [photo(4)])
    with pytest.raises(UserError, match=r"^paint the object first"):
        steps.add_support(unpainted, [])


def test_no_photo_is_said_in_plain_words(segmenter: NTRESegmenter) -> None:
    with pytest.raises(UserError, match="drop a photo to search in"):
        steps.segment(segmenter, editor(1), [], [])


def a_segmentation(probability: np.ndarray) -> Segmentation:
    return Segmentation(probability > 0.5, probability.astype(np.float32))


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.9])
def test_the_threshold_decides_the_mask_in_the_file_and_on_the_photo(threshold: float) -> None:
    levels = np.linspace(0, 1, 48 * 60, dtype=np.float32).reshape(48, 60)
    seen = steps.view(photo(5), a_segmentation(levels), threshold, False)
    assert seen.mask is not None and seen.photo is not None
    mask = np.asarray(Image.open(io.BytesIO(steps.mask_png(photo(5), seen.mask))))
    np.testing.assert_array_equal(mask, np.where(levels > threshold, 255, 0))
    untouched = (seen.photo == photo(5).pixels).all(axis=2)
    assert untouched[mask == 0].mean() > 0.9
    assert untouched[mask == 255].mean() < 0.1


def test_before_the_network_ran_the_photo_is_shown_alone() -> None:
    seen = steps.view(photo(4), None, 0.5, False)
    np.testing.assert_array_equal(seen.photo, scene(4)[0])
    assert seen[1:] == (None,) * 4


def test_a_thumbnail_carries_the_mask() -> None:
    large = photo(4, 480, 600)
    plain, marked = (
        steps.thumbnail(large, found, 0.5, False)
        for found in (None, a_segmentation(scene(4, 480, 600)[1].astype(float)))
    )
    assert max(plain.shape) == steps.THUMBNAIL
    touched = (plain != marked).any(2)
    disc = steps.shrunk(scene(4, 480, 600)[1].astype(np.float32), steps.THUMBNAIL) > 0.5
    assert (touched & disc).sum() / (touched | disc).sum() > 0.9


def test_a_network_without_elimination_has_only_the_prior(tmp_path_factory: pytest.TempPathFactory) -> None:
    off = ("model.bgem=false", "model.doem=false", "loss.pcl=false")
    path = write_checkpoint(tmp_path_factory.mktemp("demo_pfenet") / "pfenet.pt", *off)
    findings = steps.segment(NTRESegmenter.from_checkpoint(path, "cpu"), editor(1), [], [photo(4)])
    path.unlink()
    seen = steps.view(photo(4), findings.of(photo(4), 0), 0.5, False)
    assert (seen.bg, seen.distractor) == (None, None)
    assert seen.prior is not None and seen.prior.shape == (48, 60, 3)


def test_a_large_turned_photo_is_shrunk_and_its_mask_has_the_size_a_person_sees(tmp_path: Path) -> None:
    pixels, disc = scene(4, 1200, 1600)
    path = save(tmp_path / "IMG_1.png", np.rot90(pixels).copy(), orientation=6)  # to be turned clockwise
    one = steps.read_photo(path)
    assert (one.pixels.shape, one.size) == ((768, 1024, 3), (1200, 1600))
    np.testing.assert_array_equal(one.pixels, cv2.resize(pixels, (1024, 768), interpolation=cv2.INTER_AREA))
    small = cv2.resize(disc.astype(np.float32), (1024, 768)) > 0.5
    mask = np.asarray(Image.open(io.BytesIO(steps.mask_png(one, small)))) > 0
    assert mask.shape == disc.shape
    assert (mask & disc).sum() / (mask | disc).sum() > 0.98


def test_sharpening_brings_rough_paint_to_the_objects_edges() -> None:
    pixels, disc = scene(1, 240, 320)
    y, x = np.argwhere(disc).mean(0).round().astype(int)
    rough = np.zeros(disc.shape, np.uint8)
    cv2.circle(rough, (int(x) + 8, int(y) + 8), int(1.1 * np.sqrt(disc.sum() / np.pi)), 1, -1)
    given = steps.editor_of(steps.Support(pixels, rough > 0))
    (sharp,) = steps.painted(steps.sharpen(given))
    before, after = ((m & disc).sum() / (m | disc).sum() for m in (rough > 0, sharp.mask))
    assert before < 0.8 < 0.93 < after
    np.testing.assert_array_equal(sharp.pixels, pixels)
    with pytest.raises(UserError, match=r"^paint the object first"):
        steps.sharpen(editor(1, paint=False))


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
    assert complaints == [f"{steps.MOST} photos are the most at a time; 2 are left out"]
    (tmp_path / "notes.png").write_text("not a picture")
    photos, complaints = steps.read_photos([str(tmp_path / "notes.png")] * 2 + [path] * steps.MOST)
    assert (len(photos), len(complaints)) == (steps.MOST, 2)  # what cannot be read takes no photo's place
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


def test_folders_of_demos_that_were_killed_are_removed_and_those_of_running_ones_are_not(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, unlocked = tmp_path / "ntrenet_demo_killed", tmp_path / "ntrenet_demo_other"
    for folder in (killed, unlocked):
        folder.mkdir()
        (folder / "photo.png").write_text("")
    (killed / server.LOCK).write_text("")
    (tmp_path / "ntrenet_demo_link").symlink_to(killed)
    code = "from util.demo.server import upload_folder\nwith upload_folder() as f: print(f, flush=True); input()"
    running = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    folder = Path(running.stdout.readline().strip())
    server.remove_old_folders()
    assert (killed.exists(), unlocked.exists(), folder.is_dir()) == (False, True, True)
    running.send_signal(signal.SIGHUP)
    running.communicate(timeout=60)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("headers", "own"),
    [
        ({"host": "127.0.0.1:7860"}, True),
        ({"host": "localhost:9000", "origin": "http://localhost:9000", "sec-fetch-site": "same-origin"}, True),
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:8888"}, False),
        ({"host": "127.0.0.1:7860", "origin": "null"}, False),
        ({"host": "elsewhere.example:7860"}, False),
        ({"host": "127.0.0.1.elsewhere.example"}, False),
        ({}, False),
    ],
)
def test_requests_of_other_pages_are_not_answered(headers: dict[str, str], own: bool) -> None:
    assert is_own(headers) == own


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
            page.set_default_timeout(120_000)  # a busy machine
            walk(page, served.address, photo_file, support_file, str(tmp_path / "notes.png"), tmp_path)
            refuse(served.address)
            for width in (390, 360):
                phone = browser.new_page(viewport={"width": width, "height": 800})
                phone.set_default_timeout(120_000)
                phone.goto(served.address)
                phone.wait_for_selector("#found img")
                phone.wait_for_timeout(1500)
                assert phone.evaluate("document.documentElement.scrollWidth") == width
                phone.screenshot(path=tmp_path / f"phone{width}.png", full_page=True)
        finally:
            browser.close()
            printed = served.end(signal.SIGHUP)
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

    for changed in (True, False):  # edges on, and off again
        page.click("#edges input")
        page.wait_for_timeout(2500)
        assert np.array_equal(mask_of(page), first) != changed

    page.locator("#photos button").nth(1).click()
    page.wait_for_timeout(1500)
    assert not np.array_equal(mask_of(page), first)
    assert page.evaluate("[...document.images].every(image => image.alt)")

    drop(page, "#support-file", text_file)
    assert "notes.png is no picture" in toast(page)
    drop(page, "#photo-files", text_file)
    assert "notes.png is no picture" in toast(page)

    drop(page, "#support-file", support_file)
    page.wait_for_function("document.querySelector('#status').innerText == 'Paint the object, then press Segment.'")
    assert page.locator("#download a").count() == 0  # the new support clears the old result
    page.click("#segment")
    assert "paint the object first" in toast(page)
    paint(page)
    page.screenshot(path=out / "painted.png", full_page=True)
    page.click("#sharpen")
    page.wait_for_timeout(2000)
    page.screenshot(path=out / "sharpened.png", full_page=True)
    page.click("#segment")
    drop(page, "#photo-files", photo_file)  # while the request runs
    page.wait_for_function("document.querySelectorAll('#photos img').length == 1")
    page.wait_for_function("document.querySelector('#segment').innerText == 'Segment'")
    page.wait_for_timeout(1500)
    assert page.locator("#download a").count() == 0  # it was about other photos
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


def refuse(address: str) -> None:
    """What another page in the same browser might send."""
    for headers in ({"Host": "elsewhere.example"}, {"Origin": "http://elsewhere.example"}):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20)


def segment(page: Any) -> str:
    """Press Segment; what the status says without the time."""
    before = page.inner_text("#status")
    page.click("#segment")
    page.wait_for_function("text => document.querySelector('#status').innerText != text", arg=before)
    page.wait_for_timeout(1500)
    return str(page.inner_text("#status")).rsplit(" in ", 1)[0]


def mask_of(page: Any) -> np.ndarray:
    with page.expect_download() as download:
        page.click("#download a")
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
