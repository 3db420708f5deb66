"""Progress bars on a terminal; in a log a line a minute instead."""

import io
import sys
from contextlib import suppress
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 60.0  # between two lines in a log


class _Lines(io.TextIOBase):
    """Stderr, with each state of the bar as a line of its own; lines are dropped if stderr was closed."""

    def write(self, text: str) -> int:
        line = text.replace("\x1b[A", "").strip()
        if line:
            with suppress(OSError):
                sys.stderr.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def progress(*arguments: Any, **options: Any) -> tqdm:
    """A tqdm bar; if stderr is no terminal, a line a minute and one at the end.

    In a log, a bar that is removed at its end (``leave=False``) writes nothing in its first minute. If a terminal was
    closed, tqdm itself ignores the error (EIO): a run can go on and save.
    """
    if not sys.stderr.isatty():
        delay = LOG_SECONDS if options.get("leave") is False else 0
        options |= {"file": _Lines(), "mininterval": LOG_SECONDS, "miniters": 1, "delay": delay}
    bar: tqdm = tqdm(*arguments, **{"dynamic_ncols": True, **options})
    return bar
