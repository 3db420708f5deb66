"""No bad input passes: every file a user gives, damaged in some hundred ways, is refused in one line or read right.

A case damages one sound file and reads it as the commands do. Its verdict is one of

    refused: exit code 2 and one line that names the file
    same: what the sound file gives
    either: one of the two; where the damage may hit a place that nothing reads
    as written: refused, or what the damaged file says by an independent reading: text has no checksum
    any: refused, or a picture of the same size: JPEG has no checksum

Never a traceback, other numbers, or code that runs.
"""

from util.command import run_command

import contextlib
import functools
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import predict
import train
from model.weights import load_exactly, read_weights
from scripts import check_data, prepare_pascal
from tests.scenes import SMALL, scene
from util.config import Config, config_from_dict, flatten, known_keys, load_config
from util.data.class_index import load_class_index, read_list
from util.data.episodes import EpisodeSampler, read_episodes, write_episodes
from util.data.images import MAX_PIXELS, read_class_ids, read_image
from util.engine.build import build_model
from util.engine.checkpoint import load_checkpoint, save_checkpoint, saved_config
from util.engine.record import keep_json_lines
from util.errors import UserError
from util.segment import pictures
from util.segment.targets import read_targets

ROOT = Path(__file__).resolve().parent.parent
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
  scale: [0.9, 1.1]
model: {{backbone: efficientnet_lite0, fem_scales: [1, 0.5], prototype_channels: 16}}
train: {{lr: 0.02, momentum: 0.75, epochs: 12}}
seed: 7
device: cpu
"""


# The sound files


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
    if kind in ("weights", "old weights"):
        return saved(STATE, _use_new_zipfile_serialization=kind == "weights")
    if kind == "JPEG":
        return encoded(Image.fromarray(PICTURE), "JPEG", quality=90)
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


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of the real network with random weights."""
    path = tmp_path_factory.mktemp("network") / "small.pt"
    config = load_config(ROOT / "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml", SMALL)
    model, weights = build_model(config, "random")
    save_checkpoint(path, contents(config=config.model_dump(), weights=weights._asdict(), model=model.state_dict()))
    yield path
    path.unlink()


FILES = {
    "mask": "mask.png",
    "photo mask": "mask.png",
    "image": "image.png",
    "photo": "photo.png",
    "JPEG": "image.jpg",
    "checkpoint": "best.pt",
    "weights": "weights.pth",
    "old weights": "weights.pth",
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
    if kind in ("image", "JPEG"):
        return read_image(path)
    if kind == "photo":
        return pictures.read_picture(path).pixels
    if kind == "checkpoint":
        state = load_checkpoint(path)
        saved_config(state, path)
        return state
    if kind in ("weights", "old weights"):
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


def written(kind: str, path: Path, world: Path) -> Any:
    """What a damaged text says, read without any of our code; only for what our code has accepted."""
    text = path.read_bytes().decode("utf-8-sig")
    if kind == "config":
        return {key: value for key, value in flatten(yaml.safe_load(text))}
    if kind == "list":
        folder = path.parent
        pairs = [line.split() for line in text.splitlines() if line.split()]
        counts = {}
        for image, mask in pairs:
            with Image.open(folder / mask.lstrip("/")) as picture:
                values = np.asarray(picture)
            counts[folder / image.lstrip("/"), folder / mask.lstrip("/")] = np.array(
                [(values == c).sum() for c in range(5)]
            )
        return counts
    if kind == "episodes":
        names = (world / "train.txt").read_text().splitlines()
        records = [json.loads(line) for line in text.splitlines()]
        return [[names.index(r["query"]), tuple(names.index(s) for s in r["supports"]), r["class_id"]] for r in records]
    return {
        name: {**entry, **{key: [str(path.parent / p) for p in entry[key]] for key in ("supports", "masks")}}
        for name, entry in yaml.safe_load(text).items()
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray | torch.Tensor):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


class Ending(NamedTuple):
    code: int
    err: str
    value: Any = None


def ended(action: Callable[[], Any]) -> Ending:
    """Run something as a command's main is run."""
    values, err = [], io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        run_command(lambda: values.append(action()))
    assert isinstance(end.value.code, int)
    return Ending(end.value.code, err.getvalue(), values[0] if values else None)


def refusal(ending: Ending, *pieces: object) -> None:
    """Assert one line that names the file."""
    assert ending.code == 2, ending
    lines = [line for line in ending.err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), ending.err
    for piece in pieces:
        assert str(piece) in lines[0]


# Damage to bytes: cut short, and one bit turned


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


# Damage to pictures


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


def with_alpha(value: int) -> Image.Image:
    return Image.fromarray(np.dstack([PICTURE, np.full((HEIGHT, WIDTH), value, np.uint8)]))


def text_bomb() -> bytes:
    """A compressed comment that unpacks to 200 MB."""
    return png(WIDTH, HEIGHT, 8, 0, rows(MASK), chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"0" * 200_000_000, 1)))


def commented() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "made by hand")
    return encoded(palette(MASK), "PNG", pnginfo=info)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(PICTURE), "PNG", exif=exif)


def animated() -> bytes:
    return encoded(palette(MASK), "PNG", save_all=True, append_images=[palette(255 - MASK)], default_image=False)


def tiff_inverted() -> bytes:
    """Grey where 0 is white: Pillow turns value 4 into 251."""
    return encoded(Image.fromarray(MASK), "TIFF", tiffinfo={262: 0})


SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 56 40\n%%EndComments\n(/tmp/x) (w) file closefile\nshowpage\n"
"""a program in PostScript, which Pillow would hand to Ghostscript"""


