"""List files, and the class index: how many pixels each class has in each image of a list.

The index is counted once from all masks and cached next to the list (``train.txt.index.npz``), or in the user's cache
folder if that cannot be written.
"""

import codecs
import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from model import IGNORE
from util.data.images import image_size, read_class_ids
from util.data.pool import on_all_cores
from util.errors import UserError, first_of
from util.files import write_atomically

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # how PowerShell's > begins a file
PREPARE = {
    "pascal": "prepare_pascal.py --download --out data/pascal",
    "coco": "prepare_coco.py --root COCO2014 --out data/coco",
    "fss": "make_lists.py --root data/fss --out lists/fss",
    "synthetic": "make_synthetic.py --out data/synthetic",
}
"""script that prepares the data of a list, by a folder in the list's path"""


class Item(NamedTuple):
    """One line of a list. :mod:`util.data.readers` makes them. Several lines may have the same image."""

    image: Path
    mask: Path
    class_id: int | None = None
    """class of a mask whose values are 1 target, 0 other, 255 ignored; None if the values are class ids"""
    read: Callable[[Path], np.ndarray] = read_class_ids  # reads the mask: (H, W), uint8, 255 ignored

    def value_of(self, class_id: int) -> int:
        """Return the mask value of a class; 2, which does not occur, for another class than the mask's own."""
        if self.class_id is None:
            return class_id
        return 1 if self.class_id == class_id else 2


MakeItem = Callable[[Path, Path], Item]


@dataclass(frozen=True)
class ClassIndex:
    """Pixel counts of every class in every image of a list."""

    items: tuple[Item, ...]
    pixels: np.ndarray
    """(lines, num_classes + 1), int32; column c counts the pixels of class c, column 0 the background"""
    list_path: Path
    list_sha256: str
    """hash of the lines 'image mask', independent of ``data.root``"""
    ignored: np.ndarray  # (lines,), int32: pixels of value 255

    @cached_property
    def photos(self) -> np.ndarray:
        """Return (lines,): for each line the first line with the same image, which identifies the image."""
        first: dict[Path, int] = {}
        return np.array([first.setdefault(item.image, line) for line, item in enumerate(self.items)])

    def qualifying(self, class_id: int, min_area: int) -> np.ndarray:
        """Return the lines whose masks hold at least ``min_area`` (1 or more) pixels of the class, ascending."""
        return np.flatnonzero(self.pixels[:, class_id] >= min_area)


