"""Episodes on disk: files in, tensors out.

Shapes: K shots, S the side of the network's input, (H, W) the query's own size, B batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from model import IGNORE
from util.data.class_index import Item
from util.data.episodes import Episodes
from util.data.images import read_image
from util.data.transforms import fit
from util.errors import UserError

TARGET = np.zeros(256, np.uint8)
TARGET[[1, IGNORE]] = 1, IGNORE

Transform = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


class Episode(NamedTuple):
    """One episode, or with a leading B a batch of them; then ``names`` holds one entry an episode.

    All pictures and masks are one block of memory, so that a batch is pinned and copied to a GPU in one piece.
    """

    pixels: Tensor
    """(1 + K, P, S, S), uint8: the query, then its supports; planes red, green, blue, mask, and with P = 5 classes"""
    class_id: Tensor
    """(), int64, from 1"""
    names: list[str]
    """files of query and supports, for messages"""

    @property
    def query(self) -> Tensor:
        """Return (3, S, S), uint8 RGB."""
        return self.pixels[..., 0, :3, :, :]

    @property
    def query_mask(self) -> Tensor:
        """Return (S, S), uint8: 1 target, 0 other, 255 ignored."""
        return self.pixels[..., 0, 3, :, :]

    @property
    def supports(self) -> Tensor:
        """Return (K, 3, S, S), uint8 RGB."""
        return self.pixels[..., 1:, :3, :, :]

    @property
    def support_masks(self) -> Tensor:
        """Return (K, S, S), uint8, as the query's."""
        return self.pixels[..., 1:, 3, :, :]

    @property
    def query_classes(self) -> Tensor | None:
        """Return (S, S), uint8: class ids of the query, 0 background, 255 ignored; None where they were not read."""
        return self.pixels[..., 0, 4, :, :] if self.pixels.shape[-3] == 5 else None

    def to(self, device: torch.device) -> "Episode":
        """Copy the tensors to a device."""
        return Episode(
            self.pixels.to(device, non_blocking=True), self.class_id.to(device, non_blocking=True), self.names
        )

    def pin_memory(self) -> "Episode":
        """Pin the tensors; the data loader calls this."""
        return Episode(self.pixels.pin_memory(), self.class_id.pin_memory(), self.names)


class EpisodeDataset(Dataset[Episode]):
    """Item n is episode number n; its transforms draw from a generator of their own, seeded by (seed, n, image).

    Args:
        transform: (image, mask, generator) -> the same, (S, S).
        classes: whether episodes have the plane of class ids.
    """

    def __init__(self, sampler: Episodes, *, transform: Transform, classes: bool = False) -> None:
        self.sampler, self.transform, self.classes = sampler, transform, classes

    def __getitem__(self, number: int) -> Episode:
        files = self.sampler(number)
        items = [self.sampler.index.items[i] for i in (files.query, *files.supports)]
        pictures = []
        for place, item in enumerate(items):
            image, mask = _read_swapped(item, files.class_id)
            rng = np.random.default_rng([self.sampler.seed, 2, number, place])
            image, mask = self.transform(image, mask, rng)
            classes = [_classes_of(item, mask, files.class_id)] if self.classes else []
            pictures.append(np.stack([*image.transpose(2, 0, 1), _target_of(mask), *classes]))
        return Episode(
            pixels=torch.from_numpy(np.stack(pictures)),
            class_id=torch.tensor(files.class_id),
            names=[f"query {items[0].image}, supports {', '.join(str(item.image) for item in items[1:])}"],
        )


