"""Loader processes: how their batches reach the main process, and what happens when they cannot.

A worker puts a batch together in shared memory, /dev/shm on Linux, of which a container has 64 MB by default. Where
that cannot hold the batches on their way, they are sent as bytes through a pipe instead. Workers outlive the signals
that ask a run to stop, and their death is one line.
"""

import atexit
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from util.errors import UserError

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""those that ask a run to stop"""


class LoadingError(UserError):
    """A batch could not be loaded; it is raised where the batch is asked for, so nothing else is half done."""


SHARED = Path("/dev/shm")
LARGER = "a container gets more by docker run --shm-size=8g (or --ipc=host)"
PREFETCHED = 2
"""batches that each worker has ready or on their way"""
PATIENCE = 600.0
"""seconds that a batch may be waited for: a network file system that is slow gets by, one that hangs does not"""
LOOK = 5.0
"""``timeout`` of a loader with workers, in seconds: so often they are looked at while a batch is waited for"""
TIMED_OUT = "timed out after"
"""stands in torch's message when that ``timeout`` is over"""


def fits_shared_memory(batch_bytes: int, workers: int) -> bool:
    """Tell whether shared memory can hold the batches that are on their way at a time; print a note where it cannot."""
    if not workers or not SHARED.is_dir():
        return True
    free, needed = shutil.disk_usage(SHARED).free, batch_bytes * (PREFETCHED * workers + 2)
    if free < needed:
        tqdm.write(
            f"note: the batches on their way (workers={workers}) need {needed / 2**20:,.0f} MiB of shared memory,"
            f" {SHARED} has {free / 2**20:,.0f} MiB free: they are sent through pipes, which takes somewhat longer;"
            f" {LARGER}",
            file=sys.stderr,
        )
    return free >= needed


def start_worker(_: int, *, shared: bool) -> None:
    """Prepare a worker, in its own process, before its first batch.

    A signal reaches every process of a terminal, a job or a container; the main one finishes its step, and needs its
    workers for that. They end when it closes their loader, or is gone.

    Args:
        shared: batches lie in shared memory; else they are sent as bytes.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]
    if not shared:
        ForkingPickler.register(Tensor, _as_bytes)


def _end_worker(error: Exception, _: Any) -> None:
    """End a worker whose batch cannot be sent: Python would drop the batch, and the main process wait for ever."""
    print(f"a loader process cannot send its batch: {error!r}", file=sys.stderr, flush=True)
    os._exit(1)


def _as_bytes(tensor: Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (tensor.numpy(),)


@atexit.register
def _end_workers() -> None:
    """End the workers that are left when Python ends: it would send SIGTERM, and wait."""
    if multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def batches_of(loader: DataLoader[T]) -> Iterator[T]:
    """Yield the batches of a loader; its workers end with the iterator.

    torch raises the death of a worker from a signal handler, in the middle of whatever the main process does. Here it
    is noticed where the worker's batch is waited for, within seconds. A worker that hangs is noticed after minutes.

    Raises:
        LoadingError: a file cannot be read, a worker was killed, or no batch came for ``PATIENCE``.
    """
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        while (batch := _next(batches)) is not None:
            yield batch
    except UserError as error:
        raise LoadingError(str(error)) from error
    except (RuntimeError, OSError, EOFError) as error:  # also of the connection over which a batch was on its way
        ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1)
        for worker in workers:
            if worker.sentinel in ended:
                worker.join()  # it lets go of its files a moment before it has an exit code
        died = any(worker.exitcode for worker in workers)
        for worker in workers:  # torch would wait for each, and those that hang heed no request to end
            worker.kill()
        reason = str(error).strip().rpartition("\n")[2]
        if "/torch_" in reason:  # the name of a file in shared memory
            raise LoadingError(f"shared memory is full ({reason}); {LARGER}, or set workers=0") from error
        if TIMED_OUT in reason:
            raise LoadingError(
                f"no batch came for {PATIENCE:.0f} s, the loader hangs: the disk does not answer (workers=0 shows at"
                f" which file), or {SHARED} is full: {LARGER}"
            ) from error
        if not died:
            raise
        raise LoadingError(
            "the system ended a loader process, most often for want of memory: lower workers, or give the job more"
            f" memory, or more of {SHARED} where that is full: {LARGER} ({reason})"
        ) from error


def _next(batches: Iterator[T]) -> T | None:
    """Wait for the next batch, None at the end; torch gives up after each ``LOOK``, and can be asked again."""
    began = time.monotonic()
    while True:
        try:
            return next(batches, None)
        except RuntimeError as error:
            if TIMED_OUT not in str(error) or time.monotonic() - began > PATIENCE:
                raise
