"""Which pictures are to be segmented, under which names, and against which truth."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model import IGNORE
from util.errors import UserError
from util.segment.pictures import SUFFIXES, UNREAD, Picture, read_picture

AHEAD = 3
"""pictures read while another is being segmented; as many are in memory"""


class QueryFile(NamedTuple):
    path: Path
    name: str
    """of its outputs: without suffix, and below a folder relative to it ('sub/frame_01')"""


def find_queries(paths: Sequence[Path], out: Path) -> list[QueryFile]:
    """Files as given, and the pictures below folders in the order of their names; each file once.

    Below a folder, hidden files and folders are left out, and ``out`` where it lies there.

    Raises:
        UserError: a path does not exist, a folder holds no pictures, or two queries would have the same outputs.
    """
    found: dict[Path, QueryFile] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"query {path} does not exist")
        for query in _below(path, _out_inside(path, out)) if path.is_dir() else [QueryFile(path, path.stem)]:
            found.setdefault(query.path.resolve(), query)
    by_name: dict[str, QueryFile] = {}
    for query in found.values():
        other = by_name.setdefault(query.name, query)
        if other is not query:
            raise UserError(
                f"{other.path} and {query.path} would both be written as {out / query.name}_*;"
                " rename one, or give them another --out each"
            )
    return list(found.values())


def unread_pictures(paths: Sequence[Path]) -> list[Path]:
    """Pictures below folders that cannot be read, such as HEIC."""
    return [file for path in paths if path.is_dir() for file in sorted(path.rglob("*")) if is_unread(file)]


def is_unread(file: Path) -> bool:
    return file.suffix.lower() in UNREAD and not file.name.startswith(".")


def find_truths(truth: Path, queries: Sequence[QueryFile]) -> dict[str, Path]:
    """The true mask of each query, by its name: one file for one query, or a folder of files of the same names.

    Raises:
        UserError: naming the first query that has none.
    """
    if truth.is_dir():
        masks: dict[str, Path] = {}
        for file in _below(truth):
            other = masks.setdefault(file.name, file.path)
            if other != file.path:
                raise UserError(f"{other} and {file.path} are both a truth of '{file.name}'; remove one")
    elif truth.exists() and len(queries) == 1:
        masks = {queries[0].name: truth}
    else:
        problem = f"is one file for {len(queries)} queries; give a folder" if truth.exists() else "does not exist"
        raise UserError(f"--truth {truth} {problem}")
    missing = [query for query in queries if query.name not in masks]
    if missing:
        raise UserError(
            f"--truth {truth} lacks {len(missing)} of {len(queries)} queries: no picture '{missing[0].name}.*' for"
            f" {missing[0].path}"
        )
    return masks


def read_ahead(queries: Iterable[QueryFile]) -> Iterator[tuple[QueryFile, "Future[Picture]"]]:
    """The queries in order, each with its picture, which a thread has read meanwhile; an error waits in the future."""
    waiting: deque[tuple[QueryFile, Future[Picture]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for query in queries:
            waiting.append((query, reader.submit(read_picture, query.path)))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def intersection_over_union(mask: np.ndarray, truth: np.ndarray) -> float:
    """Of a boolean mask and a truth of 1 target, 0 other, 255 ignored; 1 where both are empty."""
    counted = truth != IGNORE
    union = int(((mask | (truth == 1)) & counted).sum())
    return int((mask & (truth == 1)).sum()) / union if union else 1.0


def _below(folder: Path, without: tuple[str, ...] = ()) -> list[QueryFile]:
    """``without``: parts of the path of a folder inside that is not searched."""
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        left_out = bool(without) and inside.parts[: len(without)] == without
        if path.suffix.lower() in SUFFIXES and not hidden and not left_out and path.is_file():
            found.append(QueryFile(path, inside.with_suffix("").as_posix()))
    if not found:
        unread = unread_pictures([folder])
        but = f" but {len(unread)} such as {unread[0].name}, which are not read: convert them" if unread else ""
        raise UserError(f"folder {folder} holds no pictures ({', '.join(SUFFIXES)}){but}")
    return found


def _out_inside(folder: Path, out: Path) -> tuple[str, ...]:
    """Parts of ``out`` relative to ``folder``; none where it lies elsewhere."""
    top, written = folder.resolve(), out.resolve()
    if written == top:
        raise UserError(f"--out {out} is the folder of the queries; outputs would become queries, name another")
    return written.relative_to(top).parts if written.is_relative_to(top) else ()
