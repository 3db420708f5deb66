"""Loader processes: they outlive the signals that ask a run to stop, and their death is one line."""

import atexit
import multiprocessing
import multiprocessing.connection
import signal
import threading
from collections.abc import Iterator
from typing import TypeVar

from torch.utils.data import DataLoader

from util.errors import UserError

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""those that ask a run to stop"""


class LoadingError(UserError):
    """A batch could not be loaded; it is raised where the batch is asked for, so nothing else is half done."""


def ignore_signals(_: int) -> None:
    """In a worker: a signal reaches every process of a terminal, a job or a container; the main one finishes its
    step, and needs its workers for that. They end when it closes their loader, or is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Python ends what is left of them by SIGTERM, and would wait."""
    if multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def batches_of(loader: DataLoader[T]) -> Iterator[T]:
    """The batches of a loader; its workers end with the iterator.

    torch raises the death of a worker from a signal handler, in the middle of whatever the main process does. Here it
    is noticed where the worker's batch is waited for, within seconds.

    Raises:
        LoadingError: a file cannot be read, or a worker was killed.
    """
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    except UserError as error:
        raise LoadingError(str(error)) from error
    except (RuntimeError, OSError, EOFError) as error:  # also of the connection over which a batch was on its way
        multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1)
        if not any(worker.exitcode for worker in workers):
            raise
        raise LoadingError(
            "the system ended a loader process, most often for want of memory: lower workers, or give the job more"
            f" memory, or /dev/shm where that is full ({' '.join(str(error).split())})"
        ) from error
