"""The demo's server: its page, and answers to the page's requests. Uploads stay in memory, nothing is written.

The page (page.html) sends and gets images as data URLs. A request holds all that its answer depends on; the last
results are kept, so that another threshold takes no new search.
"""

import base64
import html
import json
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any
from zipfile import ZipFile

import cv2
import numpy as np
from PIL import Image

from util.data.images import encoded
from util.engine.panels import DISTRACTOR, TARGET, heat, overlay
from util.errors import UserError
from util.photos.edges import mask_in_box, sharp_mask
from util.photos.example import draw_example
from util.photos.images import read_upright, require_same_size, target_mask
from util.photos.segmenter import NTRESegmenter, Segmentation, Segmenter

HOST = "127.0.0.1"
LONGEST = 1024
"""longer side, in pixels, to which images are shrunk; the network sees fewer"""


class Demo:
    """Answers the page's requests: each method takes one, as parsed JSON, and returns the answer."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self.find = lru_cache(16)(self._find)
        self.encode = lru_cache(1)(self._encode)
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        page = page.replace("{{about}}", html.escape(segmenter.about))
        page = page.replace("{{threshold}}", f"{segmenter.threshold:g}").replace("{{longest}}", str(LONGEST))
        network = isinstance(segmenter, NTRESegmenter)
        self.page = page.replace("{{checked}}", "" if network else "checked")
        self.page = self.page.replace("{{negative}}", "hidden" if network else "")

    def example(self, _: dict[str, Any]) -> dict[str, Any]:
        """Return a drawn support, its mask and two images to search, of a class that was not trained on."""
        data = self.segmenter.config.data if isinstance(self.segmenter, NTRESegmenter) else None
        support, mask, queries = draw_example(data)
        named = [{"name": f"example_{n}", "image": _url(photo, "JPEG")} for n, photo in enumerate(queries, 1)]
        return {"support": _url(support, "JPEG"), "mask": _tinted(mask), "photos": named}

    def mask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Find the object in a box (x0, y0, x1, y1) or at a click (x, y), or read the mask in a file."""
        pixels, size = _read(_bytes(request["support"]), "the support")
        if "click" in request:
            return {"mask": _tinted(self._object_at(pixels, *map(int, request["click"])))}
        if "file" in request:
            with Image.open(BytesIO(_bytes(request["file"]))) as file:
                labels = target_mask(file, None, "the mask")
            require_same_size(labels, np.empty((*size, 3)), "the mask")
            return {"mask": _tinted(cv2.resize(labels, pixels.shape[1::-1], interpolation=cv2.INTER_NEAREST) == 1)}
        if len(request["box"]) != 4 or None in request["box"]:
            raise UserError("a box is x0,y0,x1,y1 in pixels, such as 40,30,220,310")
        (x0, x1), (y0, y1) = (sorted(map(int, request["box"][n::2])) for n in (0, 1))
        height, width = pixels.shape[:2]
        x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
        return {"mask": _tinted(mask_in_box(pixels, (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))))}

    def _object_at(self, pixels: np.ndarray, x: int, y: int) -> np.ndarray:
        """Find the object at a point: the part, connected with it, that resembles a disc around it, boolean (H, W)."""
        disc = np.zeros(pixels.shape[:2], np.uint8)
        cv2.circle(disc, (x, y), max(2, max(disc.shape) // 40), 1, cv2.FILLED)
        found = self.segmenter.segment(pixels, disc, pixels, edges=True).mask | (disc > 0)
        _, parts = cv2.connectedComponents(found.astype(np.uint8))
        return parts == parts[min(max(y, 0), len(disc) - 1), min(max(x, 0), disc.shape[1] - 1)]

    def archive(self, request: dict[str, Any]) -> dict[str, Any]:
        """Pack files, data URLs by name, into a zip."""
        buffer = BytesIO()
        with ZipFile(buffer, "w") as archive:
            for name, url in request["files"].items():
                archive.writestr(name, _bytes(url))
        return {"archive": f"data:application/zip;base64,{base64.b64encode(buffer.getvalue()).decode()}"}

    def segment(self, request: dict[str, Any]) -> dict[str, Any]:
        """Segment one photo: the photo with the target tinted, its mask at the file's size, cut-out, and maps."""
        images = [_bytes(request[key]) for key in ("support", "mask", "photo")]
        pixels, (height, width), result = self.find(*images, request["name"])
        threshold = float(request["threshold"])
        mask = sharp_mask(result.probability, pixels, threshold) if request["edges"] else result.probability > threshold
        full = cv2.resize(255 * mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR) > 127
        maps = {"probability": heat(result.probability)}
        if result.prior is not None:
            maps["prior: similar to the object"] = heat(result.prior)
        if result.bg is not None:
            maps["background"] = heat(result.bg)
        if result.distractor is not None:
            maps["distracting objects"] = overlay(pixels, result.distractor > 0.5, DISTRACTOR)
        return {
            "overlay": _url(overlay(pixels, mask, TARGET), "JPEG"),
            "mask": _url(255 * full.astype(np.uint8)),
            "cutout": _url(np.dstack([pixels, 255 * mask.astype(np.uint8)])),
            "share": float(mask.mean()),
            "presence": result.presence,
            "maps": {name: _url(drawn, "JPEG") for name, drawn in maps.items()},
        }

    def _encode(self, support: bytes, mask: bytes) -> list[Any]:
        """Encode the target, painted red, and what it is not, painted blue."""
        pixels, target, other = _support(support, mask)
        encoded = self.segmenter.encode(pixels, target)
        return encoded + (self.segmenter.encode_negative(pixels, other) if other.any() else [])

    def _find(
        self, support: bytes, mask: bytes, photo: bytes, name: str
    ) -> tuple[np.ndarray, tuple[int, int], Segmentation]:
        """Return the photo, shrunk, its size (H, W) before that, and the result in it."""
        pixels, size = _read(photo, name)
        return pixels, size, self.segmenter.segment_encoded(self.encode(support, mask), pixels)


class Server(ThreadingHTTPServer):
    """Serves a demo on this machine."""

    daemon_threads = True

    def __init__(self, demo: Demo, port: int) -> None:
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} cannot be used ({error}); choose another with --port") from error
        self.demo, self.lock = demo, Lock()


class Handler(BaseHTTPRequestHandler):
    """Answers the demo's own page only: no other page in the browser may read or send anything."""

    server: Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        """Send the page."""
        if self._is_own() and self.path == "/":
            self._send(200, "text/html; charset=utf-8", self.server.demo.page)
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        """Answer a request of the page with JSON; a user's mistake with its message."""
        demo = self.server.demo
        answers = {"/example": demo.example, "/mask": demo.mask, "/segment": demo.segment, "/archive": demo.archive}
        if not self._is_own() or self.path not in answers:
            self.send_error(403)
            return
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            with self.server.lock:  # one search, and one large image, at a time
                status, answer = 200, answers[self.path](request)
        except UserError as error:
            status, answer = 400, {"error": str(error)}
        self._send(status, "application/json", json.dumps(answer))

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing about requests."""

    def _is_own(self) -> bool:
        """Check ``Host`` against names that other sites let point here, and ``Origin`` against other sites."""
        own = [f"{name}:{self.server.server_address[1]}" for name in (HOST, "localhost")]
        host = self.headers["Host"]
        return host in own and self.headers.get("Origin", f"http://{host}") == f"http://{host}"

    def _send(self, status: int, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")  # no other page may show this one
        self.end_headers()
        self.wfile.write(data)


def _read(data: bytes, name: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Read an uploaded image, shrunk to ``LONGEST``, and its size (H, W) before that."""
    pixels = read_upright(BytesIO(data), name).pixels
    height, width = pixels.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shrunk = pixels if scale == 1 else cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return shrunk, (height, width)


def _support(support: bytes, mask: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a support, its target and what it is not, boolean: the opaque pixels of a PNG, more red or more blue."""
    pixels, _ = _read(support, "the support")
    with Image.open(BytesIO(mask), formats=["PNG"]) as painted:
        paint = np.asarray(painted.convert("RGBA").resize(pixels.shape[1::-1], Image.Resampling.BOX))
    target, other = ((paint[..., 3] >= 128) & (blue == (paint[..., 2] > paint[..., 0])) for blue in (False, True))
    if not target.any():
        raise UserError("paint the object first, or draw a box around it")
    return pixels, target, other


def _tinted(mask: np.ndarray) -> str:
    """Encode a mask as paint: opaque red on transparent."""
    return _url(np.dstack([np.broadcast_to(np.array(TARGET, np.uint8), (*mask.shape, 3)), 255 * mask.astype(np.uint8)]))


def _bytes(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def _url(pixels: np.ndarray, kind: str = "PNG") -> str:
    data = encoded(Image.fromarray(pixels), kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
