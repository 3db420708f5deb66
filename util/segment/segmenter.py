"""Segment your own things: a checkpoint, or none, a few pictures with masks, and any picture.

    segmenter = NTRESegmenter.from_checkpoint("runs/.../best.pt")
    segmenter = NTRESegmenter.training_free()                # ours, not the paper's: see model/training_free.py
    result = segmenter.segment(supports, masks, query)       # one or several supports, each with its mask

    target = segmenter.encode(supports, masks)               # once, for many queries
    for query in queries:
        result = segmenter.segment_encoded(target, query)

Pictures are numpy, RGB (H, W, 3) of uint8, or Pillow in any 8-bit mode; their EXIF orientation is not looked at. Masks
are numpy (H, W) or Pillow: boolean, 0 and 1, 0 and 255, the alpha of a picture, or class ids with ``class_id``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model import IGNORE
from model.ntrenet import NTRENet, QueryEncoding, SupportEncoding, join_shots
from model.ops import resize
from model.training_free import (
    Described,
    TrainingFree,
    build_training_free,
    describe_support,
    join,
    target_score,
)
from util.config import Config
from util.data.synthetic import CLASS_NAMES
from util.data.transforms import fit, normalize, to_original
from util.engine.build import Hardware, build_saved_model, find_hardware
from util.engine.checkpoint import load_checkpoint, saved_config
from util.errors import UserError
from util.segment.edges import sharp_mask
from util.segment.pictures import as_rgb, mask_values, target_mask

DEFAULT_BACKBONE = "efficientnet_lite0"
"""of training-free segmentation: pip brings its weights"""
AnyPicture = np.ndarray | Image.Image
Q = TypeVar("Q")
"""what is read from a query"""
T = TypeVar("T")
"""what is known of a target"""


class Segmentation(NamedTuple):
    """Everything at the query's own size (H, W)."""

    mask: np.ndarray
    """boolean: where the probability is above the threshold, its border on the picture's edges where asked for"""
    probability: np.ndarray
    """of the target, y^q; this map and the others are float32 in [0, 1]"""
    prior: np.ndarray | None = None
    """C_p, similarity to the supports before any learning; None without a network"""
    bg: np.ndarray | None = None
    """y_BG^q, probability of background; None for a network without BGEM"""
    distractor: np.ndarray | None = None
    """Y_DO^q, distracting objects, 0 and 1 but for interpolation; None for a network without DOEM"""


class EncodedQuery(NamedTuple, Generic[Q]):
    """A query's features, for segmenting several targets in it."""

    features: Q
    pixels: np.ndarray
    """the picture, RGB (H, W, 3) uint8"""


