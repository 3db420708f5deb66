"""Import torchvision's Python parts with a CPU-only torch.

The torchvision wheel of the package index is built for CUDA. With a CPU build of torch its compiled operators cannot
load, and then ``import torchvision`` fails, because it attaches shape functions to two operators that do not exist.
Declaring their schemas first is enough: this project uses none of the operators.
"""

import importlib
from types import ModuleType

import torch

_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")


def import_models() -> ModuleType:
    """Return ``torchvision.models``, declaring the two missing operators if the import needs them."""
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    _SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.models")
