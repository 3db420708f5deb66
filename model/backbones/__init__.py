"""The backbones by name: another one is a file in this folder, with a function ``source``, and a line here.

Configs, reports and torch.hub read this table too. It imports nothing: a backbone's file is imported when it is built.
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """One backbone of the table."""

    title: str
    """its name in tables"""
    file: str
    """the module in this folder; its ``source(name)`` returns a :class:`model.backbone.Source`"""


BACKBONES = {
    "vgg16_bn": Entry("VGG-16", "vgg"),
    "resnet50": Entry("ResNet-50", "resnet"),
    "resnet101": Entry("ResNet-101", "resnet"),
    "efficientnet_lite0": Entry("EfficientNet-Lite0", "efficientnet_lite"),
}
TIMM = "timm:"
"""before the name of a network of timm, see timm_models.py"""


def require_known(name: str) -> str:
    """Return a backbone's name; raise ValueError if it is neither in the table nor one of timm's."""
    if name in BACKBONES or (name.startswith(TIMM) and name != TIMM):
        return name
    raise ValueError(f"unknown backbone '{name}'; known are {', '.join(BACKBONES)}, and {TIMM}NAME for any of timm's")
