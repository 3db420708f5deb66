"""Bank B of distracting-object prototypes, section 3.5.2 of the paper."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PrototypeBank(nn.Module):
    """Keeps the latest ``capacity`` prototypes of each class, in one ring buffer for each.

    Both buffers are registered: the bank moves with its module, is saved with it, and resumes.

    Args:
        class_ids: the n classes whose prototypes are stored, the base classes; ids run from 1.
        channels: C of a prototype.
        capacity: prototypes kept a class (the paper: 2000).
        keep_empty: whether all-zero prototypes, those of an empty region, are stored too, as in the authors' code.
    """

    prototypes: Tensor
    """(n, capacity, C)"""
    stored: Tensor
    """(n,) how many were ever stored; the next one goes to slot stored % capacity"""
    row_of: Tensor
    """(largest id + 1,) from a class id to its row above; n, an index out of range, for classes that have none"""

    def __init__(
        self, *, class_ids: Sequence[int], channels: int, capacity: int = 2000, keep_empty: bool = False
    ) -> None:
        super().__init__()
        self.class_ids, self.capacity, self.keep_empty = list(class_ids), capacity, keep_empty
        rows = len(self.class_ids)
        self.register_buffer("prototypes", torch.zeros(rows, capacity, channels))
        self.register_buffer("stored", torch.zeros(rows, dtype=torch.long))
        row_of = torch.full((max(self.class_ids) + 1,), rows)
        row_of[self.class_ids] = torch.arange(rows)
        self.register_buffer("row_of", row_of, persistent=False)

    @torch.no_grad()
    def store(self, prototypes: Tensor, class_ids: Tensor) -> None:
        """Store (N, C) prototypes, oldest first, each under its class id (N,)."""
        if not len(prototypes):
            return
        kept = (prototypes.abs().amax(1) > 0) | self.keep_empty
        classes = self.row_of[class_ids]
        same = (classes[:, None] == classes[None, :]) & kept[None, :]
        rank = same.tril(-1).sum(1)  # how many of the same class come before in this call
        written = kept & (same.triu(1).sum(1) < self.capacity)  # what this very call would overwrite is not written
        place = classes * self.capacity + (self.stored[classes] + rank) % self.capacity
        # All shapes are fixed, so that a GPU does not synchronise: a row that is not written repeats one that is, or if
        # none is, the row that is stored there.
        first = written.to(torch.uint8).argmax().unsqueeze(0)  # a 0-dimensional index would synchronise
        place = torch.where(written, place, place[first])
        flat = self.prototypes.view(-1, self.prototypes.shape[2])
        source = torch.where(written[:, None], prototypes, prototypes[first]).to(flat.dtype)
        flat[place] = torch.where(written.any(), source, flat[place])
        self.stored.index_add_(0, classes, kept.to(self.stored.dtype))

    def of_classes(self, class_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Give the prototypes of the classes (N,), (N, capacity, C), and which slots are filled, (N, capacity)."""
        rows = self.row_of[class_ids]
        filled = torch.arange(self.capacity, device=self.stored.device) < self.stored[rows, None]
        return self.prototypes[rows], filled
