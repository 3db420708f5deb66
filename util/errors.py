"""User mistakes end in one line and exit code 2, never in a traceback."""

import errno
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TextIO

import torch

from model.weights import WeightsError


class UserError(Exception):
    """Something the user can mend; the message says what, where and how.

    A loader worker hands an exception over with its traceback inside the message; only the last message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("UserError: ", 1)[-1].strip())


def first_of(problems: Sequence[str], shown: int = 5, separator: str = "; ") -> str:
    """The first few of many, and how many more."""
    more = f"{separator}and {len(problems) - shown} more" if len(problems) > shown else ""
    return separator.join(problems[:shown]) + more


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command line's ``main`` and exit: 0, 2 for a user's mistake or a full disk, 130 for Ctrl-C."""
    threading.excepthook = _report_in_thread
    os.environ["NO_COLOR"] = "1"  # colours are terminal codes, too
    try:
        with redirect_stdout(_Printable(sys.stdout)), redirect_stderr(_Printable(sys.stderr)):
            try:
                main()
            finally:
                sys.stdout.flush()
    except OSError as error:
        if not _is_full_disk(error):
            raise
        sys.stdout = sys.stderr  # else Python would flush it once more at the end, in case it is what is full
        what = error.filename or "the output"
        _refuse(f"cannot write {what} ({error.strerror}); free some space, or choose another place")
    except (UserError, WeightsError) as error:
        _refuse(error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _refuse(f"out of memory ({error}); lower train.batch_size, eval.batch_size or data.image_size")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _refuse(reason: object) -> NoReturn:
    """One line whatever stands in the reason: names of files and keys may hold line ends and terminal codes."""
    print("error: " + printable(" ".join(str(reason).splitlines())), file=sys.stderr)
    sys.exit(2)


def printable(text: str) -> str:
    """The same with what moves a terminal's cursor, colours or hides escaped; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\r\t" else ascii(c)[1:-1] for c in text)


class _Printable:
    """A stream that nothing but text comes through, whatever names of files and classes hold."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        moves_up = not text.replace("\x1b[A", "").strip("\n")  # the bar below another one
        self._stream.write(text if moves_up else printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _report_in_thread(args: threading.ExceptHookArgs) -> None:
    """A thread that writes events hands a full disk on to the main one."""
    if not _is_full_disk(args.exc_value):
        threading.__excepthook__(args)


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU's allocator has no exception of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
