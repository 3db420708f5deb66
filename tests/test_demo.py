"""The demo: its answers as functions, its server, and its page in a real browser.

The browser test needs chromium and `pip install playwright==1.55.0`; without them it is skipped.
"""

import base64
import importlib.util
import json
import shutil
import socket
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.harness import finished, start
from tests.scenes import iou, scene
from util.data import synthetic
from util.data.folds import novel_classes
from util.errors import UserError
from util.photos.demo import LONGEST, Demo
from util.photos.example import SEED, SHOWN, draw_example
from util.photos.segmenter import NTRESegmenter

ORIENTATION = 0x0112
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def demo(segmenter: NTRESegmenter) -> Demo:
    return Demo(segmenter)


def url(pixels: np.ndarray, orientation: int = 1) -> str:
    """An image as the page sends it."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    return f"data:image/any;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pixels_of(sent: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(sent.partition(",")[2]))))


def painted(mask: np.ndarray) -> str:
    """Paint as the page sends it."""
    return url(np.dstack([np.zeros((*mask.shape, 3), np.uint8), 255 * mask.astype(np.uint8)]))


def asked(support: tuple[np.ndarray, np.ndarray], photo: str, **changes: object) -> dict[str, Any]:
    image, mask = support
    request = {"support": url(image), "mask": painted(mask), "photo": photo, "name": "photo.png"}
    return request | {"threshold": 0.5, "edges": False} | changes


@pytest.mark.parametrize(("share", "edges"), [(0.5, False), (0.1, False), (0.5, True)])
def test_what_is_painted_is_segmented(demo: Demo, segmenter: NTRESegmenter, share: float, edges: bool) -> None:
    image, _ = scene(4)
    threshold = float(np.quantile(segmenter.segment(*scene(1), image).probability, 1 - share))
    found = segmenter.segment(*scene(1), image, threshold=threshold, edges=edges)
    answer = demo.segment(asked(scene(1), url(image), threshold=threshold, edges=edges))
    np.testing.assert_array_equal(pixels_of(answer["mask"]) == 255, found.mask)
    assert answer["share"] == pytest.approx(found.mask.mean())
    touched = np.abs(pixels_of(answer["overlay"]).astype(int) - image).sum(2)
    assert touched[found.mask].mean() > 2 * touched[~found.mask].mean()
    assert list(answer["maps"]) == ["probability", "prior: similar to the object", "background", "distracting objects"]
    assert all(pixels_of(drawn).shape == image.shape for drawn in answer["maps"].values())


def test_a_large_rotated_photo_is_shrunk_and_its_mask_has_the_size_a_person_sees(demo: Demo) -> None:
    image, disc = scene(4, 1200, 1600)
    stored = url(np.rot90(image).copy(), orientation=6)  # to be rotated clockwise
    answer = demo.segment(asked((scene(1)[0], disc), stored))
    assert pixels_of(answer["overlay"]).shape == (768, LONGEST, 3)
    assert pixels_of(answer["mask"]).shape == disc.shape


def test_a_click_finds_the_object_and_a_mask_file_is_read(demo: Demo) -> None:
    image, disc = scene(1, 240, 320)
    y, x = np.argwhere(disc).mean(0).tolist()
    free = Demo(NTRESegmenter.training_free(device="cpu", precision="fp32"))
    clicked = pixels_of(free.mask({"support": url(image), "click": [x, y]})["mask"])[..., 3] > 0
    assert iou(clicked, disc) > 0.8
    read = pixels_of(demo.mask({"support": url(image), "file": url(255 * disc.astype(np.uint8))})["mask"])
    np.testing.assert_array_equal(read[..., 3] > 0, disc)
    for wrong, words in (({"file": url(image)}, "like an image"), ({"box": [1, 2, None]}, "a box is x0,y0,x1,y1")):
        with pytest.raises(UserError, match=words):
            demo.mask({"support": url(image), **wrong})


def test_blue_paint_is_what_the_target_is_not() -> None:
    free, (support, disc), (image, _) = NTRESegmenter.training_free(device="cpu"), scene(1), scene(4)
    other = np.zeros_like(disc)
    other[:9] = ~disc[:9]
    paint = np.zeros((*disc.shape, 4), np.uint8)
    paint[disc], paint[other] = (230, 60, 60, 255), (70, 120, 235, 255)
    answer = Demo(free).segment(asked((support, disc), url(image), mask=url(paint)))
    target = free.encode(support, disc) + free.encode_negative(support, other)
    np.testing.assert_array_equal(pixels_of(answer["mask"]) == 255, free.segment_encoded(target, image).mask)


def test_all_results_come_in_a_zip(demo: Demo) -> None:
    answer = demo.segment(asked(scene(1), url(scene(4)[0]), threshold=0.4))
    cutout = pixels_of(answer["cutout"])
    np.testing.assert_array_equal(cutout[..., 3], pixels_of(answer["mask"]))
    packed = demo.archive({"files": {"a_mask.png": answer["mask"], "a_cutout.png": answer["cutout"]}})["archive"]
    with zipfile.ZipFile(BytesIO(base64.b64decode(packed.partition(",")[2]))) as archive:
        assert archive.namelist() == ["a_mask.png", "a_cutout.png"]
        np.testing.assert_array_equal(np.asarray(Image.open(archive.open("a_cutout.png"))), cutout)


@pytest.mark.parametrize("fold", [0, 3])
def test_the_example_shows_a_class_that_the_network_was_not_trained_on(segmenter: NTRESegmenter, fold: int) -> None:
    data = segmenter.config.data.model_copy(update={"fold": fold})
    support, mask, queries = draw_example(data)
    (class_id,) = set(SHOWN) & set(novel_classes(data))
    numbers = SHOWN[class_id]
    assert all(class_id in synthetic.classes_of(SEED, "val", n) for n in numbers)
    images, labels = zip(*(synthetic.make_image(SEED, "val", n, synthetic.EXAMPLE) for n in numbers), strict=True)
    assert all(np.array_equal(a, b) for a, b in zip((support, *queries), images, strict=True))
    assert (mask == (labels[0] == class_id)).all() and min(mask.shape) == 448


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    """Address of demo.py in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = start("demo.py", "--checkpoint", checkpoint, "--port", port, "--device", "cpu")
    assert served.stdout is not None and served.stdout.readline().startswith(f"open http://127.0.0.1:{port}")
    yield f"http://127.0.0.1:{port}"
    served.terminate()
    finished(served)


