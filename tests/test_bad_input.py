"""No bad input passes: every kind of file that a user gives, damaged, is refused in one line or read right.

A case damages one sound file and reads it as the commands do. Its verdict is one of

    refused: exit code 2 and one line that names the file
    same: what the sound file gives
    either: one of the two; where the damage may hit a place that nothing reads

Never a traceback, other numbers, or code that runs. What the commands themselves refuse is in test_refusals.py.
"""

from util.command import run_command

import functools
import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm
from util.segment import pictures
from util.segment.targets import read_targets

from model.weights import load_exactly, read_weights
from scripts import prepare_pascal
from tests.harness import ROOT, Trap, ended, refused
from tests.scenes import scene
from util.config import load_config
from util.data.class_index import load_class_index
from util.data.episodes import EpisodeSampler, read_episodes, write_episodes
from util.data.images import MAX_PIXELS, read_class_ids, read_image
from util.engine.checkpoint import load_checkpoint, saved_config
from util.engine.record import keep_json_lines
from util.errors import UserError

CLASSES = ["cat", "dog", "Großer Hund", "猫"]
HEIGHT, WIDTH = 40, 56
Damage = Callable[[Path], Path | None]
"""changes the file at a path, or puts another thing there; returns a path where that is another"""

CONFIG = """\
data:
  dataset: small
  root: {root}
  train_list: {root}/train.txt
  val_list: {root}/train.txt
  classes: [cat, dog, Großer Hund, 猫]
  fold: 1
  min_area: 100
  image_size: 65
model: {{backbone: efficientnet_lite0, fem_scales: [1, 0.5], prototype_channels: 16}}
seed: 7
device: cpu
"""


# ---------------------------------------------------------------- the sound files


