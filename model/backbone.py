"""Frozen ImageNet backbones, cut into a stem and four stages.

ResNets run at output stride 8: stages 3 and 4 have stride 1 and every 3x3 convolution of the stage is dilated by
2 and 4. (torchvision's ``replace_stride_with_dilation`` leaves the first block of a stage at the dilation of the
stage before; this lineage does not.) VGG-16 keeps its pools, rounded up, so its stages 3 and 4 are at stride 16
and stage 2 is resized to stage 3, as in PFENet.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.efficientnet_lite import EfficientNetLite0
from model.ops import resize
from model.parallel import log_mean
from model.torchvision_compat import import_models
from model.weights import WeightsInfo, imagenet_file, load_exactly, read_weights

UNUSED = ("fc.", "classifier.", "_fc.", "_conv_head.", "_bn1.", *(f"_blocks.{n}." for n in range(11, 16)))
"""what weights files hold beyond the stages used here: classification heads, the last blocks of EfficientNet"""


class Features(NamedTuple):
    """Features of N images."""

    middle: Tensor
    """(N, middle_channels, h, w): stage 3 (+) stage 2, in this order as in PFENet"""
    stage3: Tensor
    """(N, C3, h, w): the input of stage 4"""


class Backbone(nn.Module):
    """Frozen: no gradients, and batch norm always in eval mode (``train()`` does not reach it).

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
        """Normalised RGB images (N, 3, H, W) -> middle features and stage 3."""
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
        """Stage 4: (N, C3, h, w) -> (N, C4, h, w). A CPU gains nothing from a batch, so its memory is that of one."""
        stage4 = self._stages(stage3)[4]
        x = stage3.to(next(stage4.parameters()).dtype)
        return stage4(x) if x.is_cuda or len(x) == 1 else torch.cat([stage4(one) for one in x.split(1)])

    @torch.no_grad()
    def high_within(self, stage3: Tensor, rows: slice, columns: slice) -> Tensor:
        """``high(stage3)[:, :, rows, columns]``, exactly, from no more positions than these depend on.

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
    """In place: a convolution is followed by its batch norm in the order in which modules are registered."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
            fused = fuse_conv_bn_eval(before[1], child).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            setattr(module, before[0], fused.requires_grad_(False))
            setattr(module, name, nn.Identity())
        else:
            fold_batch_norm(child)
        before = name, child


def build_backbone(
    name: str, *, weights: str = "imagenet", weights_dir: Path = Path("initmodel"), deep_stem: bool = False
) -> tuple[Backbone, WeightsInfo]:
    """Build a backbone and load its weights.

    Args:
        name: one of ``BACKBONES``.
        weights: 'imagenet' (by name: torchvision's file in ``weights_dir``, fetched if absent, or the pip
            package), 'random', or the path of a file. A ResNet file with a deep stem is recognised.
        deep_stem: the stem of a ResNet with random weights (a checkpoint fills them in).
    Raises:
        WeightsError: see :mod:`model.weights`.
        ValueError: an unknown name.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone '{name}'; known are {', '.join(BACKBONES)}")
    if weights == "random":
        network = BACKBONES[name].network(deep_stem)
        info = WeightsInfo("random", "deep" if deep_stem else "standard", "")
    else:
        path = imagenet_file(name, weights_dir) if weights == "imagenet" else Path(weights)
        state, digest = read_weights(path)
        deep_stem = name.startswith("resnet") and state.get("conv1.weight", torch.empty(0)).shape[-2:] == (3, 3)
        network = BACKBONES[name].network(deep_stem)
        load_exactly(network, state, source=str(path), ignore=UNUSED)
        info = WeightsInfo(str(path), "deep" if deep_stem else "standard", digest)
    spec = BACKBONES[name]
    return Backbone(stages=spec.stages(network), middle_channels=spec.middle_channels), info


def _resnet(name: str, deep_stem: bool) -> nn.Module:
    net = getattr(import_models(), name)(weights=None)
    del net.fc
    if deep_stem:
        net.conv1, net.bn1 = _conv3x3(3, 64, stride=2), nn.BatchNorm2d(64)
        net.conv2, net.bn2 = _conv3x3(64, 64), nn.BatchNorm2d(64)
        net.conv3, net.bn3 = _conv3x3(64, 128), nn.BatchNorm2d(128)
        first = net.layer1[0]
        first.conv1 = nn.Conv2d(128, 64, 1, bias=False)
        first.downsample[0] = nn.Conv2d(128, 256, 1, bias=False)
    for stage, dilation in ((net.layer3, 2), (net.layer4, 4)):
        for block in stage:
            block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (dilation,) * 2, (dilation,) * 2
        stage[0].downsample[0].stride = (1, 1)
    return net


def _resnet_stages(net: nn.Module) -> list[nn.Module]:
    part = dict(net.named_children())
    stem = [part["conv1"], part["bn1"], nn.ReLU(inplace=True)]
    if "conv2" in part:
        stem += [part["conv2"], part["bn2"], nn.ReLU(inplace=True), part["conv3"], part["bn3"], nn.ReLU(inplace=True)]
    return [nn.Sequential(*stem, part["maxpool"]), *(part[f"layer{n}"] for n in (1, 2, 3, 4))]


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def _vgg16_bn(deep_stem: bool) -> nn.Module:
    net = import_models().vgg16_bn(weights=None, init_weights=False)
    del net.classifier
    for layer in net.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    return net


def _vgg_stages(net: nn.Module) -> list[nn.Module]:
    layers = list(net.get_submodule("features").children())
    return [nn.Sequential(*layers[a:b]) for a, b in ((0, 7), (7, 14), (14, 24), (24, 34), (34, 43))]


class _Spec(NamedTuple):
    network: Callable[[bool], nn.Module]
    """deep_stem -> network with the parameter names of its weights file"""
    stages: Callable[..., list[nn.Module]]
    middle_channels: int


BACKBONES: dict[str, _Spec] = {
    "resnet50": _Spec(lambda deep: _resnet("resnet50", deep), _resnet_stages, 1024 + 512),
    "resnet101": _Spec(lambda deep: _resnet("resnet101", deep), _resnet_stages, 1024 + 512),
    "vgg16_bn": _Spec(_vgg16_bn, _vgg_stages, 512 + 256),
    "efficientnet_lite0": _Spec(lambda deep: EfficientNetLite0(), EfficientNetLite0.stages, 80 + 40),
}
