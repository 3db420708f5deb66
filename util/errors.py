"""User mistakes end in one line and exit code 2, never in a traceback."""

import sys
from collections.abc import Callable
from typing import NoReturn

from model.weights import WeightsError


class UserError(Exception):
    """Something the user can mend; the message says what, where and how.

    A loader worker hands an exception over with its traceback inside the message; only the last message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("UserError: ", 1)[-1].strip())


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command line's ``main`` and exit: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        main()
    except (UserError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