class ImageBatch(NamedTuple):
    """N images of an evaluation, each with its mask of one class."""

    places: list[int]
    """the images' places in the list"""
    images: Tensor
    """(N, 3, S, S), uint8 RGB; one image has no N"""
    masks: Tensor
    """(N, S, S), uint8, likewise: 1 target, 0 other, 255 ignored"""
    ground_truths: list[Tensor]
    """the masks at their own size, (H, W), uint8"""

    def __reduce__(self) -> tuple[Any, ...]:
        """Hand masks over as bytes: they are kept for a round, and each in shared memory holds a file descriptor."""
        return _image_batch, (self.places, self.images, self.masks, [mask.numpy() for mask in self.ground_truths])

    def pin_memory(self) -> "ImageBatch":
        """Pin the tensors; the data loader calls this."""
        ground_truths = [mask.pin_memory() for mask in self.ground_truths]
        return ImageBatch(self.places, self.images.pin_memory(), self.masks.pin_memory(), ground_truths)


def _image_batch(places: list[int], images: Tensor, masks: Tensor, ground_truths: list[np.ndarray]) -> ImageBatch:
    return ImageBatch(places, images, masks, [torch.from_numpy(mask) for mask in ground_truths])


class ImageDataset(Dataset[ImageBatch]):
    """Item (place, class id) is that image of the list as an evaluation sees it, with its mask of that class."""

    def __init__(self, items: Sequence[Item], size: int) -> None:
        self.items, self.size = items, size

    def __getitem__(self, key: tuple[int, int]) -> ImageBatch:
        place, class_id = key
        image, mask = read_pair(self.items[place], class_id)
        fitted, fitted_mask = fit(image, mask, self.size)
        picture = torch.from_numpy(fitted.transpose(2, 0, 1).copy())
        return ImageBatch([place], picture, torch.from_numpy(fitted_mask), [torch.from_numpy(mask)])


Join = Callable[[list[Tensor]], Tensor]


def collate_images(images: list[ImageBatch], join: Join = default_collate) -> ImageBatch:
    """Make a batch of images; ``join`` stacks tensors, by default into shared memory where a worker calls it."""
    return ImageBatch(
        places=[place for image in images for place in image.places],
        images=join([image.images for image in images]),
        masks=join([image.masks for image in images]),
        ground_truths=[mask for image in images for mask in image.ground_truths],
    )


def read_pair(item: Item, class_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Read an image and its mask of one class: 1 target, 0 other, 255 ignored."""
    image, classes = _read_swapped(item, class_id)
    return image, _target_of(classes)


def _read_swapped(item: Item, class_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Read an image and, by :func:`read_swapped_mask`, its mask."""
    image, mask = read_image(item.image), read_swapped_mask(item, class_id)
    if image.shape[:2] != mask.shape:
        raise UserError(f"image {item.image} and mask {item.mask} are not the same size")
    return image, mask


def read_swapped_mask(item: Item, class_id: int) -> np.ndarray:
    """Read a mask's class ids, of which 1 and ``class_id`` change places, so that transforms find the target as 1.

    In the mask of an item that carries its class, 1 is the target from the beginning; of another class it is 2.
    """
    values = item.read(item.mask)
    if item.class_id is None:
        return _swapped(values, class_id)
    return values if item.class_id == class_id else np.where(values == 1, np.uint8(2), values)


def _swapped(classes: np.ndarray, class_id: int) -> np.ndarray:
    exchange = np.arange(256, dtype=np.uint8)
    exchange[[1, class_id]] = class_id, 1
    return cv2.LUT(classes, exchange)


def _classes_of(item: Item, swapped: np.ndarray, class_id: int) -> np.ndarray:
    """Return the class ids of a mask that :func:`read_swapped_mask` has read."""
    if item.class_id is None:
        return _swapped(swapped, class_id)
    return np.where(swapped == 1, np.uint8(item.class_id), swapped)


def _target_of(swapped: np.ndarray) -> np.ndarray:
    """Turn swapped class ids into 1 target, 0 other, 255 ignored."""
    return cv2.LUT(swapped, TARGET)


def collate(episodes: list[Episode], join: Join = default_collate) -> Episode:
    """Make a batch of episodes; ``join`` is as for :func:`collate_images`."""
    return Episode(
        pixels=join([episode.pixels for episode in episodes]),
        class_id=join([episode.class_id for episode in episodes]),
        names=[name for episode in episodes for name in episode.names],
    )
