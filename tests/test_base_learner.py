"""The base learner against loops, and its part in the network, the losses, the loader and the real commands."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pfenet import episode
from PIL import Image

from model.backbone import Backbone, build_backbone
from model.base_learner import BaseMaps, base_agreement, base_elsewhere, base_posterior, join_base
from model.doem import mine_distracting_objects
from model.losses import NTRELoss, base_loss
from model.ntrenet import NTRENet, build_ntrenet
from model.ops import foreground, masked_average_pool, resize
from model.prototype_bank import PrototypeBank
from util.data.class_index import Item
from util.data.dataset import EpisodeDataset
from util.data.episodes import EpisodeFiles


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return build_backbone("efficientnet_lite0")[0]


def network(backbone: Backbone, elimination: str = "single", classes: int = 3) -> NTRENet:
    torch.manual_seed(0)
    options = {"channels": 8, "prototype_channels": 12, "fem_scales": (1, 0.5), "base_classes": classes}
    model = build_ntrenet(backbone, elimination=elimination, **options).eval()
    model.backbone.measure_scale(episode(2, 1)[0])
    return model


def test_base_elsewhere_is_a_sum_over_the_classes_that_the_target_is_not() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 3, 2), torch.rand(2, 3)
    got = base_elsewhere(base_posterior(logits), target)
    for b, i, j in np.ndindex(2, 3, 2):
        e = [math.exp(v) for v in logits[b, :, i, j].tolist()]
        expected = sum(e[c + 1] / sum(e) * (1 - float(target[b, c])) for c in range(3))
        assert got[b, 0, i, j].item() == pytest.approx(expected, rel=1e-5)


def test_a_base_class_is_not_eliminated_where_it_is_the_target() -> None:
    query = torch.tensor([0.9, 0.05]).view(1, 2, 1, 1)
    assert base_elsewhere(query, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(0.05)
    assert base_elsewhere(query, torch.tensor([[0.0, 1.0]])).item() == pytest.approx(0.9)


def test_its_opinion_joins_the_prediction_by_likeness_to_the_target_and_to_other_classes() -> None:
    torch.manual_seed(0)
    query, target, logits, elsewhere = (
        torch.randn(2, 5, 3, 2),
        torch.randn(2, 5),
        torch.randn(2, 1, 3, 2),
        torch.rand(2, 1, 3, 2),
    )
    got = join_base(logits, BaseMaps(elsewhere, base_agreement(query, target)))
    for b, i, j in np.ndindex(2, 3, 2):
        h, h_s = query[b, :, i, j].tolist(), target[b].tolist()
        cosine = sum(x * y for x, y in zip(h, h_s, strict=True)) / math.hypot(*h) / math.hypot(*h_s)
        expected = logits[b, 0, i, j].item() + 12 * (cosine - 0.65) - 2 * elsewhere[b, 0, i, j].item()
        assert got[b, 0, i, j].item() == pytest.approx(expected, abs=1e-5)


def test_what_is_known_to_be_distracting_joins_the_mask() -> None:
    feature, everywhere = torch.randn(1, 2, 1, 3), torch.full((1, 1, 1, 3), 5.0)
    known = torch.tensor([[[[0.4, 0.6, 0.9]]]])
    mask, prototype = mine_distracting_objects(feature, everywhere, everywhere, "region", known)
    assert mask.flatten().tolist() == [0, 1, 1]
    assert torch.allclose(prototype.flatten(), feature[0, :, 0, 1:].mean(1))


@torch.no_grad()
@pytest.mark.parametrize("elimination", ["single", "authors"])
def test_the_whole_network_uses_the_map_of_query_and_supports(lite0: Backbone, elimination: str) -> None:
    model = network(lite0, elimination)
    query, supports, masks = episode(2, 3)
    out = model(query, supports, masks)
    seen = model.base_learner(lite0(query).middle)
    of_target, embedded = [], []
    for k in range(3):
        shown, inside = model.base_learner(lite0(supports[:, k]).middle), foreground(masks[:, k], (9, 9))
        of_target.append(masked_average_pool(base_posterior(shown.logits), inside).flatten(1))
        embedded.append(masked_average_pool(shown.embedding, inside).flatten(1))
    elsewhere = base_elsewhere(base_posterior(seen.logits), torch.stack(of_target).mean(0))
    base = BaseMaps(elsewhere, base_agreement(seen.embedding, torch.stack(embedded).mean(0)))
    again = model.eliminate_and_enrich(
        out.query_feature, out.support_prototype, out.prior, (65, 65), base=base, every_scale=True
    )
    assert torch.allclose(out.logits, again.logits, atol=1e-5)
    assert torch.allclose(out.logits, resize(join_base(out.fem.logits, base), (65, 65)), atol=1e-5)
    without = model.eliminate_and_enrich(out.query_feature, out.support_prototype, out.prior, (65, 65))
    assert not torch.allclose(out.logits, without.logits, atol=1e-4)
    encoded = model.encode_query(query), model.encode_supports(supports, masks)[0]
    for b in range(2):  # as an evaluation joins them
        parts = [type(p)(*(t[b : b + 1] for t in p)) for p in encoded]
        assert torch.allclose(model.segment([parts[0]], [parts[1]], (65, 65)).logits[0], out.logits[b], atol=1e-4)


def test_its_loss_equals_a_loop_and_trains_the_learner_only(lite0: Backbone) -> None:
    model = network(lite0)
    query, supports, masks = episode(2, 1)
    classes = torch.zeros(2, 65, 65, dtype=torch.uint8)
    classes[:, 8:40, 8:40], classes[:, 50:] = 7, 255
    classes[:, :8, 40:] = 2  # a novel class: background to the learner
    criterion = NTRELoss(bank=PrototypeBank(class_ids=range(1, 10), channels=8), base_ids=(4, 7, 9))
    out = model(query, supports, masks)
    terms = criterion(out, masks[:, 0], masks, torch.tensor([4, 7]), classes)
    total, weights = 0.0, 0.0
    for b, i, j in np.ndindex(2, 9, 9):
        value = int(classes[b, int(i * 65 / 9), int(j * 65 / 9)])
        if value != 255:
            label, weight = (2, 1.0) if value == 7 else (0, 0.3)
            total -= weight * out.base_logits[b, :, i, j].log_softmax(0)[label].item()
            weights += weight
    assert terms["base"].item() == pytest.approx(total / weights, rel=1e-4)
    plain = terms["final"] + terms["initial"] + 0.4 * terms["fem_aux"] + terms["bg"] + 0.01 * terms["pcl"]
    assert terms["total"].item() == pytest.approx((plain + 3 * terms["base"]).item(), rel=1e-5)
    plain.backward(retain_graph=True)
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert {"fem", "reduce_query"} <= learning and "base_learner" not in learning
    model.zero_grad()
    terms["base"].backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"base_learner"}


def test_nothing_but_ignored_pixels_is_a_loss_of_zero() -> None:
    assert base_loss(torch.randn(1, 3, 2, 2), torch.full((1, 9, 9), 255)) == 0


def test_a_base_learner_without_the_classes_or_without_doem_is_refused(lite0: Backbone) -> None:
    query, supports, masks = episode(1, 1)
    with pytest.raises(ValueError, match="classes"):
        NTRELoss(bank=None)(network(lite0)(query, supports, masks), masks[:, 0], masks, torch.tensor([1]))
    with pytest.raises(ValueError, match="doem"):
        build_ntrenet(lite0, doem=False, base_classes=3)


@pytest.mark.parametrize("class_id", [1, 2, 254])
def test_an_episode_carries_its_querys_classes_through_the_transform(tmp_path: Path, class_id: int) -> None:
    classes = np.array([[0, 1, 2], [254, 255, class_id]], np.uint8)
    Image.fromarray(classes).save(tmp_path / "m.png")
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "i.png")

    class Fixed:
        seed = 0
        index = type("Index", (), {"items": (Item(tmp_path / "i.png", tmp_path / "m.png"),) * 2})

        def __call__(self, number: int) -> EpisodeFiles:
            return EpisodeFiles(0, (1,), class_id)

    seen = []

    def transform(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        seen.append(mask)
        return image[:, ::-1], mask[:, ::-1]

    one = EpisodeDataset(Fixed(), transform=transform, classes=True)[0]  # type: ignore[arg-type]
    assert (one.query_classes.numpy() == classes[:, ::-1]).all()
    expected = np.where(classes == 255, 255, classes == class_id)
    assert (one.query_mask.numpy() == expected[:, ::-1]).all()
    assert (one.support_masks[0].numpy() == expected[:, ::-1]).all()
    assert ((seen[0] == 1) == (classes == class_id)).all()  # transforms see the target as 1
