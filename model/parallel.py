"""One batch over several processes, computed as one process would.

The processes of a job each hold a run of the batch's episodes, in the order of their ranks. With one process, or
without torch.distributed, everything here does nothing.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def processes() -> int:
    """Say how many processes share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Say which of them this is, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def mean_over_batch(total: Tensor, count: Tensor | int) -> Tensor:
    """Compute this process's part of ``total / count`` of the whole batch.

    DistributedDataParallel averages gradients over the processes. A loss that is a sum over the batch by a count
    over the batch is therefore given as this process's sum, by everyone's count, times the number of processes:
    the average of the parts is the loss, whatever count each process has.

    Args:
        total: scalar with a gradient, the sum over this process's episodes
        count: what the sum is over, in this process; an empty batch counts as 1
    """
    if processes() == 1:
        return total / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
    everyone = total.new_zeros((), dtype=torch.float32) + count  # nothing is copied from the host
    dist.all_reduce(everyone)
    return total * processes() / everyone.clamp_min(1)


def gathered(x: Tensor) -> Tensor:
    """Gather (n, ...) of every process into (processes n, ...), in the order of the batch; without gradient."""
    if processes() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(processes())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class Dropout2d(nn.Module):
    """Does what nn.Dropout2d does, in place; its noise does not depend on the number of processes.

    All processes hold the same random state, draw the noise of the whole batch, and take their own images' part.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same, without the channels that are drawn."""
        if not self.training or self.p == 0:
            return x
        images, start = len(x), rank() * len(x)
        kept = torch.empty(processes() * images, x.shape[1], 1, 1, device=x.device).bernoulli_(1 - self.p)
        return x.mul_((kept[start : start + images] / (1 - self.p)).to(x.dtype))


def log_mean(values: Tensor) -> Tensor:
    """Average over the processes, in place."""
    if processes() > 1:
        dist.all_reduce(values)
        values /= processes()
    return values
