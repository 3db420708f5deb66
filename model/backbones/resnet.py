"""ResNet-50 and ResNet-101 at output stride 8.

Stages 3 and 4 have stride 1 and every 3x3 convolution of the stage is dilated by 2 and 4, as in PFENet's code.
(torchvision's ``replace_stride_with_dilation`` leaves the first block of a stage at the dilation of the stage before.)
"""

from functools import partial

from torch import Tensor, nn

from model.backbone import Source
from model.backbones.stages import StagedCNN
from model.torchvision_compat import import_models
from model.weights import torchvision_file


def source(name: str) -> Source:
    """Return the source of 'resnet50' or 'resnet101'."""
    build, imagenet = partial(_build, name), partial(torchvision_file, name)
    return Source(build=build, cut=_cut, imagenet=imagenet, unused=("fc.",), has_deep_stem=_has_deep_stem)


def _has_deep_stem(state: dict[str, Tensor]) -> bool:
    return "conv1.weight" in state and state["conv1.weight"].shape[-2:] == (3, 3)


def _build(name: str, deep_stem: bool) -> nn.Module:
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


def _cut(net: nn.Module) -> StagedCNN:
    part = dict(net.named_children())
    stem = [part["conv1"], part["bn1"], nn.ReLU(inplace=True)]
    if "conv2" in part:
        stem += [part["conv2"], part["bn2"], nn.ReLU(inplace=True), part["conv3"], part["bn3"], nn.ReLU(inplace=True)]
    stages = [nn.Sequential(*stem, part["maxpool"]), *(part[f"layer{n}"] for n in (1, 2, 3, 4))]
    return StagedCNN(stages, channels=(512, 1024, 2048))


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
