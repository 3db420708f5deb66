"""Segment your own things: a checkpoint, a few pictures with masks, and any picture.

    segmenter = NTRESegmenter.from_checkpoint("runs/.../best.pt")
    result = segmenter.segment(supports, masks, query)       # one or several supports, each with its mask

    target = segmenter.encode(supports, masks)               # once, for many queries
    for query in queries:
        result = segmenter.segment_encoded(target, query)

Pictures are numpy, RGB (H, W, 3) of uint8, or Pillow in any 8-bit mode; their EXIF orientation is not looked at. Masks
are numpy (H, W) or Pillow: boolean, 0 and 1, 0 and 255, the alpha of a picture, or class ids with ``class_id``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.ntrenet import NTRENet, Query, Target, join_shots
from model.ops import resize
from util.build import Hardware, build_saved_model, find_hardware
from util.checkpoint import load_checkpoint, saved_config
from util.config import Config
from util.errors import UserError
from util.pictures import as_rgb, mask_values, target_mask
from util.transforms import fit, normalize, to_original

AnyPicture = np.ndarray | Image.Image


class Segmentation(NamedTuple):
    """Everything at the query's own size (H, W)."""

    mask: np.ndarray
    """boolean: where the probability is above 0.5"""
    probability: np.ndarray
    """of the target, y^q; this map and the others are float32 in [0, 1]"""
    prior: np.ndarray
    """C_p, similarity to the supports before any learning"""
    bg: np.ndarray | None
    """y_BG^q, probability of background; None for a network without BGEM"""
    distractor: np.ndarray | None
    """Y_DO^q, distracting objects, 0 and 1 but for interpolation; None for a network without DOEM"""


class EncodedQuery(NamedTuple):
    """A query's features, for segmenting several targets in it."""

    features: Query
    size: tuple[int, int]
    """(H, W) of the picture"""


class NTRESegmenter:
    """A trained network, ready for pictures."""

    def __init__(self, model: NTRENet, config: Config, hardware: Hardware) -> None:
        self.model = model.eval().to(hardware.device)
        self.config = config
        self.hardware = hardware

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
        return cls(build_saved_model(config, checkpoint, Path(path)), config, hardware)

    def segment(
        self,
        supports: AnyPicture | Sequence[AnyPicture],
        masks: AnyPicture | Sequence[AnyPicture],
        query: AnyPicture,
        class_id: int | None = None,
    ) -> Segmentation:
        """Find in ``query`` what the masks show in the supports; see :meth:`encode`."""
        return self.segment_encoded(self.encode(supports, masks, class_id), query)

    def encode(
        self,
        supports: AnyPicture | Sequence[AnyPicture],
        masks: AnyPicture | Sequence[AnyPicture],
        class_id: int | None = None,
    ) -> Target:
        """What the network knows of the target from its supports, any number of them, in any order.

        Args:
            class_id: which value of the masks is the target, where they hold class ids (255 is ignored then).
        Raises:
            UserError: naming the support; see util/pictures.py, or its mask shows nothing, or too little to be seen.
        """
        pictures, shown = _as_list(supports), _as_list(masks)
        count = len(pictures)
        if count != len(shown) or count == 0:
            raise UserError(f"each support needs a mask: there are {count} supports and {len(shown)} masks")
        names = [f"support {n} of {count}" for n in range(1, count + 1)] if count > 1 else ["the support"]
        pairs = [
            self._fitted_support(picture, mask, class_id, name)
            for picture, mask, name in zip(pictures, shown, names, strict=True)
        ]
        return join_shots([self._encode_support(*pair, name) for pair, name in zip(pairs, names, strict=True)])

    @torch.inference_mode()
    def encode_query(self, query: AnyPicture) -> EncodedQuery:
        """Read a query once, to segment several targets in it with :meth:`segment_encoded`."""
        image = as_rgb(query, "the query")
        size = (image.shape[0], image.shape[1])
        fitted, _ = fit(image, np.zeros(size, np.uint8), self.config.data.image_size)
        with self.hardware.autocast():
            return EncodedQuery(self.model.encode_query(self._input(fitted)), size)

    @torch.inference_mode()
    def segment_encoded(self, target: Target, query: AnyPicture | EncodedQuery) -> Segmentation:
        """Find an encoded target in a picture, encoded or not."""
        features, size = query if isinstance(query, EncodedQuery) else self.encode_query(query)
        side = self.config.data.image_size
        with self.hardware.autocast():
            output = self.model.segment([features], [target], (side, side))
        bg_logits = output.query_bg_logits
        probability = to_original(output.logits[0].float(), *size, "exact").sigmoid()[0].cpu().numpy()
        return Segmentation(
            mask=probability > 0.5,
            probability=probability,
            prior=_at_size(output.prior, side, size),
            bg=None if bg_logits is None else _at_size(bg_logits.float().sigmoid(), side, size),
            distractor=None if output.do_mask is None else _at_size(output.do_mask, side, size),
        )

    def _fitted_support(
        self, picture: AnyPicture, mask: AnyPicture, class_id: int | None, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
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
        return fit(image, labels, self.config.data.image_size)

    @torch.inference_mode()
    def _encode_support(self, image: np.ndarray, mask: np.ndarray, name: str) -> Target:
        """One at a time: memory does not grow with the number of supports."""
        labels = torch.from_numpy(mask)[None, None].to(self.hardware.device)
        with self.hardware.autocast():
            target, _ = self.model.encode_supports(self._input(image)[None], labels)
        if target.high.shape[2] == 1:  # only the position beside the target, see model/prior.py
            side = self.config.data.image_size
            raise UserError(f"the target of {name} vanishes at the network's {side} pixels; crop the support around it")
        return target

    def _input(self, image: np.ndarray) -> Tensor:
        """RGB (S, S, 3) uint8 -> (1, 3, S, S), normalised."""
        return normalize(torch.from_numpy(image).to(self.hardware.device).permute(2, 0, 1)[None])


def _at_size(values: Tensor, side: int, size: tuple[int, int]) -> np.ndarray:
    """Map (1, 1, h, w) of [0, 1] from the network -> (H, W) of the picture."""
    square = resize(values.float(), (side, side))[0]
    return to_original(square, *size, "exact")[0].clamp_(0, 1).cpu().numpy()


def _as_list(given: AnyPicture | Sequence[AnyPicture]) -> list[AnyPicture]:
    return list(given) if isinstance(given, list | tuple) else [given]  # type: ignore[list-item]
