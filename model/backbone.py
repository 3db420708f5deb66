"""The frozen backbone, which computes features of images. The networks themselves are in model/backbones/.

The contract: ``middle`` and ``high`` map images to two feature maps of one size, ``stride`` says how much smaller they
are, and ``check_image_size`` which input sides fit. Nothing outside model/backbones/ knows what kind of network it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.backbones import BACKBONES, TIMM, require_known
from model.weights import WeightsInfo, load_exactly, read_weights


class Features(NamedTuple):
    """Features of N images."""

    middle: Tensor
    """(N, middle_channels, h, w), input of the head"""
    high: Tensor
    """(N, high_channels, h, w), compared by the prior mask; of a support, zero off the target"""


class Backbone(ABC, nn.Module):
    """A frozen network: no gradients, and batch norm always in eval mode (also after ``train()``).

    Args:
        stages: submodules by name; they give the names in the state dict.
        carried_channels: channels of ``middle`` after those of the head, which only ``high`` reads.
        stride: pixels between two positions of the feature maps.
        sides: (step, offset); an input side is valid if it is step * n + offset.
    """

    def __init__(
        self,
        stages: dict[str, nn.Module],
        *,
        middle_channels: int,
        high_channels: int,
        carried_channels: int = 0,
        stride: int,
        sides: tuple[int, int],
    ) -> None:
        super().__init__()
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.middle_channels, self.high_channels = middle_channels, high_channels
        self.carried_channels = carried_channels
        self.stride, self.sides = stride, sides
        self.requires_grad_(False)
        self.eval()

    @abstractmethod
    def middle(self, images: Tensor) -> Tensor:
        """Map normalised RGB images (N, 3, H, W) to (N, middle_channels + carried_channels, h, w)."""

    @abstractmethod
    def high(self, middle: Tensor, masks: Tensor | None = None) -> Tensor:
        """Go on from the middle features to the high ones (N, high_channels, h, w).

        Args:
            masks: of supports, (N, H, W) integer, 1 target. Everything off the target is zeroed, and as in PFENet no
                high feature depends on it, if the network allows that.
        """

    @torch.no_grad()
    def features(self, images: Tensor, masks: Tensor | None = None) -> Features:
        """Map images (N, 3, H, W) to their features; ``masks`` (N, H, W) make them the features of supports."""
        middle = self.middle(images)
        return Features(self.for_head(middle), self.high(middle, masks))

    def for_head(self, middle: Tensor) -> Tensor:
        """Leave out the channels of ``middle`` that the head does not read."""
        return middle[:, : self.middle_channels]

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode."""
        return super().train(False)

    def map_side(self, side: int) -> int:
        """Return the side of the feature maps of an image of ``side`` pixels."""
        return -(-side // self.stride)

    def check_image_size(self, side: int) -> None:
        """Raise ValueError, with the nearest valid sides, if a square image of ``side`` pixels does not fit."""
        step, offset = self.sides
        if side < step or side % step != offset:
            lower = max(side - offset, step) // step * step + offset
            raise ValueError(f"an image side of {side} does not fit the backbone: take {lower} or {lower + step}")


class Source(NamedTuple):
    """How to build a backbone and where its weights come from; a file of model/backbones/ returns one."""

    build: Callable[[bool], nn.Module]
    """whether the stem is deep -> the ImageNet network, with the parameter names of its weights file"""
    cut: Callable[[nn.Module], Backbone]
    """the network -> the backbone made from its parts"""
    imagenet: Callable[[Path], Path]
    """a folder -> the file of its ImageNet weights, fetched into the folder if it is not there"""
    unused: tuple[str, ...]
    """prefixes of entries of that file that the backbone does not use"""
    has_deep_stem: Callable[[dict[str, Tensor]], bool] = lambda state: False
    """whether a weights file belongs to a network with a deep stem"""
    renamed: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]] = lambda network, state: state
    """the network and a weights file's state dict -> the state dict with the network's parameter names"""
    fuses: bool = True
    """whether each batch norm is registered right after the convolution whose output it takes"""
    last: Callable[[dict[str, Tensor] | None], nn.Module] | None = None
    """weights, or None for random ones -> blocks after ``high`` that only training-free segmentation reads"""


def source_of(name: str) -> Source:
    """Look up a backbone of ``BACKBONES`` by name, or 'timm:NAME'."""
    file = "timm_models" if require_known(name).startswith(TIMM) else BACKBONES[name].file
    source: Source = import_module(f"model.backbones.{file}").source(name)
    return source


def build_backbone(
    name: str,
    *,
    weights: str = "imagenet",
    weights_dir: Path = Path("initmodel"),
    deep_stem: bool = False,
    fuse: bool = True,
) -> tuple[Backbone, WeightsInfo]:
    """Build a backbone and load its weights.

    Args:
        name: one of ``BACKBONES``, or 'timm:NAME'.
        weights: 'imagenet' (torchvision's file in ``weights_dir``, fetched if absent, or a pip package), 'random', or
            the path of a file. A ResNet file with a deep stem is recognised.
        deep_stem: the stem of a ResNet with random weights (a checkpoint fills them in).
        fuse: fuse batch norms into convolutions; published parameter names are lost by it.
    """
    source = source_of(name)
    if weights == "random":
        network = source.build(deep_stem)
        info = WeightsInfo("random", "deep" if deep_stem else "standard", "")
    else:
        path = source.imagenet(weights_dir) if weights == "imagenet" else Path(weights)
        state, digest = read_weights(path)
        deep_stem = source.has_deep_stem(state)
        network = source.build(deep_stem)
        load_exactly(network, source.renamed(network, state), source=str(path), ignore=source.unused)
        info = WeightsInfo(str(path), "deep" if deep_stem else "standard", digest)
    backbone = source.cut(network)
    if fuse and source.fuses:
        fuse_batch_norm(backbone)
    return backbone.to(memory_format=torch.channels_last), info  # type: ignore[call-overload]


def fuse_batch_norm(module: nn.Module) -> None:
    """Fuse every batch norm into the convolution registered before it, in place: exact up to rounding, and faster."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
            fused = fuse_conv_bn_eval(before[1], child).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            setattr(module, before[0], fused.requires_grad_(False))
            setattr(module, name, nn.Identity())
        else:
            fuse_batch_norm(child)
        before = name, child
