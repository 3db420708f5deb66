"""Which pictures are to be segmented, under which names, and against which ground truth."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from util.errors import UserError
from util.segment.pictures import SUFFIXES, UNREAD, Picture, read_picture

AHEAD = 3
"""pictures read while another is being segmented; as many are in memory"""


class QueryFile(NamedTuple):
    """A picture to segment, and the name that its results get."""

    path: Path
    name: str
    """of its outputs: without suffix, and below a folder relative to it ('sub/frame_01')"""


def find_queries(paths: Sequence[Path], out: Path) -> list[QueryFile]:
    """Find the files as given, and the pictures below folders in the order of their names; each file once.

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
    """Find the pictures below folders that are not read, such as HEIC."""
    files = [file for path in paths if path.is_dir() for file in sorted(path.rglob("*"))]
    return [file for file in files if file.suffix.lower() in UNREAD and not file.name.startswith(".")]


def find_ground_truths(path: Path, queries: Sequence[QueryFile]) -> dict[str, Path]:
    """Find each query's ground truth, by the query's name: one file for one query, or a folder of files of its names.

    Raises:
        UserError: naming the first query that has none.
    """
    if path.is_dir():
        masks: dict[str, Path] = {}
        for file in _below(path):
            other = masks.setdefault(file.name, file.path)
            if other != file.path:
                raise UserError(f"{other} and {file.path} are both a ground truth of '{file.name}'; remove one")
    elif path.exists() and len(queries) == 1:
        masks = {queries[0].name: path}
    else:
        problem = f"is one file for {len(queries)} queries; give a folder" if path.exists() else "does not exist"
        raise UserError(f"--ground-truth {path} {problem}")
    missing = [query for query in queries if query.name not in masks]
    if missing:
        raise UserError(
            f"--ground-truth {path} lacks {len(missing)} of {len(queries)} queries: no picture '{missing[0].name}.*'"
            f" for {missing[0].path}"
        )
    return masks


def read_ahead(queries: Iterable[QueryFile]) -> Iterator[tuple[QueryFile, "Future[Picture]"]]:
    """Yield the queries in order, each with its picture, which a thread reads ahead; an error waits in it."""
    waiting: deque[tuple[QueryFile, Future[Picture]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for query in queries:
            waiting.append((query, reader.submit(read_picture, query.path)))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def _below(folder: Path, without: tuple[str, ...] = ()) -> list[QueryFile]:
    """Find the pictures below a folder. ``without``: parts of the path of a folder inside that is not searched."""
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
    """Return the parts of ``out`` relative to ``folder``; none where it lies elsewhere."""
    top, written = folder.resolve(), out.resolve()
    if written == top:
        raise UserError(f"--out {out} is the folder of the queries; outputs would become queries, name another")
    return written.relative_to(top).parts if written.is_relative_to(top) else ()
