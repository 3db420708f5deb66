"""Ctrl-C and SIGTERM: stop where the state is whole, so that it can be saved first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and nothing is half done."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Interruption:
    """While entered, the first signal is noted (``requested``); a second one interrupts whatever is under way."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._whole = False

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._whole:
            raise Stopped(number)
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = number

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Around work that leaves the run's state alone, such as an evaluation: a signal stops it right away."""
        self._whole = True
        try:
            if self.requested is not None:
                raise Stopped(self.requested)
            yield
        finally:
            self._whole = False
