"""The frozen backbone: an ImageNet network, cut into a stem and four stages. The networks stand in model/backbones/."""

import copy
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.backbones import BACKBONES
from model.ops import resize
from model.parallel import log_mean
from model.weights import WeightsInfo, load_exactly, read_weights


class Features(NamedTuple):
    """What the network reads from N images."""

    middle: Tensor
    """(N, middle_channels, h, w): stage 3 (+) stage 2, in this order as in PFENet"""
    stage3: Tensor
    """(N, C3, h, w): the input of stage 4"""


class Network(NamedTuple):
    """What a file of model/backbones/ tells of an ImageNet network."""

    build: Callable[[bool], nn.Module]
    """whether the stem is deep -> the network, with the parameter names of its weights file"""
    stages: Callable[..., list[nn.Module]]
    """the network -> its stem and stages 1 to 4"""
    middle_channels: int
    """channels of stages 2 and 3 together"""
    imagenet: Callable[[Path], Path]
    """a folder -> the file of its ImageNet weights, fetched into the folder if it is not there"""
    unused: tuple[str, ...]
    """prefixes of what that file holds beyond the stages"""
    has_deep_stem: Callable[[dict[str, Tensor]], bool] = lambda state: False
    """whether a weights file is of a network with a deep stem"""
    last: Callable[[dict[str, Tensor] | None], nn.Module] | None = None
    """weights, or None for random ones -> the blocks behind stage 4, which training-free segmentation alone reads"""


class Backbone(nn.Module):
    """A network that stays as it is: it has no gradients, and batch norm is always in eval mode (``train()`` included).

    Below float32 (autocast) a copy of the stages is run whose weights are in that precision, made anew whenever
    weights are loaded or moved.
    """

    middle_scale: Tensor
    """() what middle features are multiplied by; 1 until :meth:`measure_scale`, which training calls once"""

    def __init__(self, *, stages: list[nn.Module], middle_channels: int) -> None:
        super().__init__()
        self.stem, self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.middle_channels = middle_channels
        self.register_buffer("middle_scale", torch.ones(()))
        self.requires_grad_(False)
        self.eval()
        self._lower: dict[torch.dtype, list[nn.Module]] = {}
        self.register_load_state_dict_post_hook(lambda module, _: module._lower.clear())

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode, whatever is asked for: the backbone is frozen."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Backbone":
        self._lower.clear()
        return super()._apply(fn, recurse)

    def fold_batch_norm(self) -> None:
        """Fold every batch norm into the convolution before it, for good: exact up to rounding, and faster.

        What is folded has other parameter names than the published weights: load those before.
        """
        fold_batch_norm(self)
        self._lower.clear()

    def _stages(self, like: Tensor) -> list[nn.Module]:
        """The stages in the precision in which ``like`` is to be computed."""
        stages = [self.stem, self.stage1, self.stage2, self.stage3, self.stage4]
        kind = like.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return stages
        dtype = torch.get_autocast_dtype(kind)
        if dtype not in self._lower:
            with torch.inference_mode(False):  # made in an evaluation, they serve training as well
                self._lower[dtype] = [copy.deepcopy(stage).to(dtype) for stage in stages]
        return self._lower[dtype]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Read normalised RGB images (N, 3, H, W)."""
        stem, stage1, stage2, stage3, _ = self._stages(images)
        x = images.to(next(stem.parameters()).dtype, memory_format=torch.channels_last)
        second = stage2(stage1(stem(x)))
        third = stage3(second)
        second = resize(second, (third.shape[-2], third.shape[-1]))
        return Features(torch.cat([third, second], 1) * self.middle_scale, third)

    @torch.no_grad()
    def measure_scale(self, images: Tensor) -> None:
        """Set ``middle_scale`` so that the middle features of these images (N, 3, H, W) have a mean square of 1.

        He's initialisation keeps that mean square through the head, whatever the backbone: one learning rate then fits
        all of them. The scale is part of the checkpoint, and what was trained with it keeps it.
        """
        self.middle_scale.fill_(1)
        mean_square = log_mean(self(images).middle.float().square().mean())
        self.middle_scale.copy_(mean_square.clamp_min(1e-12).rsqrt())

    @torch.no_grad()
    def high(self, stage3: Tensor) -> Tensor:
        """Apply stage 4 to (N, C3, h, w). A CPU gains nothing from a batch, so its memory is that of one image."""
        stage4 = self._stages(stage3)[4]
        x = stage3.to(next(stage4.parameters()).dtype)
        return stage4(x) if x.is_cuda or len(x) == 1 else torch.cat([stage4(one) for one in x.split(1)])

    @torch.no_grad()
    def high_within(self, stage3: Tensor, rows: slice, columns: slice) -> Tensor:
        """Compute ``high(stage3)[:, :, rows, columns]`` exactly, from no more positions than these depend on.

        Before each block the map is cut to the window and at least what the blocks still to come reach beyond it.
        What a block's padding spoils at a cut lies outside the next one.
        """
        stage4 = self._stages(stage3)[4]
        blocks = list(stage4.children())
        reach = sum(map(_reach, blocks))
        height, width = stage3.shape[-2:]
        x, held = stage3.to(next(stage4.parameters()).dtype), (slice(0, height), slice(0, width))
        for block in blocks:
            cut = _around(rows, reach, held[0], height), _around(columns, reach, held[1], width)
            x, held = block(_cut(x, *cut, held)), cut
            reach -= _reach(block)
        return _cut(x, rows, columns, held)


def _reach(block: nn.Module) -> int:
    """How many positions away an output of a block (stride 1) still depends on its input."""
    return sum(m.dilation[0] * (m.kernel_size[0] // 2) for m in block.modules() if isinstance(m, nn.Conv2d))


def _around(wanted: slice, reach: int, held: slice, length: int) -> slice:
    """``wanted`` and ``reach`` on both sides within ``held``, made longer to one of eight lengths.

    oneDNN compiles a convolution anew for each size of its input and keeps a thousand of them, a megabyte or two each.
    """
    start, stop = max(wanted.start - reach, 0), min(wanted.stop + reach, length)
    eighth = -(-length // 8)
    size = min(-(-(stop - start) // eighth) * eighth, held.stop - held.start)
    start = min(start, held.stop - size)
    return slice(start, start + size)


def _cut(x: Tensor, rows: slice, columns: slice, held: tuple[slice, slice]) -> Tensor:
    """Rows and columns of a map, of which ``x`` holds a part."""
    top, left = held[0].start, held[1].start
    return x[:, :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


def fold_batch_norm(module: nn.Module) -> None:
    """Fold in place: a convolution is followed by its batch norm in the order in which modules are registered."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
            fused = fuse_conv_bn_eval(before[1], child).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            setattr(module, before[0], fused.requires_grad_(False))
            setattr(module, name, nn.Identity())
        else:
            fold_batch_norm(child)
        before = name, child


