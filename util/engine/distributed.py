"""Training on several processes: torchrun --nproc_per_node=N train.py ... starts them, this joins them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from model.parallel import processes, rank
from util.config import Config
from util.errors import UserError
from util.files import held_alone


@contextmanager
def joined_processes() -> Iterator[None]:
    """Join the processes that torchrun started, NCCL on GPUs and gloo on CPUs; alone, do nothing."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"process {local} of this machine has no GPU of its own; set --nproc_per_node={gpus}")
        torch.cuda.set_device(local)
        backend = "nccl"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # the first process evaluates and builds indices alone
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def run_folder(config: Config) -> Iterator[None]:
    """Join the processes of the job, of which the first one holds the run's folder alone."""
    with joined_processes(), held_alone(Path(config.run_dir)) if rank() == 0 else nullcontext():
        yield


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process write files (an index, weights) that the others then find."""
    if rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if rank() == 0 and processes() > 1:
            dist.barrier()
