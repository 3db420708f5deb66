"""Which images predict.py segments, the names of their outputs, and their ground truths."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from util.data.images import FORMATS
from util.errors import UserError, first_of

SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
UNREAD = (".heic", ".heif", ".avif", ".gif")
"""suffixes of images that cannot be read; predict.py says so if a folder holds some"""


class Query(NamedTuple):
    """An image to segment."""

    path: Path
    name: str
    """of its outputs: the path without suffix, relative to the folder that was given ('sub/frame_01')"""


def find_queries(paths: Sequence[Path], out: Path) -> list[Query]:
    """List the given files, and the images in given folders in the order of their names; each file once.

    In folders, hidden files and the contents of ``out`` are left out.

    Raises:
        UserError: a path does not exist, a folder holds no images, or two queries would have the same outputs.
    """
    found: dict[Path, Query] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"query {path} does not exist")
        if path.resolve() == out.resolve():
            raise UserError(f"--out {out} is a folder of queries; outputs would become queries, name another")
        for query in _find_images(path, without=out) if path.is_dir() else [Query(path, path.stem)]:
            found.setdefault(query.path.resolve(), query)
    by_name: dict[str, Query] = {}
    for query in found.values():
        other = by_name.setdefault(query.name, query)
        if other is not query:
            raise UserError(
                f"{other.path} and {query.path} would both be written as {out / query.name}_*;"
                " rename one, or give them another --out each"
            )
    return list(found.values())


def find_ground_truths(path: Path, queries: Sequence[Query]) -> dict[str, Path]:
    """Find each query's ground truth by its name, in a folder with the same names, or in one file for one query.

    Raises:
        UserError: a query has none or several.
    """
    if not path.is_dir():
        if not path.exists() or len(queries) != 1:
            problem = f"is one file for {len(queries)} queries; give a folder" if path.exists() else "does not exist"
            raise UserError(f"--ground-truth {path} {problem}")
        return {queries[0].name: path}
    masks: dict[str, Path] = {}
    for mask in _find_images(path):
        if (other := masks.setdefault(mask.name, mask.path)) != mask.path:
            raise UserError(f"{other} and {mask.path} are both a ground truth of '{mask.name}'; remove one")
    if missing := [query.name for query in queries if query.name not in masks]:
        raise UserError(f"--ground-truth {path} lacks {len(missing)} of {len(queries)} queries: {first_of(missing)}")
    return masks


def _find_images(folder: Path, without: Path | None = None) -> list[Query]:
    """List the images in a folder and its subfolders, but for those in the folder ``without``."""
    top, left_out = folder.resolve(), None if without is None else without.resolve()
    found: list[Query] = []
    unread: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or (left_out is not None and (top / name).is_relative_to(left_out)) or not path.is_file():
            continue
        if path.suffix.lower() in SUFFIXES:
            found.append(Query(path, name.with_suffix("").as_posix()))
        elif path.suffix.lower() in UNREAD:
            unread.append(path.name)
    note = f"cannot read {first_of(unread, 3, ', ')}; convert to JPEG or PNG"
    if not found:
        raise UserError(f"folder {folder} holds no images ({', '.join(SUFFIXES)}){f'; {note}' if unread else ''}")
    if unread:
        print(f"note: {note}")
    return found
