"""Progress bars on a terminal; in a log the same as a line now and then."""

import io
import sys
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 60.0
"""between two lines in a log"""


class _Lines(io.TextIOBase):
    """Stderr without what moves a terminal's cursor."""

    def write(self, text: str) -> int:
        line = text.replace("\x1b[A", "").strip()
        if line:
            sys.stderr.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(*arguments: Any, **options: Any) -> tqdm:
    """What tqdm gives for the same arguments; where stderr is no terminal, a line a minute and one at the end.

    There, a bar that is not to stay (``leave=False``) says nothing before its first minute.
    """
    if not sys.stderr.isatty():
        wait = LOG_SECONDS if options.get("leave") is False else 0
        options |= {"file": _Lines(), "mininterval": LOG_SECONDS, "miniters": 1, "delay": wait}
    bar: tqdm = tqdm(*arguments, **{"dynamic_ncols": True, **options})
    return bar
