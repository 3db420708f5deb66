"""Episodes on disk: files in, tensors out.

Shapes: K shots, S the side of the network's input, (H, W) the query's own size, B batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from model import IGNORE
from util.data.class_index import Item
from util.data.episodes import Episodes
from util.data.images import read_image
from util.data.transforms import fit
from util.errors import UserError

Transform = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


class Episode(NamedTuple):
    """One episode, or with a leading B a batch of them; then ``truths`` and ``names`` hold one entry an episode."""

    query: Tensor
    """(3, S, S), uint8 RGB"""
    query_mask: Tensor
    """(S, S), uint8: 1 target, 0 other, 255 ignored"""
    supports: Tensor
    """(K, 3, S, S), uint8 RGB"""
    support_masks: Tensor
    """(K, S, S), uint8, likewise"""
    query_classes: Tensor
    """(S, S), uint8: class ids of the query's pixels, 0 background, 255 ignored"""
    class_id: Tensor
    """(), int64, from 1"""
    truths: list[Tensor]
    """the query's mask at its own size, (H, W), uint8"""
    names: list[str]
    """files of query and supports, for messages"""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Episode":
        """The same with every tensor changed."""
        return Episode(
            change(self.query),
            change(self.query_mask),
            change(self.supports),
            change(self.support_masks),
            change(self.query_classes),
            change(self.class_id),
            [change(truth) for truth in self.truths],
            self.names,
        )

    def to(self, device: torch.device) -> "Episode":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Episode":
        """Called by the data loader."""
        return self.map(lambda tensor: tensor.pin_memory())


class EpisodeDataset(Dataset[Episode]):
    """Item n is episode number n; its transforms draw from a generator of their own, seeded by (seed, n, image).

    Args:
        transform: (image, mask, generator) -> the same, (S, S).
    """

    def __init__(self, sampler: Episodes, *, transform: Transform) -> None:
        self.sampler, self.transform = sampler, transform

    def __getitem__(self, number: int) -> Episode:
        files = self.sampler(number)
        items = [self.sampler.index.items[i] for i in (files.query, *files.supports)]
        pairs = [_read_swapped(item, files.class_id) for item in items]
        images, masks = zip(
            *(
                self.transform(image, mask, np.random.default_rng([self.sampler.seed, 2, number, place]))
                for place, (image, mask) in enumerate(pairs)
            ),
            strict=True,
        )
        image_tensor = torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())
        mask_tensor = torch.from_numpy(np.stack([_target_of(mask) for mask in masks]))
        return Episode(
            query=image_tensor[0],
            query_mask=mask_tensor[0],
            supports=image_tensor[1:],
            support_masks=mask_tensor[1:],
            query_classes=torch.from_numpy(_swapped(masks[0], files.class_id)),
            class_id=torch.tensor(files.class_id),
            truths=[torch.from_numpy(_target_of(pairs[0][1]))],
            names=[f"query {items[0].image}, supports {', '.join(str(item.image) for item in items[1:])}"],
        )


class ImageBatch(NamedTuple):
    """N images of an evaluation, each with its mask of one class."""

    places: list[int]
    """in the list"""
    images: Tensor
    """(N, 3, S, S), uint8 RGB"""
    masks: Tensor
    """(N, S, S), uint8: 1 target, 0 other, 255 ignored"""
    truths: list[Tensor]
    """the masks at their own size, (H, W), uint8"""

    def pin_memory(self) -> "ImageBatch":
        """Called by the data loader."""
        truths = [truth.pin_memory() for truth in self.truths]
        return ImageBatch(self.places, self.images.pin_memory(), self.masks.pin_memory(), truths)


class ImageDataset(Dataset[ImageBatch]):
    """Item (place, class id) is that image of the list as an evaluation sees it, with its mask of that class."""

    def __init__(self, items: Sequence[Item], size: int) -> None:
        self.items, self.size = items, size

    def __getitem__(self, key: tuple[int, int]) -> ImageBatch:
        place, class_id = key
        image, mask = read_pair(self.items[place], class_id)
        fitted, fitted_mask = fit(image, mask, self.size)
        picture = torch.from_numpy(fitted.transpose(2, 0, 1).copy())
        return ImageBatch([place], picture[None], torch.from_numpy(fitted_mask)[None], [torch.from_numpy(mask)])


def collate_images(images: list[ImageBatch]) -> ImageBatch:
    """Several batches as one."""
    return ImageBatch(
        places=[place for image in images for place in image.places],
        images=torch.cat([image.images for image in images]),
        masks=torch.cat([image.masks for image in images]),
        truths=[truth for image in images for truth in image.truths],
    )


def read_pair(item: Item, class_id: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask of one class: 1 target, 0 other, 255 ignored."""
    image, classes = _read_swapped(item, class_id)
    return image, _target_of(classes)


def _read_swapped(item: Item, class_id: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask as :func:`read_swapped_mask` gives it."""
    image, mask = read_image(item.image), read_swapped_mask(item, class_id)
    if image.shape[:2] != mask.shape:
        raise UserError(f"image {item.image} and mask {item.mask} are not the same size")
    return image, mask


def read_swapped_mask(item: Item, class_id: int) -> np.ndarray:
    """A mask's class ids, of which 1 and ``class_id`` have changed places: 1 is the target for transforms.

    In the mask of an item that carries its class, 1 is the target from the beginning; of another class it is 2.
    """
    values = item.read(item.mask)
    if item.class_id is None:
        return _swapped(values, class_id)
    return values if item.class_id == class_id else np.where(values == 1, np.uint8(2), values)


def _swapped(classes: np.ndarray, class_id: int) -> np.ndarray:
    exchange = np.arange(256, dtype=np.uint8)
    exchange[[1, class_id]] = class_id, 1
    return exchange[classes]


def _target_of(swapped: np.ndarray) -> np.ndarray:
    """Swapped class ids -> 1 target, 0 other, 255 ignored."""
    return np.where(swapped == IGNORE, IGNORE, swapped == 1).astype(np.uint8)


def collate(episodes: list[Episode]) -> Episode:
    """Stack episodes into a batch."""
    return Episode(
        query=torch.stack([episode.query for episode in episodes]),
        query_mask=torch.stack([episode.query_mask for episode in episodes]),
        supports=torch.stack([episode.supports for episode in episodes]),
        support_masks=torch.stack([episode.support_masks for episode in episodes]),
        query_classes=torch.stack([episode.query_classes for episode in episodes]),
        class_id=torch.stack([episode.class_id for episode in episodes]),
        truths=[truth for episode in episodes for truth in episode.truths],
        names=[name for episode in episodes for name in episode.names],
    )
