"""Loader processes: how many, how they start, and how they end."""

import atexit
import multiprocessing
import multiprocessing.process
import shutil
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from util.data.pool import usable_cores
from util.errors import WORKER_KILLED, UserError

T = TypeVar("T")
SHARED = Path("/dev/shm")


def usable_workers(workers: int, batch_bytes: int) -> int:
    """Return ``workers``, at most one for each core that this process may use; 0 if shared memory is too small.

    Workers put batches into shared memory, of which a container has 64 MB by default.
    """
    workers = min(workers, usable_cores())
    needed = batch_bytes * (2 * workers + 2)  # each worker has two batches ready or in transit
    if workers and SHARED.is_dir() and (free := shutil.disk_usage(SHARED).free) < needed:
        tqdm.write(
            f"note: {SHARED} has {free / 2**20:,.0f} MiB free and workers={workers} need {needed / 2**20:,.0f} MiB, so"
            " images are loaded without workers; start the container with --shm-size=8g or --ipc=host",
            file=sys.stderr,
        )
        return 0
    return workers


def start_worker(_: int) -> None:
    """Ignore the signals that ask a run to stop: the main process finishes its step with the help of its workers."""
    cv2.setNumThreads(1)  # the workers are the parallelism
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def load(dataset: Dataset[T], workers: int, *, batch_bytes: int = 0, **options: Any) -> Generator[T]:
    """Yield the batches of a data set, loaded by as many workers as are usable; ``options`` are those of DataLoader."""
    cv2.setNumThreads(1)  # a pool of threads does not survive the start of a worker
    return batches_of(
        DataLoader(
            dataset,
            num_workers=usable_workers(workers, batch_bytes),
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # the loader would otherwise draw from the global one, and shift dropout
            **options,
        )
    )


def batches_of(loader: DataLoader[T]) -> Generator[T]:
    """Yield the batches of a loader; its workers end with this iterator, at the latest with the program."""
    others = set(multiprocessing.active_children())
    try:
        batches = iter(loader)
    finally:  # also if not all of them could be started
        workers = set(multiprocessing.active_children()) - others
        if workers:
            atexit.register(_kill, workers)
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:  # torch's error, or of the connection to the worker
        for worker in workers:
            worker.join(0.1)
        if not any(worker.exitcode for worker in workers):
            raise
        raise UserError(WORKER_KILLED) from error


def _kill(workers: set[multiprocessing.process.BaseProcess]) -> None:
    """Kill workers that are alive when Python ends: it would send SIGTERM, which they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an error at their death
    for worker in workers:
        worker.kill()
