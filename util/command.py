"""What every command imports first: mistakes of the user end in one line and exit code 2, never in a traceback.

This file needs nothing but Python itself, so that it can say what else is missing.
"""

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from util.errors import UserError

if sys.version_info < (3, 11):  # noqa: UP036 (it is the one file that an older Python gets to read)
    sys.exit(f"error: Python 3.11 or newer is needed, and {sys.executable} is {sys.version.split()[0]}")

ROOT = Path(__file__).resolve().parent.parent


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
    except UserError as error:
        _refuse(error)
    except (MemoryError, RuntimeError) as error:
        from model.weights import WeightsError  # not above: torch takes seconds to import, and may be missing

        if isinstance(error, WeightsError):
            _refuse(error)
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
    """A stream that nothing but text comes through, whatever names of files and classes hold.

    What is written to a terminal that was closed is dropped: SIGHUP tells of it, and a run first saves.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()

    def write(self, text: str) -> int:
        moves_up = not text.replace("\x1b[A", "").strip("\n")  # the bar below another one
        with self._terminal_may_be_gone():
            self._stream.write(text if moves_up else printable(text))
        return len(text)

    def flush(self) -> None:
        with self._terminal_may_be_gone():
            self._stream.flush()

    @contextmanager
    def _terminal_may_be_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not (self._is_terminal and error.errno == errno.EIO):
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _report_in_thread(args: threading.ExceptHookArgs) -> None:
    """A thread that writes events hands a full disk on to the main one."""
    if not _is_full_disk(args.exc_value):
        threading.__excepthook__(args)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error is torch's: that of a GPU says the first words, that of the CPU the others."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


def _say_what_to_install(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Let a missing package end a command in one line; Python calls this for every error that ends it."""
    package = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not package or (ROOT / package).exists():
        sys.__excepthook__(kind, error, trace)
        return
    environment = ROOT / ".venv"
    idle = (environment / "bin/activate").exists() and Path(sys.prefix).resolve() != environment.resolve()
    what = environment / "bin/activate" if idle else ROOT / "requirements.txt"
    remedy = f"{'source' if idle else 'pip install -r'} {os.path.relpath(what)}"
    _refuse(f"{sys.executable} has no package '{package}'; run '{remedy}' first")


sys.excepthook = _say_what_to_install
