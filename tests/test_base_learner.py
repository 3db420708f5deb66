"""The base learner against loops, and its part in the network, the loss and the loader."""

import math

import numpy as np
import pytest
import torch

from model.backbone import Backbone
from model.base_learner import BaseMaps, base_agreement, base_elsewhere, base_posterior, join_base
from model.doem import distracting_object_mask, distracting_similarity, mine_distracting_objects
from model.losses import base_loss
from model.ntrenet import NTRENet
from model.ops import foreground, masked_average_pool, resize
from model.prototype_bank import PrototypeBank
from tests import networks
from tests.pfenet import episode


def network(backbone: Backbone, elimination: str = "single") -> NTRENet:
    sizes = {"channels": 8, "prototype_channels": 12, "fem_scales": (1, 0.5), "base_classes": 3}
    ours = {"fem_prior": True, "do_similarity": True}
    model = networks.network(backbone, elimination=elimination, **ours, **sizes)
    model.measure_scale(episode(2, 1)[0])
    return networks.trained_without_dropout(model)


def test_base_elsewhere_is_a_sum_over_the_classes_that_the_target_is_not() -> None:
    logits, target = torch.randn(2, 4, 3, 2), torch.rand(2, 3)
    got = base_elsewhere(base_posterior(logits), target)
    for b, i, j in np.ndindex(2, 3, 2):
        e = [math.exp(v) for v in logits[b, :, i, j].tolist()]
        expected = sum(e[c + 1] / sum(e) * (1 - float(target[b, c])) for c in range(3))
        assert got[b, 0, i, j].item() == pytest.approx(expected, rel=1e-5)


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


def test_its_maps_join_the_logits_by_similarity_to_the_target_and_to_other_classes() -> None:
    query, target = torch.randn(2, 5, 3, 2), torch.randn(2, 5)
    logits, elsewhere = torch.randn(2, 1, 3, 2), torch.rand(2, 1, 3, 2)
    got = join_base(logits, BaseMaps(elsewhere, base_agreement(query, target)))
    for b, i, j in np.ndindex(2, 3, 2):
        h, h_s = query[b, :, i, j].tolist(), target[b].tolist()
        h_q = [sum(query[b, c].flatten().tolist()) / 6 for c in range(5)]
        agreement = cosine(h, h_s) - cosine(h, h_q) / 2
        expected = logits[b, 0, i, j].item() + 12 * (agreement - 0.325) - 2 * elsewhere[b, 0, i, j].item()
        assert got[b, 0, i, j].item() == pytest.approx(expected, abs=1e-5)


def test_known_distracting_objects_join_the_mask() -> None:
    feature, everywhere = torch.randn(1, 2, 1, 4), torch.full((1, 1, 1, 4), 5.0)
    elsewhere, agreement = torch.tensor([[0.4, 0.6, 0.9, 0.9]]), torch.tensor([[0.0, 0.3, 0.3, 0.4]])
    known = BaseMaps(elsewhere[:, None, None], agreement[:, None, None]).distracting  # the last is like the target
    mask, prototype = mine_distracting_objects(feature, everywhere, everywhere, "region", known)
    assert mask.flatten().tolist() == [0, 1, 1, 0]
    assert torch.allclose(prototype.flatten(), feature[0, :, 0, 1:3].mean(1))


@torch.no_grad()
@pytest.mark.parametrize("elimination", ["single", "authors"])
def test_the_network_uses_the_maps_of_query_and_supports(lite0: Backbone, elimination: str) -> None:
    model = network(lite0, elimination)
    model.base_learner.layers[-1].weight *= 20  # decided posteriors
    query, supports, masks = episode(2, 3)
    out = model(query, supports, masks)
    of_query = model.base_learner(lite0.middle(query) * model.middle_scale)
    shares, embedding = [], []
    for k in range(3):
        shown = model.base_learner(lite0.middle(supports[:, k]) * model.middle_scale)
        target = foreground(masks[:, k], (9, 9))
        shares.append(masked_average_pool(base_posterior(shown.logits), target).flatten(1))
        embedding.append(masked_average_pool(shown.embedding, target).flatten(1))
    elsewhere = base_elsewhere(base_posterior(of_query.logits), torch.stack(shares).mean(0))
    base = BaseMaps(elsewhere, base_agreement(of_query.embedding, torch.stack(embedding).mean(0)))
    assert torch.allclose(out.base_logits, of_query.logits, atol=1e-4)
    assert torch.allclose(out.logits, resize(join_base(out.fem.logits, base), (65, 65)), atol=1e-4)

    once = out.eliminated[0]  # at the feature's own size in both forms
    plain = distracting_object_mask(out.query_bg_logits > 0, once.initial_logits > 0)
    known = (elsewhere > 0.5) & (base.agreement <= 0.325)
    assert torch.equal(once.do_mask, torch.maximum(plain, known.float()))
    assert not torch.equal(once.do_mask, plain)
    if elimination == "single":  # FEM takes B instead of C_p
        maps = elsewhere - distracting_similarity(out.query_feature, once.do_prototype)
        assert torch.allclose(out.fem.logits, model.fem(once.activated, once.do_prototype, maps).logits, atol=1e-4)


def test_its_loss_equals_a_loop_and_trains_the_learner_only(lite0: Backbone) -> None:
    model = network(lite0)
    query, supports, masks = episode(2, 1)
    classes = torch.zeros(2, 65, 65, dtype=torch.uint8)
    classes[:, 8:40, 8:40], classes[:, 50:] = 7, 255
    classes[:, :8, 40:] = 2  # a novel class: background to the learner
    loss = networks.loss(PrototypeBank(class_ids=range(1, 10), channels=8), base_ids=(4, 7, 9))
    out = model(query, supports, masks)
    with pytest.raises(ValueError, match="classes"):
        loss(out, masks[:, 0], masks, torch.tensor([4, 7]))
    terms = loss(out, masks[:, 0], masks, torch.tensor([4, 7]), classes)
    total, weights = 0.0, 0.0
    for b, i, j in np.ndindex(2, 9, 9):
        value = int(classes[b, int(i * 65 / 9), int(j * 65 / 9)])
        if value != 255:
            label, weight = (2, 1.0) if value == 7 else (0, 0.3)
            total -= weight * out.base_logits[b, :, i, j].log_softmax(0)[label].item()
            weights += weight
    assert terms["base"].item() == pytest.approx(total / weights, rel=1e-4)
    plain = sum(weight * terms[name] for name, weight in loss.weights.items() if name != "base")
    assert terms["total"].item() == pytest.approx((plain + 3 * terms["base"]).item(), rel=1e-5)
    trained = {}
    for name, part in (("others", plain), ("base", terms["base"])):
        model.zero_grad()
        part.backward(retain_graph=True)
        trained[name] = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert {"fem", "reduce_query"} <= trained["others"] and "base_learner" not in trained["others"]
    assert trained["base"] == {"base_learner"}
    assert base_loss(torch.randn(1, 3, 2, 2), torch.full((1, 9, 9), 255)) == 0  # nothing but ignored pixels