def send(target: str, body: object = None, **headers: str) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(target, data, headers), timeout=60) as answer:
        assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        return answer.read().decode()


def test_the_page_and_its_requests_are_answered(address: str, checkpoint: Path) -> None:
    page = send(address)
    assert "{{" not in page and "Synthetic-5i" in page and "http" not in page.replace("http.server", "")
    request = asked(scene(1), url(scene(4)[0]))
    expected = Demo(NTRESegmenter.from_checkpoint(checkpoint, device="cpu")).segment(request)
    assert json.loads(send(f"{address}/segment", request, Origin=address)) == expected
    with pytest.raises(urllib.error.HTTPError, match="400") as refusal:
        send(f"{address}/segment", request | {"photo": "data:,"})
    assert "photo.png" in json.loads(refusal.value.read())["error"]


@pytest.mark.parametrize("headers", [{"Host": "elsewhere.example"}, {"Origin": "http://127.0.0.1:8888"}])
def test_other_pages_are_not_answered(address: str, headers: dict[str, str]) -> None:
    for path, body in (("/", None), ("/example", {})):
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            send(address + path, body, **headers)


@pytest.mark.browser
@pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason="needs chromium and playwright"
)
def test_the_page_works_in_a_browser_without_any_other_host(address: str, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    for name, pixels in (("support.png", scene(1, 240, 320)[0]), ("photo.jpg", scene(4, 300, 400)[0])):
        Image.fromarray(pixels).save(tmp_path / name)
    hosts: set[str | None] = set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(address)
        page.wait_for_selector("#results figure")  # the example
        page.set_input_files("#support", tmp_path / "support.png")
        page.wait_for_function("!document.querySelector('#results figure')")  # the old result is about another support
        page.set_input_files("#photos", tmp_path / "photo.jpg")
        box = page.locator("#canvas").bounding_box()
        page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
        page.mouse.up()
        page.click("#segment")
        page.wait_for_selector("#results figure")
        with page.expect_download() as download:
            page.click("#results a")
        assert np.asarray(Image.open(download.value.path())).shape == (300, 400)
        page.fill("#box", "60,60,200,200")  # by keyboard alone
        page.keyboard.press("Tab")
        page.wait_for_function("!document.querySelector('#results figure')")
        page.wait_for_function("document.querySelector('#status').textContent.startsWith('Mark')")
        page.focus("#segment")
        page.keyboard.press("Enter")
        page.wait_for_selector("#results figure")
        with page.expect_download() as download:
            page.click("#all")
        assert zipfile.ZipFile(download.value.path()).namelist() == ["photo_mask.png", "photo_cutout.png"]
    assert hosts <= {"127.0.0.1", None, ""}
