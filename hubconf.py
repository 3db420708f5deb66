"""For torch.hub: a segmenter from a checkpoint of yours, or without any; util/segment/segmenter.py says what it does.

segmenter = torch.hub.load("path/to/this/repository", "training_free", source="local")
segmenter = torch.hub.load("path/to/this/repository", "ntrenet_resnet50", source="local", checkpoint="best.pt")
result = segmenter.segment(supports, masks, query)
"""

from pathlib import Path

from util.errors import UserError
from util.segment.segmenter import NTRESegmenter, TrainingFreeSegmenter

dependencies = ["torch", "torchvision", "numpy", "cv2", "PIL", "yaml", "pydantic", "tqdm", "filelock"]


def ntrenet_resnet50(checkpoint: str | Path, device: str = "auto", precision: str = "auto") -> NTRESegmenter:
    """NTRENet, or one of its ablations, with ResNet-50."""
    return _segmenter("resnet50", checkpoint, device, precision)


def ntrenet_resnet101(checkpoint: str | Path, device: str = "auto", precision: str = "auto") -> NTRESegmenter:
    """NTRENet, or one of its ablations, with ResNet-101."""
    return _segmenter("resnet101", checkpoint, device, precision)


def ntrenet_vgg16_bn(checkpoint: str | Path, device: str = "auto", precision: str = "auto") -> NTRESegmenter:
    """NTRENet, or one of its ablations, with VGG-16-bn."""
    return _segmenter("vgg16_bn", checkpoint, device, precision)


def ntrenet_efficientnet_lite0(checkpoint: str | Path, device: str = "auto", precision: str = "auto") -> NTRESegmenter:
    """NTRENet, or one of its ablations, with EfficientNet-Lite0."""
    return _segmenter("efficientnet_lite0", checkpoint, device, precision)


def training_free(
    backbone: str = "efficientnet_lite0", device: str = "auto", precision: str = "auto"
) -> TrainingFreeSegmenter:
    """Training-free segmentation, ours and not the paper's network; no checkpoint."""
    return NTRESegmenter.training_free(backbone, device, precision)


def _segmenter(backbone: str, checkpoint: str | Path, device: str, precision: str) -> NTRESegmenter:
    segmenter = NTRESegmenter.from_checkpoint(checkpoint, device, precision)
    found = segmenter.config.model.backbone
    if found != backbone:
        raise UserError(f"checkpoint {checkpoint} has the backbone {found}; load it with ntrenet_{found}")
    return segmenter
