"""Work on many files with all cores."""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

from tqdm import tqdm

from util.errors import UserError
from util.progress import progress as progress_bar

S = TypeVar("S")
T = TypeVar("T")

WORTH_PROCESSES = 512
tqdm.monitor_interval = 0  # no monitor thread that could hold a lock while processes are forked


def on_all_cores(
    function: Callable[[S], T], items: Sequence[S], title: str, *, unit: str = "image", progress: bool = True
) -> list[T]:
    """Apply a function to every item, with a progress bar, and return the results in order.

    The first error ends the work at once. Processes do it, because threads wait for each other in Pillow's Python half.
    On Linux they are forked, which costs nothing to start; a list too short to be worth it stays in this process.

    Raises:
        UserError: a process died; and whatever ``function`` raises.
    """
    bar = partial(progress_bar, total=len(items), desc=title, unit=unit, disable=not (progress and items), leave=False)
    if len(items) < WORTH_PROCESSES:
        return list(bar(map(function, items)))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(mp_context=context, initializer=_ignore_interrupts)
    try:
        return list(bar(pool.map(function, items, chunksize=64)))
    except BrokenProcessPool:
        raise UserError("a process died, most often for want of memory; run the same command again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C is for the main process alone, which then cancels the rest."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