def read_list(path: Path, root: Path, make_item: MakeItem = Item) -> tuple[Item, ...]:
    """Read a list: a line holds 'image mask', two paths relative to ``root``. Blank lines are skipped."""
    try:
        data = path.read_bytes()
        lines = data.decode("utf-16" if data[:2] in UTF_16 else "utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"list {path.absolute()} does not exist; {how_to_prepare(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UserError(f"list {path} cannot be read: {error}") from error
    items: dict[Item, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if len(parts) == 2 and "\0" not in line:
            try:
                # normalised, so that one file has one name
                item = make_item(*(root / os.path.normpath(part.lstrip("/")) for part in parts))
            except UserError as error:
                problems.append(f"line {number}: {error}")
                continue
            if items.setdefault(item, number) != number:
                problems.append(f"line {number}: the same as line {items[item]}")
        elif parts:
            problems.append(f"line {number}: want 'image mask', two paths without spaces; got '{line:.100}'")
    if problems:
        raise UserError(f"list {path} {first_of(problems)}; correct or remove these lines")
    if not items:
        raise UserError(f"list {path} holds no lines")
    return tuple(items)


def load_class_index(
    list_path: Path, root: Path, num_classes: int, *, make_item: MakeItem = Item, progress: bool = True
) -> ClassIndex:
    """Return the index of a list, from its cache or counted with all cores."""
    require_root(root, list_path)
    items = read_list(list_path, root, make_item)
    list_sha256 = hashlib.sha256("".join(f"{line_of(item, root)}\n" for item in items).encode()).hexdigest()
    key = index_key(items, list_path, list_sha256, num_classes)
    counts = _read_cache(list_path, key, (len(items), num_classes + 2))
    if counts is None:
        count = partial(count_pixels, num_classes=num_classes)
        counts = np.stack(on_all_cores(count, items, f"indexing {list_path.name}", progress=progress))
        write_cache(list_path, key, counts)
    return ClassIndex(items, counts[:, :-1], list_path, list_sha256, counts[:, -1])


def require_root(root: Path, list_path: Path) -> None:
    """Refuse a ``data.root`` that does not exist, with the command that prepares the data of this list."""
    if not root.is_dir():
        raise UserError(f"data.root {root.absolute()} is no folder; {how_to_prepare(list_path)}")


def how_to_prepare(list_path: Path) -> str:
    """Return the remedy for a list or a ``data.root`` that does not exist."""
    script = next((f"'python scripts/{PREPARE[part]}'" for part in list_path.parts if part in PREPARE), "see README")
    return f"relative paths begin where the command is started; to prepare the data: {script}"


def line_of(item: Item, root: Path) -> str:
    """Return an item's line in the list, 'image mask', which identifies it whatever ``data.root`` is."""
    return " ".join(path.relative_to(root).as_posix() for path in (item.image, item.mask))


def index_key(items: Sequence[Item], list_path: Path, list_sha256: str, num_classes: int) -> str:
    """Hash all that an index depends on: list, classes, readers, size and time of every file; they must exist."""
    key = hashlib.sha256(f"6 {list_sha256} {num_classes}".encode())
    missing: list[str] = []
    for item in items:
        key.update(f" {item.class_id} {item.read.__name__}".encode())
        for kind, path in (("image", item.image), ("mask", item.mask)):
            try:
                stat = path.stat()
                key.update(f" {stat.st_size} {stat.st_mtime_ns}".encode())
            except FileNotFoundError:
                missing.append(f"{kind} {path} does not exist")
    if missing:
        raise UserError(f"{first_of(missing)}; check data.root and list {list_path}")
    return key.hexdigest()


def count_pixels(item: Item, num_classes: int) -> np.ndarray:
    """Count the pixels of background, each class, and 255 in one mask: (num_classes + 2,), int32."""
    mask = item.read(item.mask)
    height, width = image_size(item.image)
    if (height, width) != mask.shape:
        raise UserError(
            f"image {item.image} is {width}x{height} but mask {item.mask} is {mask.shape[1]}x{mask.shape[0]}; they must"
            " be the same size, without the rotation by EXIF tags"
        )
    values = np.bincount(mask.ravel(), minlength=256)
    largest = min(num_classes, IGNORE - 1) if item.class_id is None else 1
    unknown = np.flatnonzero(values[largest + 1 : IGNORE])
    if len(unknown):
        raise UserError(
            f"mask {item.mask} holds the value {unknown[0] + largest + 1}, but data.classes names {num_classes}"
            " classes: values are 0 (background), the class's position in data.classes, or 255 (ignored)"
        )
    counts = np.zeros(num_classes + 2, np.int32)
    ids = slice(1, largest + 1) if item.class_id is None else slice(item.class_id, item.class_id + 1)
    counts[0], counts[ids], counts[-1] = values[0], values[1 : largest + 1], values[IGNORE]
    return counts


def _caches_of(list_path: Path) -> list[Path]:
    """Return the possible paths of the cache: next to the list, and in the user's cache folder."""
    name = hashlib.sha256(os.fsencode(list_path.absolute())).hexdigest()[:16]
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (raises without a home)
    return [list_path.with_name(f"{list_path.name}.index.npz"), Path(user, f"ntrenet/{name}.index.npz")]


def _read_cache(list_path: Path, key: str, shape: tuple[int, int]) -> np.ndarray | None:
    """Return the counts that :func:`write_cache` stored under this key; None if no cache has them."""
    for path in _caches_of(list_path):
        try:
            with np.load(path, allow_pickle=False) as stored:
                counts = stored["counts"]
                sound = counts.dtype == np.int32 and counts.shape == shape and counts.min() >= 0
                if sound and str(stored["key"]) == key:
                    return counts
        except Exception:  # zipfile, zlib and numpy raise many kinds for a damaged file; it is then counted again
            continue
    return None


def write_cache(list_path: Path, key: str, counts: np.ndarray) -> None:
    """Keep the counts of a list's masks, (lines, num_classes + 2), for :func:`load_class_index`."""
    for path in _caches_of(list_path):
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: np.savez_compressed(file, key=np.array(key), counts=counts))
            return
    tqdm.write(f"note: the class index is not cached, neither next to {list_path} nor in the user's cache folder")
