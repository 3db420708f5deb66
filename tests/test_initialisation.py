"""Training begins alike whatever the scale of the backbone's features: it is measured once, on the first batch."""

import pytest
import torch
from pfenet import episode
from torch import nn
from util.engine.loops import learning_rate

from model.backbone import Backbone, Features, build_backbone
from model.backbones import BACKBONES
from model.losses import NTRELoss
from model.ntrenet import NTRENet, build_ntrenet
from model.prototype_bank import PrototypeBank


def measured_backbone(name: str, factor: float = 1.0) -> Backbone:
    """Random weights whose batch norms have measured their statistics; all features times ``factor``."""
    torch.manual_seed(0)
    backbone, _ = build_backbone(name, weights="random")
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a plain average
        norm.reset_running_stats()
        norm.train()
    query, supports, _ = episode(4, 3)
    with torch.no_grad():
        for images in (query, *supports):
            backbone.high(backbone(images).stage3)
    backbone.eval()
    for norm in norms:
        norm.eval()
    plain = backbone.forward
    if factor != 1:

        def scaled(images: torch.Tensor) -> Features:
            return Features(*(factor * feature for feature in plain(images)))

        backbone.forward = scaled  # type: ignore[method-assign]
    return backbone


def build(backbone: Backbone, kind: str = "single") -> tuple[NTRENet, NTRELoss]:
    torch.manual_seed(1)
    network = build_ntrenet(backbone, elimination=kind, fem_scales=(1, 0.5, 0.25, 0.125)).train()
    return network, NTRELoss(bank=PrototypeBank(class_ids=range(1, 5), channels=256))


def first_losses(network: NTRENet, criterion: NTRELoss, batch: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    query, supports, masks = episode(batch, 1)
    network.backbone.measure_scale(query)
    return criterion(network(query, supports, masks), masks[:, 0], masks, torch.arange(batch) % 4 + 1)


@pytest.mark.parametrize("name", ["efficientnet_lite0", pytest.param("vgg16_bn", marks=pytest.mark.slow)])
def test_the_first_losses_do_not_depend_on_the_backbone_nor_on_the_scale_of_its_features(name: str) -> None:
    small, large = (first_losses(*build(measured_backbone(name, f)))["total"].item() for f in (0.1, 10.0))
    assert small == pytest.approx(large, rel=0.05)  # masks are cut at 0
    assert 1.5 < small < 4  # 2.8 if every probability were one half; the same bounds for all backbones


def test_middle_features_have_a_mean_square_of_one_and_the_scale_is_saved() -> None:
    backbone, query = measured_backbone("efficientnet_lite0", 7.0), episode(4, 1)[0]
    backbone.measure_scale(query)
    assert backbone(query).middle.square().mean().item() == pytest.approx(1, rel=1e-4)
    again = backbone.middle_scale.clone()
    backbone.measure_scale(query)  # what was measured before has no part in it
    assert torch.equal(backbone.middle_scale, again)
    assert torch.equal(backbone.state_dict()["middle_scale"], again)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("kind", ["single", "authors"])
def test_two_hundred_steps_at_the_papers_rate_fall_and_stay_finite(name: str, kind: str) -> None:
    network, criterion = build(measured_backbone(name), kind)
    query, supports, masks = episode(8, 1)
    network.backbone.measure_scale(query)
    trainable = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, momentum=0.9, weight_decay=1e-4)
    totals = []
    for step in range(200):
        optimizer.param_groups[0]["lr"] = learning_rate(step, base=0.03, total=20_000, power=0.9, warmup=100)
        query, supports, masks = episode(4, 1)
        terms = criterion(network(query, supports, masks), masks[:, 0], masks, torch.arange(4) + 1)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        totals.append(terms["total"].item())
    assert all(total < 4 for total in totals)  # also false for NaN
    assert sum(totals[-20:]) < sum(totals[:20])
