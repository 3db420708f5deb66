"""Atomic file writes, and a lock on the run folder."""

import csv
import fcntl
import io
import json
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from util.errors import UserError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError that has none, as those of writing to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write atomically, indented; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of the same keys atomically; the keys are the first line."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of :func:`write_json`; empty if there is no such file or it is damaged."""
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
    """Let ``write`` fill a temporary file in the same folder, then rename it to ``path``.

    ``path`` is the old file or the new one at any moment; if ``write`` fails, the old one stays. ``keep`` becomes the
    old file's new name. ``force`` is fsync; not worth its time for thousands of files that can be made again.
    """
    # a random name, because several processes may write the same file; a short one, because that of path may be long
    temporary = path.with_name(f"{path.name[:30]}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path), temporary.open("xb") as file:
            write(file)
            file.flush()
            if force:
                os.fsync(file.fileno())
        if keep is not None and path.exists():
            keep.unlink(missing_ok=True)
            try:
                keep.hardlink_to(path)
            except OSError:  # a file system without hard links: path is missing until the rename below
                path.replace(keep)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file or a folder of files; on a file system without links (exFAT, SMB) copy what is not there yet."""
    try:
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    except OSError:
        if not source.is_dir():
            write_bytes(target, source.read_bytes(), force=False)
            return
        target.mkdir(exist_ok=True)
        for file in source.iterdir():
            if not (target / file.name).exists():
                link_or_copy(file, target / file.name)


def require_writable(path: Path, suffix: str) -> None:
    """Refuse a path that has another suffix or cannot be written, before the work."""
    if path.suffix.lower() != suffix:
        raise UserError(f"{path} must end in {suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another place") from error


@contextmanager
def held_alone(folder: Path) -> Iterator[None]:
    """Make a run's folder and lock it; the system frees the lock when this process ends, however it ends."""
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_dir {folder} cannot be written ({error}); set run_dir=... to another folder") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which loader processes would inherit
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"run_dir {folder} is in use by {file.read().strip()}; end it, or set run_dir=... to another folder; if"
                f" its machine is gone, delete {path}"
            ) from None
        except OSError as error:  # NFS without a lock daemon, Lustre
            print(f"note: {folder} cannot be locked ({error.strerror}); start no second run there", file=sys.stderr)
        try:
            with naming(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            for left in folder.glob("*.tmp"):  # of a process that was killed while it wrote
                left.unlink()
            with naming(folder):  # a write whose error names no file, such as that of TensorBoard's events
                yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()  # only if nothing was written into it
