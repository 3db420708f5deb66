"""User mistakes end in one line and exit code 2, never in a traceback."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

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
    """Run a command line's ``main`` and exit: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        main()
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
    text = " ".join(str(reason).splitlines())
    print("error: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text), file=sys.stderr)
    sys.exit(2)


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU's allocator has no exception of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
