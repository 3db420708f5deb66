"""Work on many files with all cores."""

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

from util.errors import UserError
from util.progress import progress as progress_bar

S = TypeVar("S")
T = TypeVar("T")

WORTH_PROCESSES = 512  # shorter sequences are processed in the main process


def usable_cores() -> int:
    """Return the cores that this process may use: Slurm and docker allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_all_cores(
    function: Callable[[S], T], items: Sequence[S], title: str, *, unit: str = "image", progress: bool = True
) -> list[T]:
    """Apply a function to every item, with a progress bar, and return the results in order.

    The first error ends the work. Processes are used because Pillow holds the GIL.
    """
    bar = partial(progress_bar, total=len(items), desc=title, unit=unit, disable=not (progress and items), leave=False)
    if len(items) < WORTH_PROCESSES:
        return list(bar(map(function, items)))
    # Ctrl-C reaches every process; the main one cancels the rest.
    pool = ProcessPoolExecutor(usable_cores(), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        return list(bar(pool.map(function, items, chunksize=64)))
    except BrokenProcessPool:
        raise UserError("a process was killed, most often for lack of memory; run the same command again") from None
    finally:
        pool.shutdown(cancel_futures=True)
