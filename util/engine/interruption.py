"""Ctrl-C, SIGTERM and SIGHUP: the run goes on to where its state is whole, so that it can be saved first.

A signal is only noted. Whoever works looks between two steps or two batches and stops there; nothing is raised in the
middle of a statement, where it would be lost inside a destructor or leave a step half done.
"""

import atexit
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from model.parallel import processes
from util.data.loading import SIGNALS

PATIENCE = 5.0
"""seconds after which a second Ctrl-C ends the run at once, unsaved; torchrun and shells repeat a signal sooner"""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and nothing is half done."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Interruption:
    """While entered, the first signal is noted (``requested``). SIGHUP stays ignored where it was, as under nohup.

    Once a signal was noted, SIGTERM and SIGHUP do nothing more, also afterwards: launchers repeat them, and would end
    the process before it has said where it saved.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._since = 0.0

    def __enter__(self) -> "Interruption":
        heeded = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if self.requested is None or number == signal.SIGINT:
                signal.signal(number, handler)
            else:  # an ignored signal stays so, while Python takes its handlers away before it has ended
                atexit.register(signal.signal, number, signal.SIG_IGN)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > PATIENCE:
            raise KeyboardInterrupt

    def check(self, device: torch.device) -> None:
        """Raise :class:`Stopped` in every process of the job when one of them was asked to stop; all must call it."""
        number = self.requested or 0
        if processes() > 1:
            asked = torch.tensor(number, device=device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            number = int(asked)
        if number:
            raise Stopped(number)