def labels(seed: int) -> np.ndarray:
    """Mask (H, W) with an ignored border, one class as a disc and a little of another."""
    disc = scene(seed, HEIGHT, WIDTH)[1]
    mask = np.where(disc, seed % len(CLASSES) + 1, 0).astype(np.uint8)
    mask[0] = 255
    mask[-3:, :5] = (seed + 1) % len(CLASSES) + 1
    return mask


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def palette(mask: np.ndarray) -> Image.Image:
    picture = Image.fromarray(mask)
    picture.putpalette([value for n in range(256) for value in (n, 255 - n, n // 2)])
    return picture


def saved(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


PICTURE, MASK = scene(3, HEIGHT, WIDTH)[0], labels(3)
STATE = {"weight": torch.arange(60.0).reshape(5, 12), "bias": torch.linspace(-1, 1, 5)}


def contents(**changes: Any) -> dict[str, Any]:
    """Of a checkpoint, but for its model a real one."""
    config = load_config(ROOT / "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml")
    return {
        "format": 3,
        "config": config.model_dump(),
        "weights": {"source": "somewhere", "stem": "standard", "sha256": ""},
        "list_sha256": {"lists/train.txt": "0" * 64},
        "step": 3,
        "best_miou": 0.5,
        "seconds": 1.5,
        "model": STATE,
        **changes,
    }


@functools.cache
def bytes_of(kind: str) -> bytes:
    """The sound file of a kind that is the same everywhere."""
    if kind == "checkpoint":
        return saved(contents())
    if kind == "weights":
        return saved(STATE)
    return encoded(palette(MASK) if "mask" in kind else Image.fromarray(PICTURE), "PNG")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data set of 8 pictures, its list, config, episodes and targets."""
    root = tmp_path_factory.mktemp("world")
    lines = []
    for n in range(8):
        Image.fromarray(scene(n, HEIGHT, WIDTH)[0]).save(root / f"ü{n}.jpg", quality=90)
        palette(labels(n)).save(root / f"ü{n}.png")
        lines.append(f"ü{n}.jpg ü{n}.png\n")
    (root / "train.txt").write_text("".join(lines), encoding="utf-8")
    (root / "config.yaml").write_text(CONFIG.format(root=root), encoding="utf-8")
    index = load_class_index(root / "train.txt", root, len(CLASSES), progress=False)
    sampler = EpisodeSampler(index, classes=(2,), shots=1, min_area=100, seed=0, class_names=CLASSES)
    write_episodes(root / "episodes.jsonl", sampler, 6, root=root, class_names=CLASSES)
    (root / "targets.yaml").write_text("Hündin: {supports: [ü1.jpg, ü5.jpg], masks: [ü1.png, ü5.png], class_id: 2}\n")
    yield root
    shutil.rmtree(root)


FILES = {
    "mask": "mask.png",
    "photo mask": "mask.png",
    "image": "image.png",
    "photo": "photo.png",
    "checkpoint": "best.pt",
    "weights": "weights.pth",
    "config": "config.yaml",
    "list": "train.txt",
    "cache": "train.txt.index.npz",
    "episodes": "episodes.jsonl",
    "targets": "targets.yaml",
}
IN_WORLD = ("config", "list", "cache", "episodes", "targets")


def sound(kind: str, world: Path, folder: Path) -> Path:
    """A sound file of a kind in ``folder``, with what belongs to it."""
    path = folder / FILES[kind]
    if kind in IN_WORLD:
        for file in world.iterdir():
            if file.suffix != ".npz" or kind == "cache":
                shutil.copy2(file, folder)
    else:
        path.write_bytes(bytes_of(kind))
    return path


def read(kind: str, path: Path, world: Path) -> Any:
    """Read a file as the commands do."""
    if kind == "mask":
        return read_class_ids(path)
    if kind == "photo mask":
        return pictures.target_mask(pictures.read_mask_on(pictures.Picture(PICTURE, 1), path), 4, str(path))
    if kind == "image":
        return read_image(path)
    if kind == "photo":
        return pictures.read_picture(path).pixels
    if kind == "checkpoint":
        state = load_checkpoint(path)
        saved_config(state, path)
        return state
    if kind == "weights":
        state, _ = read_weights(path)
        layer = torch.nn.Linear(12, 5)
        load_exactly(layer, state, source=str(path))
        return layer.state_dict()
    if kind == "config":
        return load_config(path)
    if kind in ("list", "cache"):
        folder = path.parent
        index = load_class_index(folder / "train.txt" if kind == "cache" else path, folder, 4, progress=False)
        return {item[:2]: index.pixels[[n]].toarray()[0] for n, item in enumerate(index.items)}
    if kind == "episodes":
        index = load_class_index(world / "train.txt", world, len(CLASSES), progress=False)
        return [list(e) for e in read_episodes(path, index, root=world, classes=(2,), shots=1)]
    return read_targets(path)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray | torch.Tensor):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


# ---------------------------------------------------------------- damage to bytes, and to files of any kind


def cut(share: float) -> Damage:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: min(int(share * len(data)), len(data) - 1)])

    return damage


def flip(seed: int) -> Damage:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[random.Random(seed).randrange(len(data))] ^= 1 << seed % 8
        path.write_bytes(data)

    return damage


def becomes(data: Callable[[], bytes]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(data())

    return damage


def edited(change: Callable[[bytes], bytes]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def missing(path: Path) -> None:
    path.unlink()


def renamed(path: Path) -> Path:
    return path.rename(path.with_name("größer 猫 файл 😀" + path.suffix))


ANY_FILE: dict[str, tuple[str, Damage]] = {
    "is missing": ("refused", missing),
    "is empty": ("refused", becomes(bytes)),
    "is a folder": ("refused", as_folder),
    "is a pipe": ("refused", as_pipe),
    "is noise": ("refused", becomes(lambda: random.Random(1).randbytes(5000))),
    "has a name of many scripts": ("same", renamed),
}


# ---------------------------------------------------------------- damage to pictures


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, data: bytes, *chunks: bytes, interlace: int = 0) -> bytes:
    """A PNG with sound checksums; ``data`` are rows, each with its filter's byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rows(values: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in values)


def packed(bits: int) -> bytes:
    """Mask of class 4 and 0 as PNG of grey with few bits, its values the ids."""
    ids = np.where(MASK == 4, 4 if bits == 4 else 1, 0)
    places = (ids[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return png(WIDTH, HEIGHT, bits, 0, rows(np.packbits(places.reshape(HEIGHT, -1).astype(np.uint8), axis=1)))


def interlaced() -> bytes:
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    data = b"".join(rows(MASK[y::dy, x::dx]) for x, y, dx, dy in passes)
    return png(WIDTH, HEIGHT, 8, 0, data, interlace=1)


def grey16(values: np.ndarray) -> bytes:
    return png(WIDTH, HEIGHT, 16, 0, rows(values.astype(">u2")))


def rgb16() -> bytes:
    return png(WIDTH, HEIGHT, 16, 2, rows((PICTURE.astype(np.uint16) * 256 + 77).astype(">u2").reshape(HEIGHT, -1)))


def text_bomb() -> bytes:
    """A compressed comment that unpacks to 200 MB."""
    return png(WIDTH, HEIGHT, 8, 0, rows(MASK), chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"0" * 200_000_000, 1)))


def tiff_inverted() -> bytes:
    """Grey where 0 is white: Pillow turns value 4 into 251."""
    return encoded(Image.fromarray(MASK), "TIFF", tiffinfo={262: 0})


def huge(width: int, height: int) -> Damage:
    return becomes(lambda: png(width, height, 8, 0, b"\0" * 500))


SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 56 40\n%%EndComments\n(/tmp/x) (w) file closefile\nshowpage\n"
"""a program in PostScript, which Pillow would hand to Ghostscript"""

PICTURES: dict[str, tuple[str, Damage]] = {
    "is a PostScript program": ("refused", becomes(lambda: SCRIPT)),
    "has a comment of 200 MB": ("refused", becomes(text_bomb)),
    "is 100000x100000": ("refused", huge(100_000, 100_000)),
    "is a pixel more than the limit": ("refused", huge(MAX_PIXELS + 1, 1)),
    "is 0x0": ("refused", huge(0, 0)),
}
MASKS: dict[str, tuple[str, Damage]] = {
    "is grey": ("same", becomes(lambda: encoded(Image.fromarray(MASK), "PNG"))),
    "is interlaced": ("same", becomes(interlaced)),
    "has a transparent colour": ("same", becomes(lambda: encoded(palette(MASK), "PNG", transparency=4))),
    "is grey of 2 bits": ("refused", becomes(lambda: packed(2))),
    "is grey of 4 bits": ("refused", becomes(lambda: packed(4))),
    "is coloured": ("refused", becomes(lambda: encoded(palette(MASK).convert("RGB"), "PNG"))),
    "is coloured with 16 bits": ("refused", becomes(rgb16)),
    "is a lossy JPEG": ("refused", becomes(lambda: encoded(Image.fromarray(MASK), "JPEG"))),
    "is a lossy WebP": ("refused", becomes(lambda: encoded(Image.fromarray(MASK), "WEBP"))),
    "is an inverted TIFF": ("refused", becomes(tiff_inverted)),
}
IMAGES: dict[str, tuple[str, Damage]] = {
    "is grey of 16 bits": ("refused", becomes(lambda: grey16(MASK.astype(np.uint16) * 256))),
    "is of floats": ("refused", becomes(lambda: encoded(Image.fromarray(MASK.astype(np.float32)), "TIFF"))),
    "is a GIF": ("refused", becomes(lambda: encoded(palette(MASK), "GIF"))),
    "is coloured with 16 bits": ("same", becomes(rgb16)),
}


def in_three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, 2).astype(np.uint8)


READ: dict[str, tuple[Callable[[], bytes], Callable[[], np.ndarray]]] = {
    "opaque": (lambda: encoded(Image.fromarray(PICTURE).convert("RGBA"), "PNG"), lambda: PICTURE),
    "grey of 4 bits": (lambda: packed(4), lambda: in_three(np.where(MASK == 4, 4 * 17, 0))),
    "of 1 bit": (lambda: encoded(Image.fromarray(MASK == 4), "PNG"), lambda: in_three(255 * (MASK == 4))),
    "a palette": (lambda: bytes_of("mask"), lambda: np.dstack([MASK, 255 - MASK, MASK // 2])),
    "CMYK in a TIFF": (
        lambda: encoded(Image.fromarray(np.dstack([255 - PICTURE, np.zeros_like(MASK)]), "CMYK"), "TIFF"),
        lambda: PICTURE,
    ),
}


# ---------------------------------------------------------------- damage to text


def replaced(old: str, new: str) -> Damage:
    def damage(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return damage


def added(text: str) -> Damage:
    return edited(lambda data: data + text.encode("utf-8", "surrogatepass"))


TEXT: dict[str, tuple[str, Damage]] = {
    "has Windows line ends": ("same", edited(lambda data: data.replace(b"\n", b"\r\n"))),
    "has a byte order mark": ("same", edited(lambda data: b"\xef\xbb\xbf" + data)),
    "is Latin-1": ("refused", edited(lambda data: data.decode().replace("猫", "x").encode("latin-1") + b"\xff")),
    "has a NUL in it": ("refused", edited(lambda data: data[:20] + b"\0" + data[20:])),
}
YAML: dict[str, tuple[str, Damage]] = {
    "nests lists a hundred thousand deep": ("refused", added("x: " + "[" * 100_000)),
    "makes an object": ("refused", added("x: !!python/object/apply:os.mkdir [exploded]\n")),
    "has an empty !!int": ("refused", added("x: !!int ''\n")),
    "has month 13": ("refused", added("x: 2020-13-01\n")),
    "is a list": ("refused", becomes(lambda: b"- a\n- b\n")),
    "is null": ("refused", becomes(lambda: b"~\n")),
}
FIRST = "ü0.jpg ü0.png"


def beside(name: str, damage: Damage) -> Damage:
    """Damage to a file that the list names."""

    def to_other(path: Path) -> None:
        damage(path.with_name(name))

    return to_other


def mask_file(mask: np.ndarray) -> Damage:
    return becomes(lambda: encoded(palette(mask), "PNG"))


LISTS: dict[str, tuple[str, Damage]] = {
    "has blank lines and spaces": ("same", edited(lambda data: b"\n \n" + data.replace(b" ", b" \t ") + b"  \n\n")),
    "has a leading slash": ("same", replaced(FIRST, "/ü0.jpg /ü0.png")),
    "has one column": ("refused", replaced(FIRST, "ü0.jpg")),
    "has a name with a space": ("refused", replaced(FIRST, "u 0.jpg ü0.png")),
    "has a line twice in other words": ("refused", added("./ü0.jpg .//ü0.png\n")),
    "has blanks alone": ("refused", becomes(lambda: b" \n\t\n\n")),
    "has a name of 300 letters": ("refused", replaced("ü0.png", "a" * 300)),
    "has a Unicode line end": ("refused", replaced(FIRST, "ü0.jpg\u2028ü0.png")),
    "has image and mask swapped": ("refused", replaced(FIRST, "ü0.png ü0.jpg")),
    "has a folder as mask": ("refused", replaced("ü0.png", ".")),
    "names a mask of another size": ("refused", beside("ü3.png", mask_file(MASK[1:]))),
    "names a mask that is missing": ("refused", beside("ü3.png", missing)),
    "names an image that is missing": ("refused", beside("ü3.jpg", missing)),
    "names a mask with a turned bit": ("refused", beside("ü3.png", flip(5))),
    "names a mask of class 5": ("refused", beside("ü3.png", mask_file(MASK + (MASK == 4)))),
    "names a huge image": ("refused", beside("ü3.jpg", huge(100_000, 100_000))),
}


def change_first(**changes: Any) -> Damage:
    """Change the first of a file's episodes."""

    def damage(path: Path) -> None:
        first, *others = path.read_text().splitlines(keepends=True)
        path.write_text(json.dumps(json.loads(first) | changes) + "\n" + "".join(others))

    return damage


EPISODES: dict[str, tuple[str, Damage]] = {
    "lacks its last line end": ("same", edited(lambda data: data.rstrip(b"\n"))),
    "nests lists deep": ("refused", edited(lambda data: b"[" * 100_000 + b"\n" + data)),
    "has null": ("refused", edited(lambda data: b"null\n" + data)),
    "has a line without keys": ("refused", edited(lambda data: b"{}\n" + data)),
    **{
        f"has {what}": ("refused", change_first(**changes))
        for what, changes in {
            "a class that is true": {"class_id": True},
            "a fraction as class": {"class_id": 2.0},
            "class -2": {"class_id": -2},
            "a base class": {"class_id": 1},
            "two supports": {"supports": ["ü1.jpg ü1.png", "ü5.jpg ü5.png"]},
            "itself as support": {"query": "ü1.jpg ü1.png", "supports": ["ü1.jpg ü1.png"]},
            "text as supports": {"supports": "ü1.jpg ü1.png"},
            "a foreign image": {"query": "other.jpg"},
            "the hash of another list": {"list_sha256": "0" * 64},
        }.items()
    },
}
TARGETS: dict[str, tuple[str, Damage]] = {
    f"has {what}": ("refused", becomes(text.encode))
    for what, text in {
        "text as target": "dog: ü1.jpg\n",
        "no masks": "dog: {supports: [ü1.jpg]}\n",
        "a mask too few": "dog: {supports: [ü1.jpg, ü5.jpg], masks: [ü1.png]}\n",
        "a fraction as class": "dog: {supports: [ü1.jpg], masks: [ü1.png], class_id: 2.5}\n",
        "an unknown key": "dog: {supports: [ü1.jpg], masks: [ü1.png], class: 2}\n",
        "a missing support": "dog: {supports: [none.jpg], masks: [ü1.png]}\n",
        "255 targets": "".join(f"t{n}: {{supports: [ü1.jpg], masks: [ü1.png]}}\n" for n in range(255)),
    }.items()
}


# ---------------------------------------------------------------- damage to tensors


def holds(content: Callable[[Path], Any], **options: Any) -> Damage:
    """Saved with torch.save; the argument is the path of a folder that code in it would make."""

    def damage(path: Path) -> None:
        torch.save(content(path.with_name("exploded")), path, **options)

    return damage


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(path.with_name("exploded")), protocol=2))


def bomb(path: Path) -> None:
    """The same entries, compressed, and a storage of 100 MB of zeros."""
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            with new.open(entry.filename, "w", force_zip64=True) as file:
                for _ in range(100 if entry.filename.endswith("/data/0") else 0):
                    file.write(bytes(1_000_000))
                if not entry.filename.endswith("/data/0"):
                    file.write(old.read(entry))


def deflated(path: Path) -> None:
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry) + bytes(50_000 if entry.filename.endswith("version") else 0))


def a_weight(change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    return {**STATE, "weight": change(STATE["weight"].clone())}


TENSORS: dict[str, Callable[[], Any]] = {
    "NaN": lambda: a_weight(lambda w: w.fill_(float("nan"))),
    "complex numbers": lambda: a_weight(lambda w: w.to(torch.complex64)),
    "a tensor without storage": lambda: a_weight(lambda w: w.to("meta")),
    "lists for tensors": lambda: a_weight(lambda w: w.tolist()),
    "names that are numbers": lambda: {1: torch.zeros(2)},
    "a list for a state": lambda: [torch.zeros(3)],
}
WEIGHTS: dict[str, Damage] = {
    **{f"has {name}": holds(lambda _, make=make: make()) for name, make in TENSORS.items()},  # type: ignore[misc]
    "has one number for a million million": holds(lambda _: a_weight(lambda _: torch.zeros(()).expand(10**6, 10**6))),
    "has whole numbers": holds(lambda _: a_weight(lambda w: w.long())),
    "has another shape": holds(lambda _: a_weight(lambda w: w.T)),
    "has a tensor too many": holds(lambda _: {**STATE, "more": torch.zeros(1)}),
    "lacks a tensor": holds(lambda _: {"weight": STATE["weight"]}),
    "has code in a state_dict": holds(lambda folder: {"state_dict": Trap(folder)}),
}
CHECKPOINTS: dict[str, Damage] = {
    **{f"has {name}": holds(lambda _, make=make: contents(model=make())) for name, make in TENSORS.items()},  # type: ignore[misc]
    **{
        f"lacks its {key}": holds(lambda _, key=key: {k: v for k, v in contents().items() if k != key})  # type: ignore[misc]
        for key in contents()
    },
    **{
        f"has {what}": holds(lambda _, changes=changes: contents(**changes))  # type: ignore[misc]
        for what, changes in {
            "format 1": {"format": 1},
            "a list as config": {"config": [1]},
            "an unknown key in its config": {"config": contents()["config"] | {"sede": 1}},
            "a huge network": {"config": contents()["config"] | {"model": {"prototype_channels": 10**12}}},
            "a strange stem": {"weights": {"source": "", "stem": "thin", "sha256": ""}},
            "text as step": {"step": "3"},
            "a negative step": {"step": -3},
            "numbers as list hashes": {"list_sha256": {"a": 1}},
        }.items()
    },
    "has code in it": holds(lambda folder: {**contents(), "extra": Trap(folder)}),
    "is weights alone": holds(lambda _: STATE),
}
TORCH_FILES: dict[str, Damage] = {
    "is a pickle with code": pickled,
    "is of torch before 1.6 with code": holds(Trap, _use_new_zipfile_serialization=False),
    "is a zip bomb": bomb,
    "is compressed and swells": deflated,
    "has bytes before it": edited(lambda data: b"more" + data),
    "has a number changed": edited(lambda data: data.replace(struct.pack("<f", 33), struct.pack("<f", 34))),
}


def stored_cache(**arrays: Any) -> Damage:
    """A cache with its own key and other arrays."""

    def damage(path: Path) -> None:
        with np.load(path) as stored:
            held = dict(stored) | arrays
        np.savez_compressed(path, **{key: value for key, value in held.items() if value is not None})

    return damage


CACHES: dict[str, Damage] = {
    "has areas of text": stored_cache(areas=np.full(20, "many")),
    "has areas of objects": stored_cache(areas=np.array([[Trap(Path("exploded"))]], object)),
    "lacks its areas": stored_cache(areas=None),
    "lacks its key": stored_cache(key=None),
}


# ---------------------------------------------------------------- the cases


class Case(NamedTuple):
    kind: str
    verdict: str
    damage: Damage


def all_cases() -> dict[str, Case]:
    cases = {}
    texts, pictures_ = ("config", "list", "episodes", "targets"), ("mask", "photo mask", "image", "photo")
    for kind in FILES:
        for name, (verdict, damage) in ANY_FILE.items():
            if not (kind == "cache" and damage is renamed):  # a cache has one name
                cases[f"{kind} {name}"] = Case(kind, "same" if kind == "cache" else verdict, damage)
        if kind not in texts:
            verdict = "same" if kind == "cache" else "either"
            for share in (0.01, 0.5, 0.99):
                cases[f"{kind} cut at {share:.0%}"] = Case(kind, verdict, cut(share))
            for seed in range(4):
                cases[f"{kind} with bit {seed} turned"] = Case(kind, verdict, flip(seed))
    groups: list[tuple[tuple[str, ...], dict[str, tuple[str, Damage]]]] = [
        (texts, TEXT),
        (("config", "targets"), YAML),
        (("list",), LISTS),
        (("episodes",), EPISODES),
        (("targets",), TARGETS),
        (("checkpoint", "weights"), {name: ("refused", damage) for name, damage in TORCH_FILES.items()}),
        (("checkpoint",), {name: ("refused", damage) for name, damage in CHECKPOINTS.items()}),
        (("weights",), {name: ("refused", damage) for name, damage in WEIGHTS.items()}),
        (("cache",), {name: ("same", damage) for name, damage in CACHES.items()}),
        (pictures_, PICTURES),
        (pictures_[:2], MASKS),
        (pictures_[2:], IMAGES),
    ]
    for kinds, group in groups:
        for kind in kinds:
            cases |= {f"{kind} {name}": Case(kind, verdict, damage) for name, (verdict, damage) in group.items()}
    return cases


CASES = all_cases()


@pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)
@pytest.mark.parametrize("name", CASES)
def test_a_damaged_file_is_refused_by_name_or_read_right(name: str, world: Path, tmp_path: Path) -> None:
    kind, verdict, damage = CASES[name]
    path = sound(kind, world, tmp_path)
    whole = read(kind, path, world)
    if kind in ("mask", "image", "photo"):
        assert same(whole, MASK if kind == "mask" else PICTURE)
    if kind == "list":
        (tmp_path / "train.txt.index.npz").unlink(missing_ok=True)
    path = damage(path) or path
    values: list[Any] = []
    result = ended(lambda: values.append(read(kind, path, world)))
    assert not list(tmp_path.glob("**/exploded")) and not Path("exploded").exists(), "code in the file has run"
    if result.code == 2:
        refused(result, tmp_path if kind == "list" else path)
        assert verdict != "same", result.err
        return
    assert result.code == 0 and verdict != "refused", result
    if kind == "config":
        assert values[0].model_dump(exclude={"run_dir"}) == whole.model_dump(exclude={"run_dir"})
    else:
        assert same(values[0], whole)


@pytest.mark.parametrize("name", READ)
def test_a_picture_of_any_encoding_is_read_right(name: str, tmp_path: Path) -> None:
    data, wanted = READ[name]
    path = tmp_path / "picture.png"
    path.write_bytes(data())
    for pixels in (read_image(path), pictures.read_picture(path).pixels):
        assert np.abs(pixels.astype(int) - wanted()).max() <= (1 if "CMYK" in name else 0)


def test_a_picture_that_exif_turns_is_read_as_stored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PICTURE).save(tmp_path / "i.png", exif=exif)
    assert same(read_image(tmp_path / "i.png"), PICTURE)


@pytest.mark.parametrize("seed", range(3))
def test_a_mask_damaged_in_its_archive_is_not_prepared(seed: int, tmp_path: Path) -> None:
    data, target = bytearray(bytes_of("mask")), tmp_path / "2007_000001.png"
    start = data.index(b"IDAT")
    data[random.Random(seed).randrange(start, len(data) - 12)] ^= 1 << seed % 8
    with pytest.raises(UserError, match=r"voc\.tar: a\.png is damaged"):
        prepare_pascal.write_mask((bytes(data), target, "voc.tar: a.png"))
    assert not target.exists()
    prepare_pascal.write_mask((bytes_of("mask"), target, "voc.tar: a.png"))
    assert target.read_bytes() == bytes_of("mask")


@pytest.mark.parametrize("line", ["{", "[1]", "null", "{}", '{"step": "2"}', "", "\0", "[" * 100_000, "\udcff"])
def test_a_record_with_a_damaged_line_is_refused_and_left(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    data = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'.encode(errors="surrogateescape")
    path.write_bytes(data)
    refused(ended(lambda: keep_json_lines(path, lambda record: record["step"] <= 2)), path)
    assert path.read_bytes() == data


def test_a_record_loses_a_last_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_json_lines(path, lambda record: record["step"] <= 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# ---------------------------------------------------------------- how a command ends


def test_a_refusal_is_one_line_of_printable_text_whatever_it_names() -> None:
    def main() -> None:
        raise UserError("list a\nb\x1b[31m.txt does not exist")

    assert ended(main).err == "error: list a b\\x1b[31m.txt does not exist\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_nothing_but_text_is_printed_whatever_a_name_holds(stream: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2J\x9b1A\x07\u202eb\x1b[A\ud800"

    def main() -> None:
        print(f"left out: {name}\tgr\xfc\xdfe", file=getattr(sys, stream))
        tqdm.write(name, getattr(sys, stream))

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 0
    escaped = r"a\x1b[2J\x9b1A\x07\u202eb\x1b[A\ud800"
    assert getattr(capsys.readouterr(), stream[3:]) == f"left out: {escaped}\tgr\xfc\xdfe\n{escaped}\n"


def test_too_little_memory_is_no_traceback() -> None:
    for allocate in (lambda: torch.empty(2**50), lambda: np.zeros(2**50)):
        refused(ended(allocate), "out of memory", "train.batch_size")


def test_other_errors_keep_their_traceback() -> None:
    def main() -> None:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        run_command(main)