def describe(name: str) -> Network:
    """Look a backbone up in ``BACKBONES``.

    Raises:
        ValueError: it is not there.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone '{name}'; known are {', '.join(BACKBONES)}")
    described: Network = import_module(f"model.backbones.{BACKBONES[name].file}").describe(name)
    return described


def build_backbone(
    name: str, *, weights: str = "imagenet", weights_dir: Path = Path("initmodel"), deep_stem: bool = False
) -> tuple[Backbone, WeightsInfo]:
    """Build a backbone and load its weights.

    Args:
        name: one of ``BACKBONES``.
        weights: 'imagenet' (the network's own: torchvision's file in ``weights_dir``, fetched if absent, or a pip
            package), 'random', or the path of a file. A ResNet file with a deep stem is recognised.
        deep_stem: the stem of a ResNet with random weights (a checkpoint fills them in).
    Raises:
        WeightsError: see :mod:`model.weights`.
        ValueError: an unknown name.
    """
    described = describe(name)
    if weights == "random":
        network = described.build(deep_stem)
        info = WeightsInfo("random", "deep" if deep_stem else "standard", "")
    else:
        path = described.imagenet(weights_dir) if weights == "imagenet" else Path(weights)
        state, digest = read_weights(path)
        deep_stem = described.has_deep_stem(state)
        network = described.build(deep_stem)
        load_exactly(network, state, source=str(path), ignore=described.unused)
        info = WeightsInfo(str(path), "deep" if deep_stem else "standard", digest)
    return Backbone(stages=described.stages(network), middle_channels=described.middle_channels), info
