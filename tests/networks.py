"""Networks and losses with the config's defaults, for tests: builders in model/ have none of their own."""

from typing import Any

from torch import nn

from model.backbone import Backbone
from model.losses import NTRELoss
from model.ntrenet import NTRENet, build_ntrenet
from model.parallel import Dropout2d
from model.prototype_bank import PrototypeBank
from util.config import LossConfig, ModelConfig

LOSS_OPTIONS = ("alpha", "bg_ignored", "pcl_negatives", "pcl_regions", "pcl_drawn")


def network(backbone: Backbone, **changes: Any) -> NTRENet:
    """Build the network with the config's defaults, but for ``changes``."""
    options = ModelConfig().model_dump(exclude={"backbone", "weights", "base_learner", "two_class"})
    return build_ntrenet(backbone, **{**options, "base_classes": 0, **changes})


def loss(bank: PrototypeBank | None = None, **changes: Any) -> NTRELoss:
    """Build the loss with the config's defaults, but for ``changes``; ``weights`` may name some of the terms."""
    config = LossConfig()
    weights = {**config.weights, **changes.pop("weights", {})}
    return NTRELoss(bank=bank, weights=weights, **{name: getattr(config, name) for name in LOSS_OPTIONS} | changes)


def trained_without_dropout(module: nn.Module) -> Any:
    """Put a module in training mode, in which outputs that only a loss reads are there, and switch dropout off."""
    for part in module.modules():
        if isinstance(part, Dropout2d):
            part.p = 0.0
    return module.train()
