"""The backbones by name: another one is a file in this folder, with a function ``describe``, and a line here.

Configs, reports and torch.hub read this table too. It imports nothing: a backbone's file is imported when it is built.
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """What is known of a backbone before it is built."""

    title: str
    """as the paper writes it"""
    file: str
    """the module in this folder; its ``describe(name)`` returns a :class:`model.backbone.Network`"""


BACKBONES = {
    "vgg16_bn": Entry("VGG-16", "vgg"),
    "resnet50": Entry("ResNet-50", "resnet"),
    "resnet101": Entry("ResNet-101", "resnet"),
    "efficientnet_lite0": Entry("EfficientNet-Lite0", "efficientnet_lite"),
}
