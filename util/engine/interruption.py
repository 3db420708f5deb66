"""Ctrl-C, SIGTERM and SIGHUP end a run between two steps, so that its state is whole and can be saved first."""

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

from model.parallel import processes


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and nothing is half done."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Interruption:
    """While entered, a signal is only noted (``requested``), also when launchers and shells repeat it.

    A signal that is ignored, as SIGHUP under nohup, stays ignored. After a request signals stay ignored: a repeated
    SIGTERM must not end a process that is about to say that it was saved.
    """

    def __init__(self) -> None:
        self.requested = 0

    def __enter__(self) -> "Interruption":
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        heeded = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.requested else handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = self.requested or number
        if number == signal.SIGHUP:  # the terminal is gone, and writing to it would be an error
            for stream in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def check(self, *, alone: bool = False) -> None:
        """Raise :class:`Stopped` in every process of the job if one was asked to stop; all call it, unless alone."""
        number = self.requested
        if processes() > 1 and not alone:
            asked = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            number = int(asked)
        if number:
            self.requested = number
            raise Stopped(number)
