"""Files that are whole whenever the machine stops."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def refuse_pipe(path: Path) -> None:
    """Raise OSError for a pipe or a device, which a reader would wait for."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError("it is a pipe or a device")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in its place, both forced to the disk.

    ``path`` holds the old file or the new one at any moment; where ``write`` fails, the old one stays.

    Raises:
        OSError: the disk is full, or the folder cannot be written; and whatever ``write`` raises.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force renames in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
