"""Files that are whole whenever the machine stops, and folders that one process writes at a time."""

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout, UnixFileLock

from util.errors import UserError


def refuse_pipe(path: Path) -> None:
    """Raise OSError for a pipe or a device, which a reader would wait for."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError("it is a pipe or a device")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError say which file it is about; what comes from writing to an open one does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # not what Pillow says of formats
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write atomically, indented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote; empty where there is no such file, or a damaged one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_bytes(path: Path, data: bytes, *, force: bool = True) -> None:
    """Write a file atomically."""
    write_atomically(path, lambda file: file.write(data), force=force)


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, keep: Path | None = None, force: bool = True
) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in its place, both forced to the disk.

    ``path`` holds the old file or the new one at any moment; where ``write`` fails, the old one stays.

    Args:
        keep: where the old file is found afterwards.
        force: to the disk; not worth its time for thousands of files that can be made again.
    Raises:
        OSError: the disk is full, or the folder cannot be written; and whatever ``write`` raises.
    """
    temporary = path.with_name(path.name + ".tmp")
    with naming(path), _opened_alone(temporary) as file:
        try:
            write(file)
            file.flush()
            if force:
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                _name_also(path, keep)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    if force:
        sync_folder(path.parent)


def _opened_alone(path: Path) -> BinaryIO:
    """An empty file to write. Another process that writes the same is waited for; what a dead one left is taken over.

    A file of one name, so that processes that are killed leave one at most.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "wb")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                file.truncate(0)
                return file
        file.close()  # the other process has put it in its place


def _name_also(path: Path, other: Path) -> None:
    """Let ``other`` be the file that ``path`` is, with no moment at which either name is missing."""
    link = other.with_name(other.name + ".tmp")
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(path)
    except OSError:  # a file system without links: ``path`` is missing until the new file comes
        path.replace(other)
    else:
        link.replace(other)
        link.unlink(missing_ok=True)  # it stays where both were one file already


def require_writable(path: Path, suffix: str) -> None:
    """Find out before the work, not after it.

    Raises:
        UserError: ``path`` has another suffix, is a folder, or its folder cannot be written.
    """
    if path.suffix.lower() != suffix:
        raise UserError(f"{path} must end in {suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another place") from error


@contextmanager
def held_alone(folder: Path) -> Iterator[None]:
    """Make a run's folder and hold it; the system frees it when this process ends, however it ends.

    Raises:
        UserError: another process holds it, which is named; or it cannot be written.
    """
    lock = FileLock(folder / "lock")
    place, new = Path(lock.lock_file), not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        owner = " ".join(place.read_text(encoding="utf-8").split())
        raise UserError(
            f"run_dir {folder} is in use by {owner}; end it, or set run_dir=... to another folder"
        ) from None
    except OSError as error:
        raise UserError(f"run_dir {folder} cannot be written ({error}); set run_dir=... to another folder") from error
    native = isinstance(lock, UnixFileLock)  # else, without flock, its file has contents of its own
    try:
        if native:
            with naming(place):
                place.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        if native:
            place.unlink(missing_ok=True)
        lock.release()
        if new:
            with suppress(OSError):
                folder.rmdir()  # where nothing was written into it


def sync_folder(folder: Path) -> None:
    """Force renames in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
