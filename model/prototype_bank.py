"""Bank B of distracting-object prototypes, section 3.5.2 of the paper."""

import torch
from torch import Tensor, nn


class PrototypeBank(nn.Module):
    """The latest ``capacity`` prototypes of each class, as one ring buffer a class.

    Both buffers are registered: the bank moves with its module, is saved with it, and resumes.

    Args:
        num_classes: class ids run from 1 to this.
        channels: C of a prototype.
        capacity: prototypes kept a class (the paper: 2000).
        keep_empty: whether all-zero prototypes, those of an empty region, are stored too, as in the authors' code.
    """

    prototypes: Tensor
    """(num_classes, capacity, C)"""
    stored: Tensor
    """(num_classes,) how many were ever stored; the next one goes to slot stored % capacity"""

    def __init__(self, *, num_classes: int, channels: int, capacity: int = 2000, keep_empty: bool = False) -> None:
        super().__init__()
        self.capacity, self.keep_empty = capacity, keep_empty
        self.register_buffer("prototypes", torch.zeros(num_classes, capacity, channels))
        self.register_buffer("stored", torch.zeros(num_classes, dtype=torch.long))

    @torch.no_grad()
    def store(self, prototypes: Tensor, class_ids: Tensor) -> None:
        """Store (N, C) prototypes, oldest first, each under its class id (N,)."""
        if not len(prototypes):
            return
        kept = (prototypes.abs().amax(1) > 0) | self.keep_empty
        classes = class_ids - 1
        same = (classes[:, None] == classes[None, :]) & kept[None, :]
        rank = same.tril(-1).sum(1)  # how many of the same class come before in this call
        written = kept & (same.triu(1).sum(1) < self.capacity)  # what this very call would overwrite is not written
        place = classes * self.capacity + (self.stored[classes] + rank) % self.capacity
        # All shapes are fixed, so that a GPU is not waited for: a row that is not written repeats one that is, and
        # where none is, the row that stands at its place.
        first = written.to(torch.uint8).argmax().unsqueeze(0)  # an index of no dimension would be waited for
        place = torch.where(written, place, place[first])
        flat = self.prototypes.view(-1, self.prototypes.shape[2])
        source = torch.where(written[:, None], prototypes, prototypes[first]).to(flat.dtype)
        flat[place] = torch.where(written.any(), source, flat[place])
        self.stored.index_add_(0, classes, kept.to(self.stored.dtype))

    def of_classes(self, class_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Prototypes of the classes (N,): (N, capacity, C), and which slots are filled: (N, capacity), boolean."""
        filled = torch.arange(self.capacity, device=self.stored.device) < self.stored[class_ids - 1, None]
        return self.prototypes[class_ids - 1], filled