class Segmenter(ABC, Generic[Q, T]):
    """Pictures and masks in, masks and maps out; how is for the subclasses to say."""

    threshold = 0.5
    """of the probability, where none is given"""
    maps: tuple[str, ...] = ()
    """names of the maps that a segmentation has beside the probability"""
    about: str
    """what it is and what it was trained on, in a sentence"""

    def segment(
        self,
        supports: AnyPicture | Sequence[AnyPicture],
        masks: AnyPicture | Sequence[AnyPicture],
        query: AnyPicture,
        class_id: int | None = None,
        *,
        threshold: float | None = None,
        edges: bool = False,
    ) -> Segmentation:
        """Find in ``query`` what the masks show in the supports; see :meth:`encode` and :meth:`segment_encoded`."""
        target = self.encode(supports, masks, class_id)
        return self.segment_encoded(target, query, threshold=threshold, edges=edges)

    def encode(
        self,
        supports: AnyPicture | Sequence[AnyPicture],
        masks: AnyPicture | Sequence[AnyPicture],
        class_id: int | None = None,
    ) -> T:
        """Read what the supports show of the target, any number of them, in any order.

        Args:
            class_id: which value of the masks is the target, where they hold class ids (255 is ignored then).
        Raises:
            UserError: naming the support; see util/segment/pictures.py, or its mask shows nothing, or too little to be
                seen.
        """
        pictures, shown = _as_list(supports), _as_list(masks)
        count = len(pictures)
        if count != len(shown) or count == 0:
            raise UserError(f"each support needs a mask: there are {count} supports and {len(shown)} masks")
        names = [f"support {n} of {count}" for n in range(1, count + 1)] if count > 1 else ["the support"]
        pairs = [
            self._fit(*_checked(picture, mask, class_id, name))
            for picture, mask, name in zip(pictures, shown, names, strict=True)
        ]
        return self.join([self._encode_support(*pair, name) for pair, name in zip(pairs, names, strict=True)])

    @torch.inference_mode()
    def encode_query(self, query: AnyPicture) -> EncodedQuery[Q]:
        """Read a query once, to segment several targets in it with :meth:`segment_encoded`."""
        pixels = as_rgb(query, "the query")
        fitted, _ = self._fit(pixels, np.zeros(pixels.shape[:2], np.uint8))
        return EncodedQuery(self._read(fitted), pixels)

    @torch.inference_mode()
    def segment_encoded(
        self,
        target: T,
        query: AnyPicture | EncodedQuery[Q],
        *,
        threshold: float | None = None,
        edges: bool = False,
    ) -> Segmentation:
        """Find an encoded target in a picture, encoded or not.

        Args:
            threshold: of the probability; by default the segmenter's own.
            edges: draw the mask's border along the picture's edges, see util/segment/edges.py; the maps stay.
        """
        features, pixels = query if isinstance(query, EncodedQuery) else self.encode_query(query)
        maps = self._maps(target, features, (pixels.shape[0], pixels.shape[1]))
        at = self.threshold if threshold is None else threshold
        probability = maps["probability"]
        return Segmentation(sharp_mask(probability, pixels, at) if edges else probability > at, **maps)

    @abstractmethod
    def join(self, targets: Sequence[T]) -> T:
        """Join targets of one support each into one target."""

    @abstractmethod
    def _fit(self, image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bring a picture (H, W, 3) and its mask (H, W) of 1 target, 0 other, 255 ignored to the size that is read."""

    @abstractmethod
    def _encode_support(self, image: np.ndarray, mask: np.ndarray, name: str) -> T:
        """Read one fitted support; one at a time, so that memory does not grow with their number."""

    @abstractmethod
    def _read(self, image: np.ndarray) -> Q:
        """Read a fitted query."""

    @abstractmethod
    def _maps(self, target: T, features: Q, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Return 'probability' and the ``maps`` by name, each (H, W)."""


class NTRESegmenter(Segmenter[QueryEncoding, SupportEncoding]):
    """A trained network, ready for pictures."""

    def __init__(self, model: NTRENet, config: Config, hardware: Hardware) -> None:
        self.model = model.eval().to(hardware.device)
        self.config = config
        self.hardware = hardware
        options = config.model
        there = {"prior": True, "bg": options.bgem, "distractor": options.doem}
        self.maps = tuple(name for name, is_there in there.items() if is_there)
        data = config.data
        self.about = (
            f"a network on {options.backbone}, trained on {data.dataset}, fold {data.fold}, at {data.image_size} pixels"
        )
        if data.classes == list(CLASS_NAMES):
            self.about += " (drawings, not photos: on photos expect little of it, and less than without a checkpoint)"

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str = "auto", precision: str = "auto") -> "NTRESegmenter":
        """Read what train.py wrote; the checkpoint says itself which network it belongs to.

        Args:
            device: 'auto', 'cpu' or 'cuda'
            precision: 'auto', 'fp32', 'bf16' or 'fp16'
        Raises:
            UserError: no usable checkpoint, or a device that is not there.
        """
        hardware = find_hardware(device, precision)
        checkpoint = load_checkpoint(Path(path))
        config = saved_config(checkpoint, Path(path))
        segmenter = cls(build_saved_model(config, checkpoint, Path(path)), config, hardware)
        segmenter.threshold = checkpoint.get("threshold", 0.5)
        return segmenter

    @staticmethod
    def training_free(
        backbone: str = DEFAULT_BACKBONE, device: str = "auto", precision: str = "auto", weights: str = "imagenet"
    ) -> "TrainingFreeSegmenter":
        """Build a :class:`TrainingFreeSegmenter`; no checkpoint. Arguments are as in :meth:`from_checkpoint`.

        Args:
            backbone: whose ImageNet weights are there, or can be fetched; EfficientNet-Lite0's come with pip.
            weights: 'imagenet', or a file.
        """
        hardware = find_hardware(device, precision)
        return TrainingFreeSegmenter(build_training_free(backbone, weights=weights), backbone, hardware)

    def join(self, targets: Sequence[SupportEncoding]) -> SupportEncoding:
        """Make one encoding of several supports."""
        return join_shots(targets)

    def _fit(self, image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return fit(image, labels, self.config.data.image_size)

    @torch.inference_mode()
    def _encode_support(self, image: np.ndarray, mask: np.ndarray, name: str) -> SupportEncoding:
        labels = torch.from_numpy(mask)[None, None].to(self.hardware.device, non_blocking=True)
        with self.hardware.autocast():
            target, _ = self.model.encode_supports(_input(image, self.hardware)[None], labels)
        if not target.high.any():  # only positions beside the target, see model/prior.py
            side = self.config.data.image_size
            raise UserError(f"the target of {name} vanishes at the network's {side} pixels; crop the support around it")
        return target

    def _read(self, image: np.ndarray) -> QueryEncoding:
        with self.hardware.autocast():
            return self.model.encode_query(_input(image, self.hardware))

    def _maps(self, target: SupportEncoding, features: QueryEncoding, size: tuple[int, int]) -> dict[str, np.ndarray]:
        side = self.config.data.image_size
        with self.hardware.autocast():
            output = self.model.segment([features], [target], (side, side))
        maps = {
            "probability": to_original(output.logits[0].float(), *size, "exact").sigmoid()[0],
            "prior": _at_size(output.prior, side, size),
        }
        if output.query_bg_logits is not None:
            maps["bg"] = _at_size(output.query_bg_logits.float().sigmoid(), side, size)
        if output.eliminated:
            maps["distractor"] = _at_size(output.eliminated[0].do_mask, side, size)
        return dict(zip(maps, torch.stack(list(maps.values())).cpu().numpy(), strict=True))  # read at once


class TrainingFreeSegmenter(Segmenter[Tensor, Described]):
    """A frozen ImageNet backbone and no training: ours, not the paper's network; see model/training_free.py."""

    SIDE = 385
    """longer side of what the backbone sees: 8n + 1"""
    STEEPNESS = 2.0
    """the probability is the sigmoid of the score, in deviations, times this"""

    def __init__(self, model: TrainingFree, backbone: str, hardware: Hardware) -> None:
        self.model = model.to(hardware.device)
        self.hardware = hardware
        self.about = (
            f"training-free segmentation, ours and not the paper's network: ImageNet features of {backbone} at"
            f" {self.SIDE} pixels, and GrabCut where edges are asked for"
        )

    def join(self, targets: Sequence[Described]) -> Described:
        """Make one encoding of several supports."""
        return join(targets)

    def _fit(self, image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn the mask into (2, h, w), shares of target and of neither target nor ignored: no pixel is lost."""
        height, width = image.shape[:2]
        h, w = (max(1, round(side * (self.SIDE - 1) / max(height, width) / 8)) * 8 + 1 for side in (height, width))
        how = cv2.INTER_AREA if max(height, width) > self.SIDE else cv2.INTER_LINEAR
        layers = (labels == 1, (labels != 1) & (labels != IGNORE))
        shares = [cv2.resize(layer.astype(np.float32), (w, h), interpolation=how) for layer in layers]
        return cv2.resize(image, (w, h), interpolation=how), np.stack(shares)

    @torch.inference_mode()
    def _encode_support(self, image: np.ndarray, mask: np.ndarray, name: str) -> Described:
        with self.hardware.autocast():
            feature = self.model.describe(_input(image, self.hardware)[0])
        return describe_support(feature, torch.from_numpy(mask).to(self.hardware.device))

    def _read(self, image: np.ndarray) -> Tensor:
        with self.hardware.autocast():
            return self.model.describe(_input(image, self.hardware)[0])

    def _maps(self, target: Described, features: Tensor, size: tuple[int, int]) -> dict[str, np.ndarray]:
        score = target_score(features, target)[None, None]
        probability = (self.STEEPNESS * resize(score, size)).sigmoid()
        return {"probability": probability[0, 0].cpu().numpy()}


def load_segmenter(checkpoint: Path | None, backbone: str | None, device: str) -> Segmenter[Any, Any]:
    """Load a checkpoint's network; without one, build training-free segmentation on a backbone."""
    if checkpoint is None:
        return NTRESegmenter.training_free(backbone or DEFAULT_BACKBONE, device)
    return NTRESegmenter.from_checkpoint(checkpoint, device)


def _checked(picture: AnyPicture, mask: AnyPicture, class_id: int | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a support's picture, and its mask of 1 target, 0 other, 255 ignored."""
    image = as_rgb(picture, name)
    values = mask_values(mask, f"the mask of {name}")
    if values.shape != image.shape[:2]:
        (h, w), (height, width) = values.shape, image.shape[:2]
        raise UserError(f"the mask of {name} is {w} x {h}, its picture {width} x {height}; make them the same")
    labels = target_mask(values, class_id, f"the mask of {name}")
    if not (labels == 1).any():
        held = ", ".join(str(value) for value in np.unique(values).tolist()[:6])
        which = "nothing" if class_id is None else f"nothing of class {class_id} (it holds {held})"
        raise UserError(f"the mask of {name} shows {which}; give another, or leave that support out")
    return image, labels


def _input(image: np.ndarray, hardware: Hardware) -> Tensor:
    """Normalise RGB (h, w, 3) uint8: (1, 3, h, w)."""
    return normalize(torch.from_numpy(image).to(hardware.device, non_blocking=True).permute(2, 0, 1)[None])


def _at_size(values: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """Bring a map (1, 1, h, w) of [0, 1] from the network to the picture's (H, W)."""
    square = resize(values.float(), (side, side))[0]
    return to_original(square, *size, "exact")[0].clamp_(0, 1)


def _as_list(given: AnyPicture | Sequence[AnyPicture]) -> list[AnyPicture]:
    return list(given) if isinstance(given, list | tuple) else [given]  # type: ignore[list-item]
