"""What surrounds the steps of a training and is not part of it: progress bar, clock, signals, events, checkpoints.

A GPU works through what it was given while the host goes on, and to read a value from it is to wait for it. The values
of a step (losses, norm of the gradient, whether a process was asked to stop) are therefore copied behind it and read
one step later, when the next step has been handed over already.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from model.losses import NTRELoss
from model.parallel import processes, rank
from util.data.dataset import Episode
from util.data.loading import LoadingError
from util.engine.events import Events
from util.engine.interruption import Interruption, Stopped
from util.engine.memory import peak_memory_mib
from util.engine.run_state import LAST, Training
from util.errors import UserError
from util.progress import progress

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}{postfix}]"
"""fits 100 columns with the loss, the learning rate and the share of waiting"""
LOADER_IS_THE_LIMIT = 0.25
"""share of an epoch's time spent waiting for images above which a line says so"""


class _Report(NamedTuple):
    """Values of a step on their way to the host."""

    step: int
    lr: float
    names: list[str]
    values: Tensor
    """on the host: every loss term, the norm of the gradient, the signal that asked to stop or 0"""
    copied: torch.cuda.Event | None
    """when they are there; None where they never left the host"""

    def read(self) -> tuple[dict[str, float], float, float]:
        if self.copied is not None:
            self.copied.synchronize()
        *means, norm, stopping = self.values.tolist()
        return dict(zip(NTRELoss.NAMES, means, strict=True)), norm, stopping


class Monitor:
    """It is given each batch before its step and each step's values after it; see :func:`monitored`.

    Args:
        events: of the first process; the others have none.
        epoch_steps: steps of an epoch.
    """

    def __init__(
        self, training: Training, events: Events | None, bar: tqdm, stop: Interruption, epoch_steps: int
    ) -> None:
        self.training, self.events, self.bar, self.stop, self.epoch_steps = training, events, bar, stop, epoch_steps
        self._report: _Report | None = None
        self._saved = time.monotonic()
        self._began: float | None = None
        self._waited = 0.0

    def watched(self, batches: Iterable[Episode]) -> Iterator[Episode]:
        """The batches of an epoch; at its end its speed is written, and a line where the loader is the limit."""
        start, started = self.training.step, time.monotonic()
        epoch = start // self.epoch_steps + 1
        self.bar.set_description(f"epoch {epoch}/{self.training.config.train.epochs}", refresh=False)
        self._began, self._waited = None, 0.0
        ready = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(ready, None)
            if batch is None:
                break
            if self._began is None:
                self._began = time.perf_counter()  # the first batch has the loader's start in it
            else:
                self._waited += time.perf_counter() - asked
            yield batch
        waiting = self._waiting()
        self.flush()
        if self.events is not None and (steps := self.training.step - start) > 0:
            config = self.training.config
            speed = steps * config.train.batch_size / (time.monotonic() - started)
            memory = peak_memory_mib(self.training.hardware.device)
            self.events.scalars(self.training.step, {"episodes_per_second": speed, "peak_memory_mib": memory})
            if waiting > LOADER_IS_THE_LIMIT:
                tqdm.write(
                    f"epoch {epoch}: {waiting:.0%} of the time went to waiting for images: the loader is the limit,"
                    f" not the model; raise workers (now {config.workers}, of {os.cpu_count()} cores)"
                )

    def _waiting(self) -> float:
        """The share of the epoch's time, after its first batch, that went to waiting for the loader."""
        return 0.0 if self._began is None else self._waited / (time.perf_counter() - self._began)

    def asked_to_stop(self) -> Tensor:
        """The signal that asks this process to stop, or 0, as a scalar on the device."""
        return torch.full((), float(self.stop.requested or 0), device=self.training.hardware.device)

    def after_step(self, lr: float, names: list[str], values: Tensor) -> None:
        """Take a step's values, read those of the step before, and save where it is time.

        Args:
            names: files of the step's episodes.
            values: loss terms, norm of the gradient, :meth:`asked_to_stop`; of all processes, on the device.
        Raises:
            UserError: a loss of the step before is not finite; names the step, every term and the files.
            Stopped: a process was asked to, and the state is whole.
        """
        before = self._report
        on_host = values.to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if values.is_cuda else None
        if copied is not None:
            copied.record()
        self._report = _Report(self.training.step - 1, lr, names, on_host, copied)
        stopping = 0.0 if before is None else self._show(before)
        if self.stop.requested if processes() == 1 else stopping:
            raise Stopped(self.stop.requested or signal.SIGTERM)
        due = time.monotonic() - self._saved >= 60 * self.training.config.train.checkpoint_minutes
        if due and self.training.step % self.epoch_steps:
            self.save()

    def flush(self) -> None:
        """Read the values of the latest step, too."""
        report, self._report = self._report, None
        if report is not None:
            self._show(report)

    def save(self) -> None:
        """Write what was logged up to here and a checkpoint."""
        self.flush()
        if self.events is not None:
            self.events.flush()  # a checkpoint's own events are on the disk before it
        self.training.save_last()
        self._saved = time.monotonic()

    def _show(self, report: _Report) -> float:
        """Check a step's values and show them; whether a process was asked to stop."""
        training = self.training
        terms, norm, stopping = report.read()
        if not math.isfinite(terms["total"]):
            training.step = report.step
            shown = ", ".join(f"{name} {value:g}" for name, value in terms.items())
            path = training.save_for_inspection(report.names, terms)
            raise UserError(
                f"the loss of step {report.step} is not finite ({shown}); its episodes: {' | '.join(report.names)};"
                f" the state before it is in {path}; lower train.lr, set precision=fp32, or look at these files"
            )
        training.sums = {name: training.sums[name] + value for name, value in terms.items()}
        if self.events is not None:
            losses = {f"loss/{name}": value for name, value in terms.items()}
            self.events.scalars(report.step + 1, losses | {"lr": report.lr, "gradient_norm": norm})
        waiting = f"{self._waiting():.0%}"
        self.bar.set_postfix(loss=f"{terms['total']:.3f}", lr=f"{report.lr:.4f}", waiting=waiting, refresh=False)
        self.bar.update()
        return stopping


@contextmanager
def monitored(training: Training, epoch_steps: int, total_steps: int) -> Iterator[Monitor]:
    """Surround the steps of a run; where it is stopped, or its images cannot be loaded any more, it is saved first.

    Raises:
        SystemExit: a process was asked to stop.
        UserError: see :meth:`Monitor.after_step`; or an image cannot be loaded.
    """
    run_dir, first, began_at = Path(training.config.run_dir), rank() == 0, training.step
    with (
        closing(Events(run_dir / "tensorboard", training.config, training.step)) if first else nullcontext() as events,
        progress(total=total_steps, initial=training.step, unit="step", bar_format=BAR, disable=not first) as bar,
        Interruption() as stop,
    ):
        monitor = Monitor(training, events, bar, stop, epoch_steps)
        try:
            yield monitor
        except Stopped as stopped:
            monitor.save()
            if first:
                bar.close()
                print(f"stopped by {stopped} after step {training.step}, in {run_dir / LAST}; resume=auto goes on")
            sys.exit(stopped.exit_code)
        except LoadingError as error:
            if not first or training.step == began_at:
                raise
            monitor.save()
            raise UserError(f"{error}; saved first, after step {training.step}: resume=auto goes on") from error
