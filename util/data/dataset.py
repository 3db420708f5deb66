"""Episodes on disk: files in, tensors out.

Shapes: K shots, S the side of the network's input, (H, W) an image's own size, B batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from model import IGNORE
from util.data.class_index import ClassIndex
from util.data.episodes import Episodes
from util.data.images import read_image
from util.errors import UserError

Transform = Callable[[np.ndarray, np.ndarray, int, np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""(image, class ids, the target's id, generator) -> image and class ids, (S, S)"""


class Episode(NamedTuple):
    """One episode, or with a leading B a batch of them; then ``names`` holds one entry for each.

    Images and masks are one tensor, so that a batch is pinned and copied to a GPU in one piece.
    """

    pixels: Tensor  # (1 + K, 4, S, S), uint8: the query, then its supports; red, green, blue, mask
    class_id: Tensor
    """(), int64, from 1"""
    target: Tensor  # (), uint8, the value of this class in the masks; 0 is background, 255 ignored
    names: list[str]  # files of query and supports, for messages

    @property
    def query(self) -> Tensor:
        """Return (3, S, S), uint8 RGB."""
        return self.pixels[..., 0, :3, :, :]

    @property
    def supports(self) -> Tensor:
        """Return (K, 3, S, S), uint8 RGB."""
        return self.pixels[..., 1:, :3, :, :]

    @property
    def query_mask(self) -> Tensor:
        """Return (S, S), uint8: 1 target, 0 other, 255 ignored."""
        return target_of(self.pixels[..., 0, 3, :, :], self.target[..., None, None])

    @property
    def support_masks(self) -> Tensor:
        """Return (K, S, S), uint8, as the query's."""
        return target_of(self.pixels[..., 1:, 3, :, :], self.target[..., None, None, None])

    @property
    def query_classes(self) -> Tensor:
        """Return (S, S), int64: class ids of the query, 0 background, 255 ignored."""
        mask, target = self.pixels[..., 0, 3, :, :], self.target[..., None, None]
        return torch.where(mask == target, self.class_id[..., None, None], mask.long())

    def to(self, device: torch.device) -> "Episode":
        """Copy the tensors to a device."""
        pixels, class_id, target = (x.to(device, non_blocking=True) for x in self[:3])
        return Episode(pixels, class_id, target, self.names)

    def pin_memory(self) -> "Episode":
        """Pin the tensors; the data loader calls this."""
        return Episode(self.pixels.pin_memory(), self.class_id.pin_memory(), self.target.pin_memory(), self.names)


def target_of(ids: Tensor, value: Tensor | int) -> Tensor:
    """Cut a class out of masks (..., H, W), uint8: 1 target (the given value), 0 other, 255 ignored."""
    return torch.where(ids == IGNORE, ids, (ids == value).to(ids.dtype))


def read_image_and_ids(index: ClassIndex, line: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the image (H, W, 3), uint8 RGB, and the mask (H, W), uint8, of a line; the index must still be true."""
    item = index.items[line]
    image, ids = read_image(item.image), item.read(item.mask)
    if image.shape[:2] != ids.shape:
        raise UserError(f"image {item.image} and mask {item.mask} are not the same size")
    if ids.size - np.count_nonzero(ids) != index.pixels[line, 0]:
        cache = f"{index.list_path}.index.npz"
        raise UserError(f"mask {item.mask} has changed since it was indexed; start again, or delete {cache} first")
    return image, ids


class EpisodeDataset(Dataset[Episode]):
    """Item n is episode number n; its transforms draw from a generator of their own, seeded by (seed, n, image)."""

    def __init__(self, sampler: Episodes, *, transform: Transform) -> None:
        self.sampler, self.transform = sampler, transform

    def __getitem__(self, index: int) -> Episode:
        files = self.sampler(index)
        lines = (files.query, *files.supports)
        items = [self.sampler.index.items[line] for line in lines]
        target = items[0].value_of(files.class_id)
        pixels = []
        for position, line in enumerate(lines):
            rng = np.random.default_rng([self.sampler.seed, 2, index, position])
            image, ids = self.transform(*read_image_and_ids(self.sampler.index, line), target, rng)
            pixels.append(np.stack([*image.transpose(2, 0, 1), ids]))
        return Episode(
            pixels=torch.from_numpy(np.stack(pixels)),
            class_id=torch.tensor(files.class_id),
            target=torch.tensor(target, dtype=torch.uint8),
            names=[f"query {items[0].image}, supports {', '.join(str(item.image) for item in items[1:])}"],
        )


def collate(episodes: list[Episode]) -> Episode:
    """Make a batch of episodes."""
    pixels, class_id, target = (default_collate([episode[n] for episode in episodes]) for n in range(3))
    return Episode(pixels, class_id, target, [name for episode in episodes for name in episode.names])
