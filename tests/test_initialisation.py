"""Training begins alike whatever the scale of the backbone's features: it is measured once, on the first batch."""

import pytest
import torch
from torch import nn

from model.backbone import Backbone, build_backbone
from model.backbones import BACKBONES
from model.losses import NTRELoss
from model.ntrenet import NTRENet
from model.prototype_bank import PrototypeBank
from tests import networks
from tests.pfenet import episode


def build(name: str, kind: str = "single", factor: float = 1.0) -> tuple[NTRENet, NTRELoss]:
    """A backbone of random weights whose batch norms have measured their statistics; middle features times a factor."""
    torch.manual_seed(0)
    backbone: Backbone = build_backbone(name, weights="random", fuse=False)[0]
    for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None  # a plain average
        norm.reset_running_stats()
        nn.Module.train(norm)
    query, supports, _ = episode(4, 3)
    for images in (query, *supports):
        backbone.features(images)
    middle = backbone.eval().middle
    backbone.middle = lambda images: factor * middle(images)  # type: ignore[method-assign]
    torch.manual_seed(1)
    network = networks.network(backbone, elimination=kind, fem_scales=(1, 0.5, 0.25, 0.125)).train()
    return network, networks.loss(PrototypeBank(class_ids=range(1, 5), channels=256))


def total(network: NTRENet, loss: NTRELoss) -> torch.Tensor:
    query, supports, masks = episode(4, 1)
    return loss(network(query, supports, masks), masks[:, 0], masks, torch.arange(4) + 1)["total"]


def first_total(network: NTRENet, loss: NTRELoss) -> float:
    torch.manual_seed(2)
    network.measure_scale(episode(4, 1)[0])
    return total(network, loss).item()


@pytest.mark.parametrize("name", ["efficientnet_lite0", pytest.param("vgg16_bn", marks=pytest.mark.slow)])
def test_the_first_loss_does_not_depend_on_the_backbone_nor_on_the_scale_of_its_features(name: str) -> None:
    small, large = (first_total(*build(name, factor=factor)) for factor in (0.1, 10.0))
    assert small == pytest.approx(large, rel=0.05)  # masks are cut at 0
    assert 1.5 < small < 4  # 2.8 if every probability were one half; the same bounds for all backbones


def test_middle_features_have_a_mean_square_of_one_and_the_scale_is_saved() -> None:
    network, query = build("efficientnet_lite0", factor=7.0)[0], episode(4, 1)[0]
    for _ in range(2):  # an earlier measurement does not matter
        network.measure_scale(query)
        scaled = network.backbone.middle(query) * network.state_dict()["middle_scale"]
        assert scaled.square().mean().item() == pytest.approx(1, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("kind", ["single", "authors"])
def test_two_hundred_steps_at_the_papers_rate_fall_and_stay_finite(name: str, kind: str) -> None:
    network, loss = build(name, kind)
    network.measure_scale(episode(8, 1)[0])
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], momentum=0.9, weight_decay=1e-4)
    totals = []
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.03 * min(1, (step + 1) / 100)
        optimizer.zero_grad()
        value = total(network, loss)
        value.backward()
        optimizer.step()
        totals.append(value.item())
    assert all(value < 4 for value in totals)  # also false for NaN
    assert sum(totals[-20:]) < sum(totals[:20])
