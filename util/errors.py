"""Mistakes that the user can mend; util/command.py shows them in one line."""

from collections.abc import Sequence


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
