"""List files, and the index of which classes stand in which image with how many pixels.

The index is built once from all masks and cached beside the list (``train.txt.index.npz``). Its key covers the
list, the number of classes, and size and time of every mask, so that a changed mask is noticed.
"""

import hashlib
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from util.errors import UserError
from util.files import refuse_pipe, write_atomically
from util.images import image_size, read_mask
from util.progress import progress as progress_bar


class Item(NamedTuple):
    """One line of a list."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class ClassIndex:
    """Pixel counts of every class in every image of a list."""

    items: tuple[Item, ...]
    pixels: np.ndarray
    """(images, num_classes + 1), int64; column c counts the pixels of value c, column 0 the background"""
    list_path: Path
    list_sha256: str
    """of its lines 'image mask', each with a line end: the same wherever the data lies, and whatever ends its lines"""

    def qualifying(self, class_id: int, min_area: int) -> np.ndarray:
        """Indices of the images that hold at least ``min_area`` pixels of the class, ascending."""
        return np.flatnonzero(self.pixels[:, class_id] >= min_area)


def read_list(path: Path, root: Path) -> tuple[Item, ...]:
    """Lines 'image mask', both relative to ``root``. Blank lines are skipped.

    Raises:
        UserError: no such list, an empty one, or a line that is not two paths, or stands twice.
    """
    try:
        refuse_pipe(path)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"list {path} does not exist; README tells how to prepare the data") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no system takes
        raise UserError(f"list {path} cannot be read: {error}") from error
    items: dict[Item, int] = {}
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2 or "\0" in line:
            raise UserError(
                f"list {path} line {number}: want 'image mask', two paths without spaces; got '{line:.100}'"
            )
        item = Item(root / parts[0].lstrip("/"), root / parts[1].lstrip("/"))
        if item in items:
            raise UserError(f"list {path} line {number}: the same as line {items[item]}; remove one of them")
        items[item] = number
    if not items:
        raise UserError(f"list {path} holds no lines")
    return tuple(items)


def load_class_index(list_path: Path, root: Path, num_classes: int, *, progress: bool = True) -> ClassIndex:
    """The index of a list, from its cache or built with all cores.

    Raises:
        UserError: a missing or unreadable file, an image and mask of different sizes, a mask value that is no class.
    """
    items = read_list(list_path, root)
    lines = (" ".join(_in_list(path, root) for path in item) for item in items)
    list_sha256 = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    key = hashlib.sha256(f"2 {list_sha256} {num_classes}".encode())
    for item in items:
        _stat("image", item.image, list_path)
        stat = _stat("mask", item.mask, list_path)
        key.update(f" {stat.st_size} {stat.st_mtime_ns}".encode())
    cache = list_path.with_name(list_path.name + ".index.npz")
    pixels = _read_cache(cache, key.hexdigest(), (len(items), num_classes + 1))
    if pixels is None:
        count = partial(count_pixels, num_classes=num_classes)
        pixels = np.stack(on_all_cores(count, items, f"indexing {list_path.name}", progress=progress))
        _write_cache(cache, key.hexdigest(), pixels)
    return ClassIndex(items, pixels, list_path, list_sha256)


def _in_list(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _stat(kind: str, path: Path, list_path: Path) -> os.stat_result:
    try:
        return path.stat()
    except (OSError, ValueError) as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be reached ({error})"
        raise UserError(f"{kind} {path} {problem}; check data.root and list {list_path}") from None


T = TypeVar("T")

WORTH_PROCESSES = 512
tqdm.monitor_interval = 0  # no monitor thread that could hold a lock while processes are forked


def on_all_cores(function: Callable[[Item], T], items: Sequence[Item], title: str, *, progress: bool = True) -> list[T]:
    """``function`` of every item, in order, with a progress bar; the first error ends it at once.

    Processes, because threads wait for each other in Pillow's Python half. On Linux they are forked, which costs
    nothing to start; a list too short to be worth it stays in this process.
    """
    bar = progress_bar(total=len(items), desc=title, unit="image", disable=not progress, leave=False)
    if len(items) < WORTH_PROCESSES:
        with bar:
            return [_advance(bar, function(item)) for item in items]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(mp_context=context)
    try:
        with bar:
            return [_advance(bar, result) for result in pool.map(function, items, chunksize=64)]
    finally:
        pool.shutdown(cancel_futures=True)


def _advance(bar: tqdm, result: T) -> T:
    bar.update()
    return result


def count_pixels(item: Item, num_classes: int) -> np.ndarray:
    """Pixels of each value 0 ... num_classes in one mask, (num_classes + 1,), int64."""
    mask = read_mask(item.mask)
    if image_size(item.image) != mask.shape:
        height, width = image_size(item.image)
        raise UserError(
            f"image {item.image} is {width}x{height} but mask {item.mask} is {mask.shape[1]}x{mask.shape[0]};"
            " they must be the same size"
        )
    counts = count_values(mask)
    strange = np.flatnonzero(counts[num_classes + 1 : 255])
    if len(strange):
        raise UserError(
            f"mask {item.mask} holds the value {strange[0] + num_classes + 1}, but data.classes names {num_classes}"
            " classes: values are 0 (background), a class's place in data.classes, or 255 (ignored)"
        )
    return counts[: num_classes + 1]


def count_values(mask: np.ndarray) -> np.ndarray:
    """Pixels of each value in a uint8 mask, (256,).

    Masks are long runs of one value, and counting a run waits for the same counter again and again; counting
    pairs of neighbours instead halves that.
    """
    flat = mask.ravel()
    even = len(flat) // 2 * 2
    pairs = np.bincount(flat[:even].view(np.uint16), minlength=65536).reshape(256, 256)
    return pairs.sum(0) + pairs.sum(1) + np.bincount(flat[even:], minlength=256)


def _read_cache(path: Path, key: str, shape: tuple[int, int]) -> np.ndarray | None:
    """The counts, int64 of ``shape``; None where there is no cache, or an old or damaged one, or one that swells."""
    try:
        refuse_pipe(path)
        with np.load(path, allow_pickle=False) as stored:
            if sum(entry.file_size for entry in stored.zip.infolist()) > 8 * math.prod(shape) + 4096:
                return None
            pixels = stored["pixels"] if str(stored["key"]) == key else None
            return pixels if pixels is not None and (pixels.shape, pixels.dtype) == (shape, np.int64) else None
    except Exception:  # zipfile, zlib and numpy raise many kinds for a damaged file, and it can always be built anew
        return None


def _write_cache(path: Path, key: str, pixels: np.ndarray) -> None:
    try:
        write_atomically(path, lambda file: np.savez_compressed(file, key=np.array(key), pixels=pixels))
    except OSError as error:
        tqdm.write(f"note: the class index is not cached, {path.parent} cannot be written ({error.strerror})")
