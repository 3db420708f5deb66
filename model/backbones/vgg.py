"""VGG-16 with batch norm.

It keeps its pools, rounded up as in PFENet, so its stages 3 and 4 are at stride 16 and stage 2 is resized to stage 3.
"""

from functools import partial

from torch import nn

from model.backbone import Source
from model.backbones.stages import StagedCNN
from model.torchvision_compat import import_models
from model.weights import torchvision_file


def source(name: str) -> Source:
    """Return the source of 'vgg16_bn'."""
    return Source(build=_build, cut=_cut, imagenet=partial(torchvision_file, name), unused=("classifier.",))


def _build(deep_stem: bool) -> nn.Module:
    net = import_models().vgg16_bn(weights=None, init_weights=False)
    del net.classifier
    for layer in net.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    return net


def _cut(net: nn.Module) -> StagedCNN:
    layers = list(net.get_submodule("features").children())
    stages: list[nn.Module] = [nn.Sequential(*layers[a:b]) for a, b in ((0, 7), (7, 14), (14, 24), (24, 34), (34, 43))]
    return StagedCNN(stages, channels=(256, 512, 512), stride=16)
