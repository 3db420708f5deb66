"""Mistakes that the user can correct; util/command.py shows them in one line."""

from collections.abc import Sequence

WORKER_KILLED = (
    "the system ended a loader process, most often for lack of memory: lower workers, or give the job more memory;"
    " resume=auto continues from the last checkpoint"
)


class UserError(Exception):
    """A mistake that the user can correct; the message says what is wrong, where, and the remedy."""

    def __init__(self, message: str) -> None:
        # torch re-raises an exception of a loader process with its traceback as the message: keep the last message only
        super().__init__(message.rsplit("UserError: ", 1)[-1].strip())


def first_of(problems: Sequence[str], shown: int = 5, separator: str = "; ") -> str:
    """The first few problems, and how many more there are."""
    more = f"{separator}and {len(problems) - shown} more" if len(problems) > shown else ""
    return separator.join(problems[:shown]) + more
