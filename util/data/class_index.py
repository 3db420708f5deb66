"""List files, and the index of which classes stand in which image with how many pixels.

The index is built once from all masks and cached beside the list (``train.txt.index.npz``), or in the user's folder for
caches where that cannot be written. Its key covers the list, the number of classes, how the masks are read, and size
and time of every image and mask, so that a changed file is noticed.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csc_array, csr_array
from tqdm import tqdm

from model import IGNORE
from util.data.images import hint_at, image_size, orientation, read_class_ids
from util.data.pool import on_all_cores
from util.errors import UserError, first_of
from util.files import refuse_pipe, write_atomically


class Item(NamedTuple):
    """One line of a list. A photo may have several, with a mask each. :mod:`util.data.readers` makes them."""

    image: Path
    mask: Path
    class_id: int | None = None
    """the class that the mask is of, where its values are 1 target, 0 other; None where they are class ids"""
    read: Callable[[Path], np.ndarray] = read_class_ids
    """reads the mask: (H, W), uint8, 255 ignored"""

    def value_of(self, class_id: int) -> int:
        """Return the value of a class in the mask."""
        if self.class_id is None:
            return class_id
        return 1 if self.class_id == class_id else 0


MakeItem = Callable[[Path, Path], Item]
"""what makes an item of the two paths of a line"""


@dataclass(frozen=True)
class ClassIndex:
    """Pixel counts of every class in every image of a list."""

    items: tuple[Item, ...]
    pixels: csr_array
    """(lines, num_classes + 1), int64, sparse; column c counts the pixels of class c, column 0 the background"""
    list_path: Path
    list_sha256: str
    """the hash of its lines 'image mask', each with a line end: the same wherever the data lies"""
    ignored: np.ndarray
    """(lines,), int64: pixels of value 255"""

    @cached_property
    def photos(self) -> np.ndarray:
        """Return (lines,): the first line with the same image, which is what makes two lines one photo."""
        first: dict[Path, int] = {}
        return np.array([first.setdefault(item.image, place) for place, item in enumerate(self.items)])

    @cached_property
    def _by_class(self) -> csc_array:
        """The same counts; a column's lines ascend."""
        return self.pixels.tocsc()

    def qualifying(self, class_id: int, min_area: int) -> np.ndarray:
        """Return the lines whose masks hold at least ``min_area`` (1 or more) pixels of the class, ascending."""
        of_class = slice(*self._by_class.indptr[class_id : class_id + 2])
        return self._by_class.indices[of_class][self._by_class.data[of_class] >= min_area].astype(np.intp)

    def areas(self, place: int) -> dict[int, int]:
        """Return the pixels of each class that stands in a line's mask, by ascending id; 0 is the background."""
        of_line = slice(*self.pixels.indptr[place : place + 2])
        return dict(zip(self.pixels.indices[of_line].tolist(), self.pixels.data[of_line].tolist(), strict=True))


def read_list(path: Path, root: Path, make_item: MakeItem = Item) -> tuple[Item, ...]:
    """Read a list: a line holds 'image mask', two paths relative to ``root``. Blank lines are skipped.

    Raises:
        UserError: as :func:`parse_list`, or lines that are not two paths, or stand twice.
    """
    items, problems = parse_list(path, root, make_item)
    if problems:
        raise UserError(f"list {path} {first_of(problems)}; correct or remove these lines")
    return items


