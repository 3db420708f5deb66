"""For torch.hub: a segmenter from your own checkpoint, or without one; util/photos/segmenter.py documents it.

segmenter = torch.hub.load("path/to/this/repository", "training_free", source="local")
segmenter = torch.hub.load("path/to/this/repository", "ntrenet_resnet50", source="local", checkpoint="best.pt")
result = segmenter.segment(supports, masks, query)
"""

from collections.abc import Callable
from pathlib import Path

try:
    from model.backbones import BACKBONES
    from util.errors import UserError
    from util.photos.segmenter import DEFAULT_BACKBONE, NTRESegmenter, TrainingFreeSegmenter
except ModuleNotFoundError as error:
    if (name := str(error.name).partition(".")[0]) in ("model", "util"):
        raise ImportError(
            f"the host program has imported a '{name}' of its own, and NTRENet has one too: rename yours"
        ) from error
    raise

dependencies = ["torch", "torchvision", "numpy", "cv2", "PIL", "yaml", "pydantic", "tqdm"]


def training_free(
    backbone: str = DEFAULT_BACKBONE, device: str = "auto", precision: str = "auto", weights: str = "imagenet"
) -> TrainingFreeSegmenter:
    """Build training-free segmentation, which is ours and not the paper's network and needs no checkpoint."""
    return NTRESegmenter.training_free(backbone, device, precision, weights)


def _entry(name: str, title: str) -> Callable[..., NTRESegmenter]:
    def load(checkpoint: str | Path, device: str = "auto", precision: str = "auto") -> NTRESegmenter:
        segmenter = NTRESegmenter.from_checkpoint(checkpoint, device, precision)
        if (found := segmenter.config.model.backbone) != name:
            raise UserError(f"checkpoint {checkpoint} has the backbone {found}; load it with ntrenet_{found}")
        return segmenter

    load.__doc__ = f"NTRENet, or one of its ablations, with {title}."
    return load


globals().update({f"ntrenet_{name}": _entry(name, entry.title) for name, entry in BACKBONES.items()})