def becomes(data: Callable[[], bytes]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(data())

    return damage


def edited(change: Callable[[bytes], bytes]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def huge(width: int, height: int, kind: str = "PNG") -> Damage:
    if kind == "BMP":
        header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        return becomes(lambda: b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header)
    return becomes(lambda: png(width, height, 8, 0, b"\0" * 500))


# Damage to files of any kind


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def missing(path: Path) -> None:
    path.unlink()


def link_to_the_file(path: Path) -> None:
    real = path.rename(path.with_name("real" + path.suffix))
    path.symlink_to(real)


def renamed(name: str) -> Damage:
    return lambda path: path.rename(path.with_name(name + path.suffix))


ANY_FILE: dict[str, tuple[str, Damage]] = {
    "is empty": ("refused", becomes(bytes)),
    "is a folder": ("refused", as_folder),
    "is a link to nowhere": ("refused", link_to_nowhere),
    "is a link to itself": ("refused", link_to_itself),
    "is a pipe": ("refused", as_pipe),
    "is missing": ("refused", missing),
    "is a web page": ("refused", becomes(lambda: b"<!DOCTYPE html><html><body>404: not found</body></html>\n")),
    "is zeros": ("refused", becomes(lambda: bytes(5000))),
    "is noise": ("refused", becomes(lambda: random.Random(1).randbytes(5000))),
    "is a link to the file": ("same", link_to_the_file),
    "has spaces in its name": ("same", renamed("my best  file")),
    "has a name of many scripts": ("same", renamed("größer 猫 файл 😀")),
}


# Damage to text


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
    "is UTF-16": ("refused", edited(lambda data: data.decode().encode("utf-16"))),
    "is Latin-1": ("refused", edited(lambda data: data.decode().replace("猫", "x").encode("latin-1") + b"\xff")),
    "has a NUL in it": ("refused", edited(lambda data: data[:20] + b"\0" + data[20:])),
    "has half a character at its end": ("refused", edited(lambda data: data + "猫".encode()[:2])),
}

YAML: dict[str, tuple[str, Damage]] = {
    "nests lists a thousand deep": ("refused", added("x: " + "[" * 1000 + "]" * 1000)),
    "nests lists a hundred thousand deep": ("refused", added("x: " + "[" * 100_000)),
    "nests keys a thousand deep": ("refused", added("x: " + "{a: " * 1000 + "1" + "}" * 1000)),
    "nests keys by indentation": ("refused", added("".join(" " * n + "a:\n" for n in range(1200)))),
    "makes an object": ("refused", added("x: !!python/object/apply:os.mkdir [exploded]\n")),
    "names a module": ("refused", added("x: !!python/name:os.system\n")),
    "has an empty !!int": ("refused", added("x: !!int ''\n")),
    "has an empty !!float": ("refused", added("x: !!float ''\n")),
    "has a wrong !!bool": ("refused", added("x: !!bool maybe\n")),
    "has a wrong !!timestamp": ("refused", added("x: !!timestamp soon\n")),
    "has month 13": ("refused", added("x: 2020-13-01\n")),
    "has wrong base64": ("refused", added("x: !!binary '*'\n")),
    "has an unknown tag": ("refused", added("x: !mine 1\n")),
    "has a key of a list": ("refused", added("? [a, b]\n: 1\n")),
    "has a key of a number": ("refused", added("1: 1\n")),
    "has two documents": ("refused", added("---\nseed: 1\n")),
    "has a tab for indentation": ("refused", added("x:\n\ty: 1\n")),
    "has an open quote": ("refused", added("x: 'abc\n")),
    "is a list": ("refused", becomes(lambda: b"- a\n- b\n")),
    "is a number": ("refused", becomes(lambda: b"17\n")),
    "is null": ("refused", becomes(lambda: b"~\n")),
    "is a comment": ("refused", becomes(lambda: b"# nothing\n")),
}

CONFIGS: dict[str, tuple[str, Damage]] = {
    f"has {what}": ("refused", replaced(old, new))
    for what, old, new in [
        ("a seed of 400 digits", "seed: 7", f"seed: {'7' * 400}"),
        ("a seed of 5000 digits", "seed: 7", f"seed: {'7' * 5000}"),
        ("a hexadecimal seed of 5000 digits", "seed: 7", f"seed: 0x{'f' * 5000}"),
        ("a learning rate of 5000 hexadecimal digits", "lr: 0.02", f"lr: 0x{'f' * 5000}"),
        ("a learning rate of 400 digits", "lr: 0.02", f"lr: {'7' * 400}"),
        ("a negative seed", "seed: 7", "seed: -7"),
        ("a fractional seed", "seed: 7", "seed: 7.0"),
        ("a list as seed", "seed: 7", "seed: [7]"),
        ("keys as seed", "seed: 7", "seed: {a: 7}"),
        ("text as seed", "seed: 7", "seed: '7'"),
        ("truth as seed", "seed: 7", "seed: true"),
        ("nothing as seed", "seed: 7", "seed:"),
        ("an endless learning rate", "lr: 0.02", "lr: 1e999"),
        ("an infinite learning rate", "lr: 0.02", "lr: .inf"),
        ("no number as learning rate", "lr: 0.02", "lr: .nan"),
        ("a negative learning rate", "lr: 0.02", "lr: -0.02"),
        ("a decimal comma", "lr: 0.02", "lr: 0,02"),
        ("epochs beyond any computer", "epochs: 12", "epochs: 1000000000000000000000"),
        ("an image size beyond any memory", "image_size: 65", "image_size: 80000001"),
        ("an image size of one", "image_size: 65", "image_size: 1"),
        ("a scale beyond numbers", "[0.9, 1.1]", "[0.9, 1.0e+300]"),
        ("a scale of three", "[0.9, 1.1]", "[0.9, 1.0, 1.1]"),
        ("a scale below numbers", "[0.9, 1.1]", "[1.0e-300, 1.1]"),
        ("a fold that is not there", "fold: 1", "fold: 4"),
        ("a line end in a key", "seed: 7", '"se\\ned": 7'),
        ("a class twice", "[cat, dog", "[cat, cat"),
        ("a class that is no text", "[cat, dog", "[cat, no"),
        ("a number as classes", "classes: [cat, dog, Großer Hund, 猫]", "classes: 4"),
        ("keys as classes", "classes: [cat, dog, Großer Hund, 猫]", "classes: {cat: 1}"),
        ("a key twice", "seed: 7", "seed: 7\nseed: 8"),
        ("a list as section", "train: {lr: 0.02, momentum: 0.75, epochs: 12}", "train: [lr, 0.02]"),
        ("an unknown key", "seed: 7", "sede: 7"),
        ("itself as base", "seed: 7", "seed: 7\nbase: config.yaml\n"),
        ("a folder as base", "seed: 7", "seed: 7\nbase: ."),
        ("a number as base", "seed: 7", "seed: 7\nbase: 7"),
        ("a base that is not there", "seed: 7", "seed: 7\nbase: none.yaml"),
        ("a base with NUL in its name", "seed: 7", 'seed: 7\nbase: "a\\0"'),
        ("a base of too long a name", "seed: 7", f"seed: 7\nbase: {'a' * 300}"),
        ("a picture as base", "seed: 7", "seed: 7\nbase: ü1.png"),
    ]
}

FIRST = "ü0.jpg ü0.png"


def hidden(name: str, damage: Damage) -> Damage:
    """Damage to a file that the list names."""

    def to_other(path: Path) -> None:
        damage(path.with_name(name))

    return to_other


LISTS: dict[str, tuple[str, Damage]] = {
    "has blank lines and spaces": ("same", edited(lambda data: b"\n \n" + data.replace(b" ", b" \t ") + b"  \n\n")),
    "has a leading slash": ("same", replaced(FIRST, "/ü0.jpg /ü0.png")),
    "lacks its last line end": ("same", edited(lambda data: data.rstrip(b"\n"))),
    "has one column": ("refused", replaced(FIRST, "ü0.jpg")),
    "has three columns": ("refused", replaced(FIRST, FIRST + " 1")),
    "has a name with a space": ("refused", replaced(FIRST, "u 0.jpg ü0.png")),
    "has a line twice": ("refused", added(FIRST + "\n")),
    "has a line twice in other words": ("refused", added("./ü0.jpg .//ü0.png\n")),
    "has blanks alone": ("refused", becomes(lambda: b" \n\t\n\n")),
    "has a name of 300 letters": ("refused", replaced("ü0.png", "a" * 300)),
    "has a path of 5000 letters": ("refused", replaced("ü0.jpg", "a/" * 2500)),
    "has a Unicode line end": ("refused", replaced(FIRST, "ü0.jpg\u2028ü0.png")),
    "has a NUL in the mask's name": ("refused", replaced("ü0.png", "ü0.png\0")),
    "has image and mask swapped": ("refused", replaced(FIRST, "ü0.png ü0.jpg")),
    "has a folder as image": ("refused", replaced("ü0.jpg", ".")),
    "has a folder as mask": ("refused", replaced("ü0.png", ".")),
    "has the mask of another size": (
        "refused",
        hidden("ü3.png", becomes(lambda: encoded(Image.fromarray(MASK[1:]), "PNG"))),
    ),
    "names a mask that is missing": ("refused", hidden("ü3.png", missing)),
    "names an image that is missing": ("refused", hidden("ü3.jpg", missing)),
    "names an image that is a link to nowhere": ("refused", hidden("ü3.jpg", link_to_nowhere)),
    "names a mask that is a link to itself": ("refused", hidden("ü3.png", link_to_itself)),
    "names a mask that is empty": ("refused", hidden("ü3.png", becomes(bytes))),
    "names a mask with a turned bit": ("refused", hidden("ü3.png", flip(5))),
    "names a mask of class 5": (
        "refused",
        hidden("ü3.png", becomes(lambda: encoded(palette(MASK + (MASK == 4)), "PNG"))),
    ),
    "names a mask in grey": ("same", hidden("ü3.png", becomes(lambda: encoded(Image.fromarray(MASK), "PNG")))),
    "names a huge mask": ("refused", hidden("ü3.png", huge(100_000, 100_000))),
    "names a huge image": ("refused", hidden("ü3.jpg", huge(100_000, 100_000))),
}

GOOD_MASKS: dict[str, Callable[[], bytes]] = {
    "grey": lambda: encoded(Image.fromarray(MASK), "PNG"),
    "interlaced": interlaced,
    "animated": animated,
    "with a comment": commented,
    "with bytes behind its end": lambda: bytes_of("mask") + b"more",
    "with a transparent colour": lambda: encoded(palette(MASK), "PNG", transparency=4),
}
BAD_MASKS: dict[str, Callable[[], bytes]] = {
    "grey of 2 bits": lambda: packed(2),
    "grey of 4 bits": lambda: packed(4),
    "coloured": lambda: encoded(palette(MASK).convert("RGB"), "PNG"),
    "a lossy JPEG": lambda: encoded(Image.fromarray(MASK), "JPEG"),
    "a lossy WebP": lambda: encoded(Image.fromarray(MASK), "WEBP"),
    "a GIF": lambda: encoded(palette(MASK), "GIF"),
    "an inverted TIFF": tiff_inverted,
    "coloured with 16 bits": rgb16,
    "a PostScript program": lambda: SCRIPT,
    "with a comment of 200 MB": text_bomb,
    "with a wrong checksum of its header": lambda: bytes_of("mask").replace(b"IHDR", b"IHDr"),
    "with two headers": lambda: png(WIDTH, HEIGHT, 8, 0, rows(MASK), chunk(b"IHDR", bytes(13))),
    "with an unknown filter": lambda: png(WIDTH, HEIGHT, 8, 0, rows(MASK).replace(b"\0", b"\x09", 1)),
    "of 3 bits": lambda: png(WIDTH, HEIGHT, 3, 0, rows(MASK)),
    "of colour type 7": lambda: png(WIDTH, HEIGHT, 8, 7, rows(MASK)),
    "without a palette": lambda: png(WIDTH, HEIGHT, 16, 3, rows(MASK)),
}
SIZES: dict[str, Damage] = {
    "100000x100000": huge(100_000, 100_000),
    "a pixel more than the limit": huge(MAX_PIXELS + 1, 1),
    "as large as a header can say": huge(2**31 - 1, 2**31 - 1),
    "0x0": huge(0, 0),
    "0 wide": huge(0, 40),
    "0 high": huge(40, 0),
}


GOOD_IMAGES: dict[str, tuple[Callable[[], bytes], Callable[[], np.ndarray]]] = {
    "with 16 bits a colour": (rgb16, lambda: PICTURE),
    "opaque": (lambda: encoded(with_alpha(255), "PNG"), lambda: PICTURE),
    "an interlaced mask": (interlaced, lambda: np.repeat(MASK[..., None], 3, 2)),
    "grey of 4 bits": (
        lambda: packed(4),
        lambda: np.repeat(np.where(MASK == 4, 4 * 17, 0)[..., None], 3, 2).astype(np.uint8),
    ),
    "grey of 2 bits": (
        lambda: packed(2),
        lambda: np.repeat(np.where(MASK == 4, 85, 0)[..., None], 3, 2).astype(np.uint8),
    ),
    "of 1 bit": (
        lambda: encoded(Image.fromarray(MASK == 4), "PNG"),
        lambda: np.repeat(255 * (MASK == 4)[..., None], 3, 2).astype(np.uint8),
    ),
    "a palette": (
        lambda: bytes_of("mask"),
        lambda: np.dstack([MASK, 255 - MASK, MASK // 2]),
    ),
    "a BMP": (lambda: encoded(Image.fromarray(PICTURE), "BMP"), lambda: PICTURE),
    "a TIFF": (lambda: encoded(Image.fromarray(PICTURE), "TIFF"), lambda: PICTURE),
    "a TIFF of two pages": (
        lambda: encoded(
            Image.fromarray(PICTURE), "TIFF", save_all=True, append_images=[Image.fromarray(255 - PICTURE)]
        ),
        lambda: PICTURE,
    ),
    "a lossless WebP": (lambda: encoded(Image.fromarray(PICTURE), "WEBP", lossless=True), lambda: PICTURE),
    "CMYK in a TIFF": (
        lambda: encoded(
            Image.fromarray(np.dstack([255 - PICTURE, np.zeros((HEIGHT, WIDTH), np.uint8)]), "CMYK"), "TIFF"
        ),
        lambda: PICTURE,
    ),
}
BAD_IMAGES: dict[str, Damage] = {
    "grey of 16 bits": becomes(lambda: grey16(MASK.astype(np.uint16) * 256)),
    "of floats": becomes(lambda: encoded(Image.fromarray(MASK.astype(np.float32)), "TIFF")),
    "a GIF": becomes(lambda: encoded(palette(MASK), "GIF")),
    "a PostScript program": becomes(lambda: SCRIPT),
    "an SVG": becomes(lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="56" height="40"/>'),
    "with a comment of 200 MB": becomes(text_bomb),
    "a BMP of 100000x100000": huge(100_000, 100_000, "BMP"),
    "a BMP of 0x0": huge(0, 0, "BMP"),
    "a TIFF cut in its directory": becomes(lambda: encoded(Image.fromarray(PICTURE), "TIFF")[:-40]),
    "a TIFF without strips": becomes(lambda: b"II*\0\x08\0\0\0\0\0\0\0\0\0"),
    "a BMP cut in the middle": becomes(lambda: encoded(Image.fromarray(PICTURE), "BMP")[:3000]),
    "a WebP cut in the middle": becomes(lambda: encoded(Image.fromarray(PICTURE), "WEBP", lossless=True)[:900]),
    "a JPEG without tables": becomes(lambda: bytes_of("JPEG").replace(b"\xff\xdb", b"\xff\xe0")),
    "a JPEG of 65535x65535": edited(
        lambda _: bytes_of("JPEG").replace(struct.pack(">HH", HEIGHT, WIDTH), b"\xff" * 4, 1)
    ),
    "a JPEG of 0x0": edited(lambda _: bytes_of("JPEG").replace(struct.pack(">HH", HEIGHT, WIDTH), b"\0" * 4, 1)),
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
    "nests keys deep": ("refused", edited(lambda data: b'{"query":' * 100_000 + b"\n" + data)),
    "has a blank line": ("refused", edited(lambda data: b"\n" + data)),
    "has a number": ("refused", edited(lambda data: b"1\n" + data)),
    "has null": ("refused", edited(lambda data: b"null\n" + data)),
    "has an empty line of keys": ("refused", edited(lambda data: b"{}\n" + data)),
    "is one list": ("refused", edited(lambda data: b"[" + data.rstrip().replace(b"\n", b",") + b"]")),
    "is a pickle": ("refused", becomes(lambda: pickle.dumps([1, 2]))),
    **{
        f"has {what}": ("refused", change_first(**changes))
        for what, changes in {
            "a class that is true": {"class_id": True},
            "a class of text": {"class_id": "2"},
            "a fraction as class": {"class_id": 2.0},
            "class -2": {"class_id": -2},
            "class 10^300": {"class_id": 10**300},
            "NaN as class": {"class_id": float("nan")},
            "a base class": {"class_id": 1},
            "no supports": {"supports": []},
            "two supports": {"supports": ["ü1.jpg ü1.png", "ü5.jpg ü5.png"]},
            "itself as support": {"query": "ü1.jpg ü1.png", "supports": ["ü1.jpg ü1.png"]},
            "text as supports": {"supports": "ü1.jpg ü1.png"},
            "a number as support": {"supports": [1]},
            "keys as query": {"query": {"a": 1}},
            "a foreign image": {"query": "other.jpg"},
            "a path that leads elsewhere": {"query": "../ü1.jpg ü1.png"},
            "the hash of another list": {"list_sha256": "0" * 64},
            "a number as hash": {"list_sha256": 0},
        }.items()
    },
    "has a class of 5000 digits": (
        "refused",
        edited(lambda data: data.replace(b'"class_id": 2', b'"class_id": ' + b"2" * 5000)),
    ),
}

TARGETS: dict[str, tuple[str, Damage]] = {
    f"has {what}": ("refused", becomes(lambda text=text: text.encode()))  # type: ignore[misc]
    for what, text in {
        "text as target": "dog: ü1.jpg\n",
        "no masks": "dog: {supports: [ü1.jpg]}\n",
        "empty lists": "dog: {supports: [], masks: []}\n",
        "a mask too few": "dog: {supports: [ü1.jpg, ü5.jpg], masks: [ü1.png]}\n",
        "text as supports": "dog: {supports: ü1.jpg, masks: [ü1.png]}\n",
        "a number as support": "dog: {supports: [1], masks: [ü1.png]}\n",
        "text as class": "dog: {supports: [ü1.jpg], masks: [ü1.png], class_id: two}\n",
        "a fraction as class": "dog: {supports: [ü1.jpg], masks: [ü1.png], class_id: 2.5}\n",
        "an unknown key": "dog: {supports: [ü1.jpg], masks: [ü1.png], class: 2}\n",
        "a folder as support": "dog: {supports: [.], masks: [ü1.png]}\n",
        "a missing support": "dog: {supports: [none.jpg], masks: [ü1.png]}\n",
        "a name of 300 letters": f"dog: {{supports: [{'a' * 300}], masks: [ü1.png]}}\n",
        "255 targets": "".join(f"t{n}: {{supports: [ü1.jpg], masks: [ü1.png]}}\n" for n in range(255)),
    }.items()
}


class Trap:
    """Unpickled carelessly, makes a folder: stands for any code that a file can carry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.folder),)


def holds(content: Callable[[Path], Any]) -> Damage:
    """Saved with torch.save; the argument is the path of a folder that code in it would make."""

    def damage(path: Path) -> None:
        torch.save(content(path.with_name("exploded")), path)

    return damage


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(path.with_name("exploded")), protocol=2))


def old_pickled(path: Path) -> None:
    torch.save(contents(model=Trap(path.with_name("exploded"))), path, _use_new_zipfile_serialization=False)


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


def zip_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped.txt", "evil")


def empty_zip(path: Path) -> None:
    zipfile.ZipFile(path, "w").close()


def tar_of_it(path: Path) -> None:
    data = path.read_bytes()
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("storages")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


def a_weight(change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    return {**STATE, "weight": change(STATE["weight"].clone())}


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda w: w.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(value))


TENSORS: dict[str, Callable[[], Any]] = {
    "NaN": lambda: a_weight(first(float("nan"))),
    "infinity": lambda: a_weight(first(float("inf"))),
    "complex numbers": lambda: a_weight(lambda w: w.to(torch.complex64)),
    "a sparse tensor": lambda: a_weight(lambda w: w.to_sparse()),
    "a quantised tensor": lambda: a_weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
    "a tensor without storage": lambda: a_weight(lambda w: w.to("meta")),
    "lists for tensors": lambda: a_weight(lambda w: w.tolist()),
    "names that are numbers": lambda: {1: torch.zeros(2)},
    "a tensor for a state": lambda: torch.zeros(3),
    "a list for a state": lambda: [torch.zeros(3)],
}
WEIGHTS: dict[str, Damage] = {
    **{f"has {name}": holds(lambda _, make=make: make()) for name, make in TENSORS.items()},  # type: ignore[misc]
    "has one number for a million million": holds(lambda _: a_weight(lambda _: torch.zeros(()).expand(10**6, 10**6))),
    "has whole numbers": holds(lambda _: a_weight(lambda w: w.long())),
    "has truth values": holds(lambda _: a_weight(lambda w: w > 0)),
    "has another shape": holds(lambda _: a_weight(lambda w: w.T)),
    "has a tensor too many": holds(lambda _: {**STATE, "more": torch.zeros(1)}),
    "lacks a tensor": holds(lambda _: {"weight": STATE["weight"]}),
    "has code in it": holds(lambda folder: {**STATE, "weight": Trap(folder)}),
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
            "text as format": {"format": "3"},
            "a tensor as format": {"format": torch.ones(3)},
            "a list as config": {"config": [1]},
            "an empty config": {"config": {}},
            "an unknown key in its config": {"config": contents()["config"] | {"sede": 1}},
            "a huge seed in its config": {"config": contents()["config"] | {"seed": 10**5000}},
            "a huge network in its config": {
                "config": contents()["config"] | {"model": {"prototype_channels": 10**12}}
            },
            "text as weights": {"weights": "standard"},
            "no stem in its weights": {"weights": {"source": "", "sha256": ""}},
            "a strange stem": {"weights": {"source": "", "stem": "thin", "sha256": ""}},
            "text as step": {"step": "3"},
            "a negative step": {"step": -3},
            "a tensor as step": {"step": torch.tensor(3)},
            "numbers as list hashes": {"list_sha256": {"a": 1}},
            "a number as unknown": {"unknown": 3},
        }.items()
    },
    "has code in it": holds(lambda folder: {**contents(), "extra": Trap(folder)}),
    "has code in its config": holds(lambda folder: contents(config=Trap(folder))),
    "is weights alone": holds(lambda _: STATE),
}


def config_within_itself(_: Path) -> dict[str, Any]:
    config = contents()["config"]
    config["data"]["folds"] = config
    return contents(config=config)


CHECKPOINTS["has a config within itself"] = holds(config_within_itself)
TORCH_FILES: dict[str, tuple[str, Damage]] = {
    "is a pickle with code": ("refused", pickled),
    "is of torch before 1.6 with code": ("refused", old_pickled),
    "is a zip bomb": ("refused", bomb),
    "is compressed and swells": ("refused", deflated),
    "is a zip file of text": ("refused", zip_of_text),
    "is an empty zip file": ("refused", empty_zip),
    "is a tar archive": ("refused", tar_of_it),
    "is a picture": ("refused", becomes(lambda: bytes_of("image"))),
    "has bytes before it": ("refused", edited(lambda data: b"more" + data)),
    "has bytes behind it": ("either", edited(lambda data: data + b"more")),
    "stands twice in the file": ("either", edited(lambda data: data + data)),
    "has a number changed": (
        "refused",
        edited(lambda data: data.replace(struct.pack("<f", 33), struct.pack("<f", 34))),
    ),
}


def stored_cache(**arrays: Any) -> Damage:
    """A cache with its own key and other arrays."""

    def damage(path: Path) -> None:
        with np.load(path) as stored:
            held = dict(stored) | arrays
        np.savez_compressed(path, **{key: value for key, value in held.items() if value is not None})

    return damage


CACHES: dict[str, Damage] = {
    "of text": stored_cache(areas=np.full(20, "many")),
    "of objects": stored_cache(areas=np.array([[Trap(Path("exploded"))]], object)),
    "without areas": stored_cache(areas=None),
    "without a key": stored_cache(key=None),
}


class Case(NamedTuple):
    kind: str
    verdict: str
    damage: Damage


def all_cases() -> dict[str, Case]:
    cases = {}
    texts = ("config", "list", "episodes", "targets")
    for kind in FILES:
        by_bytes = (
            "as written"
            if kind in texts
            else {"JPEG": "any", "old weights": "any", "cache": "same"}.get(kind, "either")
        )
        by_cut = "either" if kind in ("JPEG", "old weights") else by_bytes
        for tenth in range(11):
            cases[f"{kind} cut at {10 * tenth} %"] = Case(kind, by_cut, cut(tenth / 10))
        for seed in range(10):
            cases[f"{kind} with bit {seed} turned"] = Case(kind, by_bytes, flip(seed))
        for name, (verdict, damage) in ANY_FILE.items():
            if not (kind == "cache" and "name" in name):  # a cache has one name
                cases[f"{kind} {name}"] = Case(kind, "same" if kind == "cache" else verdict, damage)
    groups: list[tuple[tuple[str, ...], dict[str, tuple[str, Damage]]]] = [
        (texts, TEXT),
        (("config", "targets"), YAML),
        (("config",), CONFIGS),
        (("list",), LISTS),
        (("episodes",), EPISODES),
        (("targets",), TARGETS),
        (("checkpoint", "weights"), TORCH_FILES),
        (("checkpoint",), {name: ("refused", damage) for name, damage in CHECKPOINTS.items()}),
        (("weights",), {name: ("refused", damage) for name, damage in WEIGHTS.items()}),
        (("cache",), {name: ("same", damage) for name, damage in CACHES.items()}),
        (("mask", "photo mask"), {name: ("same", becomes(data)) for name, data in GOOD_MASKS.items()}),
        (("mask", "photo mask"), {name: ("refused", becomes(data)) for name, data in BAD_MASKS.items()}),
        (("mask",), {"grey of 16 bits": ("refused", becomes(lambda: grey16(MASK)))}),
        (("photo mask",), {"grey of 16 bits": ("same", becomes(lambda: grey16(MASK)))}),
        (("image", "photo"), {name: ("refused", damage) for name, damage in BAD_IMAGES.items()}),
        (("image",), {"that EXIF turns": ("same", becomes(turned))}),
        (("mask", "photo mask", "image", "photo"), {name: ("refused", damage) for name, damage in SIZES.items()}),
    ]
    for kinds, group in groups:
        for kind in kinds:
            cases |= {f"{kind} {name}": Case(kind, verdict, damage) for name, (verdict, damage) in group.items()}
    return cases


CASES = all_cases()


def test_there_are_hundreds_of_ways_to_damage_a_file() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize("kind", FILES)
def test_a_sound_file_is_read(kind: str, world: Path, tmp_path: Path) -> None:
    path = sound(kind, world, tmp_path)
    ending = ended(lambda: read(kind, path, world))
    assert ending.code == 0, ending.err
    if kind in ("mask", "image", "photo"):
        assert same(ending.value, MASK if kind == "mask" else PICTURE)
    if kind in ("config", "list", "episodes", "targets"):
        assert agrees(kind, ending.value, written(kind, path, world))


def agrees(kind: str, value: Any, wanted: Any) -> bool:
    """Whether what was read is what an independent reading says."""
    if kind == "config":
        found = dict(flatten(value.model_dump()))
        return all(found[key] == (float(v) if isinstance(found[key], float) else v) for key, v in wanted.items())
    if kind == "targets":
        return same(
            {name: t.model_dump() for name, t in value.items()}, {n: {"class_id": None} | t for n, t in wanted.items()}
        )
    return same(value, wanted)


@pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)
@pytest.mark.parametrize("name", CASES)
def test_a_damaged_file_is_refused_by_name_or_read_right(name: str, world: Path, tmp_path: Path) -> None:
    kind, verdict, damage = CASES[name]
    path = sound(kind, world, tmp_path)
    whole = read(kind, path, world)
    if kind == "list":
        (tmp_path / "train.txt.index.npz").unlink(missing_ok=True)
    path = damage(path) or path
    ending = ended(lambda: read(kind, path, world))
    assert not list(tmp_path.glob("**/exploded")) and not Path("exploded").exists(), "code in the file has run"
    if ending.code == 2:
        refusal(ending, tmp_path if kind == "list" or "as base" in name or "a base" in name else path)
        assert verdict != "same", ending.err
        return
    assert ending.code == 0 and verdict != "refused", ending
    if verdict == "any":
        assert (
            {k: v.shape for k, v in ending.value.items()} == {k: v.shape for k, v in whole.items()}
            if isinstance(whole, dict)
            else ending.value.shape == whole.shape
        )
    elif verdict == "as written":
        assert agrees(kind, ending.value, written(kind, path, world))
    elif kind == "config":
        assert ending.value.model_dump(exclude={"run_dir"}) == whole.model_dump(exclude={"run_dir"})
    else:
        assert same(ending.value, whole)


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_a_picture_of_any_encoding_is_read_right(name: str, tmp_path: Path) -> None:
    data, wanted = GOOD_IMAGES[name]
    path = tmp_path / "picture.png"
    path.write_bytes(data())
    for pixels in (read_image(path), pictures.read_picture(path).pixels):
        if "CMYK" in name:
            assert np.abs(pixels.astype(int) - wanted()).max() <= 1
        else:
            np.testing.assert_array_equal(pixels, wanted())


@pytest.mark.parametrize("seed", range(10))
def test_a_mask_damaged_in_its_archive_is_not_prepared(seed: int, tmp_path: Path) -> None:
    data, target = bytearray(bytes_of("mask")), tmp_path / "2007_000001.png"
    start = data.index(b"IDAT")
    data[random.Random(seed).randrange(start, len(data) - 12)] ^= 1 << seed % 8
    with pytest.raises(UserError, match=r"voc\.tar: a\.png is damaged"):
        prepare_pascal.write_mask((bytes(data), target, "voc.tar: a.png"))
    assert not target.exists()
    prepare_pascal.write_mask((bytes_of("mask"), target, "voc.tar: a.png"))
    assert target.read_bytes() == bytes_of("mask")


@pytest.mark.parametrize("line", ["{", "[1]", "1", "null", "{}", '{"step": "2"}', "", "\0", "[" * 100_000, "\udcff"])
def test_a_record_with_a_damaged_line_is_refused_and_left(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    data = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'.encode(errors="surrogateescape")
    path.write_bytes(data)
    refusal(ended(lambda: keep_json_lines(path, lambda record: record["step"] <= 2)), path)
    assert path.read_bytes() == data


def test_a_record_loses_a_last_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_json_lines(path, lambda record: record["step"] <= 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# The command lines


def call(module: ModuleType, *arguments: object) -> Ending:
    """Run a command's ``main`` as its script does, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        return ended(module.main)


def process(*arguments: object) -> Ending:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Ending(done.returncode, done.stderr)


PREDICT: dict[str, tuple[str, Damage]] = {
    "checkpoint with a turned bit": ("small.pt", flip(3)),
    "checkpoint cut in the middle": ("small.pt", cut(0.5)),
    "checkpoint that is a zip bomb": ("small.pt", bomb),
    "checkpoint with code": ("small.pt", pickled),
    "huge support": ("s.png", huge(100_000, 100_000)),
    "support cut in the middle": ("s.png", cut(0.5)),
    "mask with a turned bit": ("m.png", flip(2)),
    "mask of 4 bits": ("m.png", becomes(lambda: packed(4))),
    "mask that is a folder": ("m.png", as_folder),
    "query without pixels": ("q.png", huge(0, 0)),
    "query that is a program": ("q.png", becomes(lambda: SCRIPT)),
    "query that is a link to itself": ("q.png", link_to_itself),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", PREDICT)
def test_predict_refuses_a_damaged_file(name: str, network: Path, tmp_path: Path) -> None:
    file, damage = PREDICT[name]
    shutil.copy(network, tmp_path)
    for place, data in (("s", "image"), ("m", "mask"), ("q", "image")):
        (tmp_path / f"{place}.png").write_bytes(bytes_of(data))
    damage(tmp_path / file)
    files = [
        word
        for key, place in (("support", "s"), ("mask", "m"), ("query", "q"))
        for word in (f"--{key}", tmp_path / f"{place}.png")
    ]
    ending = call(
        predict,
        "--checkpoint",
        tmp_path / "small.pt",
        *files,
        "--class-id",
        4,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    refusal(ending, tmp_path / file)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", [name for name, (verdict, _) in LISTS.items() if verdict == "refused"])
def test_check_data_names_what_training_would_refuse(name: str, world: Path, tmp_path: Path) -> None:
    path = sound("list", world, tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=tmp_path), encoding="utf-8")
    assert call(check_data, "--config", config).code == 0
    LISTS[name][1](path)
    report = tmp_path / "report.json"
    assert call(check_data, "--config", config, "--json", report).code == 1
    problems = json.loads(report.read_text())["problems"]["train"]
    assert problems and all(str(tmp_path) in problem and "\n" not in problem for problem in problems)


@pytest.mark.parametrize("name", ["is empty", "is a folder", "is noise", "is a link to nowhere"])
def test_train_refuses_a_file_that_is_none(name: str, world: Path, tmp_path: Path) -> None:
    path = sound("config", world, tmp_path)
    for file, overrides in ((path, []), (tmp_path / "train.txt", [f"data.train_list={tmp_path / 'train.txt'}"])):
        ANY_FILE[name][1](file)
        config = path if file == path else world / "config.yaml"
        refusal(call(train, "--config", config, f"run_dir={tmp_path / 'run'}", *overrides), file)
        assert not (tmp_path / "run").exists()


def test_the_real_commands_end_in_one_line(world: Path, tmp_path: Path) -> None:
    config, code = world / "config.yaml", tmp_path / "code.pt"
    pickled(code)
    (tmp_path / "list").write_bytes(b"a b\0\n")
    refusal(process("test.py", "--config", config, "--checkpoint", code), code)
    refusal(
        process("train.py", "--config", config, f"data.train_list={tmp_path / 'list'}", f"run_dir={tmp_path / 'run'}"),
        tmp_path / "list",
    )
    refusal(call(train, "--config", config, "train.lr=!!int ''"), "train.lr")
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "run").exists()


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
        refusal(ended(allocate), "out of memory", "train.batch_size")


def test_other_errors_keep_their_traceback() -> None:
    def main() -> None:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        run_command(main)


# Any value at any key: properties

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.text(max_size=20),
    st.dates(),
    st.binary(max_size=5),
    st.sampled_from(["random", "imagenet", "single", "miou", "cat", 0, 1, 2, 65, 473, 0.5, 1.0, "", "1e-4", "auto"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted(known_keys())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "config.yaml"
    path.write_text(CONFIG.format(root="data"), encoding="utf-8")
    return path


def value_at(config: Config, key: str) -> Any:
    return dict(flatten(config.model_dump()))[key]


def is_value(found: Any, given: Any) -> bool:
    """The value given is the value used; whole numbers may stand for fractions."""
    if isinstance(given, list):
        return isinstance(found, list) and len(found) == len(given) and all(map(is_value, found, given))
    if type(found) is float and type(given) is int:
        return found == given
    return type(found) is type(given) and found == given


@PROPERTY
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_value_at_any_key_is_used_or_refused(plain: Path, key: str, value: Any) -> None:
    base = plain.read_text(encoding="utf-8")
    values = yaml.safe_load(base)
    section, _, name = key.rpartition(".")
    (values.setdefault(section, {}) if section else values)[name] = value
    path = plain.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    try:
        config = load_config(path)
    except UserError as error:
        assert "changed.yaml" in str(error)
        return
    unset = key == "run_dir" and value in (None, "")
    assert unset or is_value(value_at(config, key), value)


@PROPERTY
@given(
    key=st.sampled_from(KEYS) | st.text(max_size=30),
    text=st.text(max_size=30) | VALUES.map(lambda value: json.dumps(value, default=str)),
    equals=st.booleans(),
)
def test_any_override_is_used_or_refused(plain: Path, key: str, text: str, equals: bool) -> None:
    override = f"{key}={text}" if equals else key + text
    try:
        config = load_config(plain, [override])
    except UserError as error:
        assert str(error)
        return
    key, _, text = override.partition("=")
    if key in KEYS and key != "run_dir":
        with contextlib.suppress(yaml.YAMLError, ValueError):
            given_value = yaml.safe_load(text)
            found = value_at(config, key)
            assert is_value(found, given_value) or is_value(found, float(given_value))


@PROPERTY
@given(key=st.text(max_size=8).map(lambda part: ".".join([part] * 2000)))
def test_an_override_of_two_thousand_parts_is_refused(plain: Path, key: str) -> None:
    with pytest.raises(UserError, match="command line"):
        load_config(plain, [f"{key}=1"])


@PROPERTY
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_list_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any-list.txt"
    path.write_bytes(data)
    try:
        items = read_list(path, Path("root"))
    except UserError as error:
        assert str(path) in str(error)
        return
    lines = [line.split() for line in data.decode("utf-8-sig").splitlines() if line.split()]
    assert [(str(image), str(mask)) for image, mask, *_ in items] == [
        tuple(str(Path("root") / part.lstrip("/")) for part in line) for line in lines
    ]
    with pytest.raises(UserError):  # the root is not there
        load_class_index(path, Path("root"), 4, progress=False)


CHANGES = {
    "data.fold": st.integers(0, 3),
    "data.shots": st.integers(1, 10**9),
    "data.image_size": st.integers(1, 1250).map(lambda n: 8 * n + 1),
    "data.rotation": st.floats(0, 180),
    "data.dataset": st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=20),
    "data.novel_in_train": st.sampled_from(["keep", "drop"]),
    "model.fem_scales": st.lists(st.floats(0, 1e300, exclude_min=True), min_size=1, max_size=5),
    "loss.gamma": st.floats(0, 1e308),
    "train.lr": st.floats(1e-300, 1e300),
    "train.momentum": st.floats(0, 1, exclude_max=True),
    "seed": st.integers(0, 2**63 - 1),
    "run_dir": st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20),
}


@PROPERTY
@given(changes=st.fixed_dictionaries({}, optional=CHANGES))
def test_a_config_that_is_written_and_read_again_is_the_same(plain: Path, changes: dict[str, Any]) -> None:
    values = load_config(plain).model_dump()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    config = config_from_dict(values, "test")
    path = plain.with_name("again.yaml")
    path.write_text(yaml.safe_dump(config.model_dump(), allow_unicode=True), encoding="utf-8")
    assert load_config(path) == config