def parse_list(path: Path, root: Path, make_item: MakeItem = Item) -> tuple[tuple[Item, ...], list[str]]:
    """Return the items of a list, and what is wrong with its other lines.

    Raises:
        UserError: no such list, or an empty one.
    """
    try:
        refuse_pipe(path)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"list {path} does not exist; README tells how to prepare the data") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no system takes
        raise UserError(f"list {path} cannot be read: {error}") from error
    items: dict[Item, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if len(parts) == 2 and "\0" not in line:
            try:
                item = make_item(*(root / _plain(part.lstrip("/"), root) for part in parts))
            except UserError as error:
                problems.append(f"line {number}: {error}")
                continue
            if items.setdefault(item, number) != number:
                problems.append(f"line {number}: the same as line {items[item]}")
        elif parts:
            problems.append(f"line {number}: want 'image mask', two paths without spaces; got '{line:.100}'")
    if not items and not problems:
        raise UserError(f"list {path} holds no lines")
    return tuple(items), problems


def _plain(path: str, root: Path) -> str:
    """Return a path below ``root`` without detours, so that one file has one name."""
    return os.path.relpath(root / path, root) if ".." in path else os.path.normpath(path)


def load_class_index(
    list_path: Path, root: Path, num_classes: int, *, make_item: MakeItem = Item, progress: bool = True
) -> ClassIndex:
    """Return the index of a list, from its cache or built with all cores.

    Raises:
        UserError: a missing or unreadable file, an image and mask of different sizes, a mask value that is no class.
    """
    items = read_list(list_path, root, make_item)
    require_root(root)
    list_sha256 = hash_list(items, root)
    key = index_key(items, list_path, list_sha256, num_classes)
    table = _read_cache(list_path, key)
    if table is None:
        count = partial(count_pixels, num_classes=num_classes)
        table = tabulate(on_all_cores(count, items, f"indexing {list_path.name}", progress=progress), num_classes)
        write_cache(list_path, key, table)
    return ClassIndex(items, table.pixels, list_path, list_sha256, table.ignored)


def line_of(item: Item, root: Path) -> str:
    """Return an item's line as a list has it, 'image mask', which names it wherever the data lies."""
    return " ".join(path.relative_to(root).as_posix() for path in (item.image, item.mask))


def hash_list(items: Sequence[Item], root: Path) -> str:
    """Return the SHA-256 of a list's lines, by which episodes and checkpoints know it."""
    return hashlib.sha256("".join(f"{line_of(item, root)}\n" for item in items).encode()).hexdigest()


def require_root(root: Path) -> None:
    """Raise a UserError where data.root is no folder, which is not each file's fault."""
    if not root.is_dir():
        raise UserError(f"data.root {root} is no folder; README tells how to prepare the data")


def index_key(items: Sequence[Item], list_path: Path, list_sha256: str, num_classes: int) -> str:
    """Hash what an index depends on: the list, the number of classes, the masks' readers, every file's size and time.

    Raises:
        UserError: files that do not exist; names the first and how many there are.
    """
    key = hashlib.sha256(f"4 {list_sha256} {num_classes}".encode())
    missing: list[tuple[str, Path, Exception]] = []
    for item in items:
        key.update(f" {item.class_id} {item.read.__name__}".encode())
        for kind, path in (("image", item.image), ("mask", item.mask)):
            try:
                stat = path.stat()
                key.update(f" {stat.st_size} {stat.st_mtime_ns}".encode())
            except (OSError, ValueError) as error:
                missing.append((kind, path, error))
    if missing:
        kind, path, reason = missing[0]
        gone = isinstance(reason, FileNotFoundError)
        problem = f"does not exist{hint_at(path)}" if gone else f"cannot be reached ({reason})"
        more = f" ({len(missing)} of {2 * len(items)} files are missing)" if len(missing) > 1 else ""
        raise UserError(f"{kind} {path} {problem}; check data.root and list {list_path}{more}")
    return key.hexdigest()


class Counts(NamedTuple):
    """What was counted in one mask."""

    pixels: dict[int, int]
    """counts by class, of those that stand in it, ascending; 0 is the background"""
    ignored: int
    """pixels of value 255"""


class Table(NamedTuple):
    """The counts of many masks, as :class:`ClassIndex` has them."""

    pixels: csr_array
    ignored: np.ndarray


def tabulate(counts: Sequence[Counts], num_classes: int) -> Table:
    """Put the counts of all lines into a sparse table (lines, num_classes + 1)."""
    starts = np.cumsum([0, *(len(count.pixels) for count in counts)])
    classes = np.array([c for count in counts for c in count.pixels], np.int32)
    areas = np.array([area for count in counts for area in count.pixels.values()], np.int64)
    pixels = csr_array((areas, classes, starts), shape=(len(counts), num_classes + 1))
    return Table(pixels, np.array([count.ignored for count in counts], np.int64))


def count_pixels(item: Item, num_classes: int) -> Counts:
    """Count the pixels of each class in one mask.

    Raises:
        UserError: a file cannot be read, image and mask are not of one size, or a value is no class.
    """
    mask = item.read(item.mask)
    height, width = image_size(item.image)
    if (height, width) != mask.shape:
        turned = mask.shape == (width, height) and orientation(item.image) >= 5
        raise UserError(
            f"image {item.image} is {width}x{height} but mask {item.mask} is {mask.shape[1]}x{mask.shape[0]};"
            f" they must be the same size{TURNED if turned else ''}"
        )
    counts = count_values(mask)
    largest = num_classes if item.class_id is None else 1
    strange = np.flatnonzero(counts[largest + 1 : IGNORE])
    if len(strange):
        raise UserError(
            f"mask {item.mask} holds the value {strange[0] + largest + 1}, but data.classes names {num_classes}"
            " classes: values are 0 (background), a class's place in data.classes, or 255 (ignored)"
        )
    present = np.flatnonzero(counts[: min(largest + 1, IGNORE)]).tolist()
    ids = {value: value if item.class_id is None or not value else item.class_id for value in present}
    return Counts({ids[value]: int(counts[value]) for value in present}, int(counts[IGNORE]))


TURNED = "; its EXIF orientation turns the image on screen: store it as it is seen, by mogrify -auto-orient"


def count_values(mask: np.ndarray) -> np.ndarray:
    """Count the pixels of each value in a uint8 mask, (256,).

    Masks are long runs of one value, and counting a run waits for the same counter again and again; counting
    pairs of neighbours instead halves that.
    """
    flat = mask.ravel()
    even = len(flat) // 2 * 2
    pairs = np.bincount(flat[:even].view(np.uint16), minlength=65536).reshape(256, 256)
    return pairs.sum(0) + pairs.sum(1) + np.bincount(flat[even:], minlength=256)


def _caches_of(list_path: Path) -> list[Path]:
    """Say where the cache may lie: beside the list, or where that cannot be written in the user's own cache folder."""
    own = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (raises without a home)
    name = hashlib.sha256(os.fsencode(list_path.absolute())).hexdigest()[:16]
    beside, other = list_path.with_name(f"{list_path.name}.index.npz"), Path(own, "ntrenet", f"{name}.index.npz")
    return [beside, other] if other.is_absolute() else [beside]


def _read_cache(list_path: Path, key: str) -> Table | None:
    """Return what :func:`write_cache` wrote; None where it is in no cache."""
    found = (_read(path, key) for path in _caches_of(list_path))
    return next((table for table in found if table is not None), None)


def _read(path: Path, key: str) -> Table | None:
    """Read one cache; None where it is not there, old or damaged."""
    try:
        refuse_pipe(path)
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            pixels = csr_array((stored["areas"], stored["classes"], stored["starts"]), shape=stored["shape"].tolist())
            return Table(pixels, stored["ignored"])
    except Exception:  # zipfile, zlib, numpy and scipy raise many kinds for a damaged file; it can always be built anew
        return None


def write_cache(list_path: Path, key: str, table: Table) -> None:
    """Keep the counts of a list's masks for :func:`load_class_index`."""
    pixels, reasons = table.pixels, []
    arrays = {
        "key": np.array(key),
        "shape": np.array(pixels.shape),
        "starts": pixels.indptr,
        "classes": pixels.indices,
        "areas": pixels.data,
        "ignored": table.ignored,
    }
    for path in _caches_of(list_path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
            return
        except OSError as error:
            reasons.append(f"{path.parent} cannot be written ({error.strerror})")
    tqdm.write(f"note: the class index is not cached, {' and '.join(reasons)}")
