"""Training-free segmentation against a loop over positions, its properties, and its edges."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model.backbone import build_backbone
from model.ops import foreground, resize
from model.training_free import Described, as_negative, describe_support, join, target_score
from tests import networks
from tests.harness import SYNTHETIC, call, data_at, succeeded, test_command
from tests.pfenet import episode
from tests.scenes import iou, scene
from util.config import load_config
from util.engine.build import build_eval_sampler, build_index
from util.photos.baselines import TrainingFreeMethod
from util.photos.edges import sharp_mask
from util.photos.segmenter import NTRESegmenter, TrainingFreeSegmenter


def described(seed: int, positions: int = 24, channels: int = 6) -> Described:
    """Random features; a third of the positions is target, one is at the border and one ignored."""
    generator = torch.Generator().manual_seed(seed)
    feature = F.normalize(torch.randn(channels, positions, generator=generator), dim=0)
    target = (torch.arange(positions) < positions // 3).float()
    other = 1 - target
    target[0], other[0] = 0.4, 0.6
    other[-1] = 0
    return Described(feature, target, other)


def query(seed: int, height: int = 4, width: int = 5, channels: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return F.normalize(torch.randn(channels, height, width, generator=generator), dim=0)


def naive(image: Tensor, supports: list[Described]) -> np.ndarray:
    """The formulas of model/training_free.py, a position at a time, in float64."""

    def unit(v: np.ndarray) -> np.ndarray:
        length = math.sqrt(sum(x * x for x in v))
        return v / length if length else v

    def deviation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))

    positions = [
        (support.feature[:, i].double().numpy(), float(support.target[i]), float(support.other[i]))
        for support in supports
        for i in range(support.feature.shape[1])
    ]
    p_target = unit(sum(t * s for s, t, _ in positions))
    p_other = unit(sum(o * s for s, _, o in positions))
    on_target = [s for s, t, _ in positions if t > 0 and t >= 0.5 * max(t for _, t, _ in positions)]
    on_other = [s for s, _, o in positions if o > 0 and o >= 0.5 * max(o for _, _, o in positions)]
    places = [q.double().numpy() for q in image.flatten(1).T]
    d1 = [q @ p_target - q @ p_other for q in places]
    d2 = [max(s @ q for s in on_target) - max(s @ q for s in on_other) for q in places]
    score = [a / deviation(d1) + b / deviation(d2) for a, b in zip(d1, d2, strict=True)]
    for _ in range(2):
        order = sorted(range(len(places)), key=lambda n: -score[n])
        highest, lowest = max(1, round(0.05 * len(places))), max(1, round(0.3 * len(places)))
        q_target = unit(sum(places[n] for n in order[:highest]) / highest)
        q_other = unit(sum(places[n] for n in order[-lowest:]) / lowest)
        d3 = [q @ unit(p_target + q_target) - q @ unit(p_other + q_other) for q in places]
        score = [a / deviation(score) + b / deviation(d3) for a, b in zip(score, d3, strict=True)]
    negatives = [
        s.feature[:, i].double().numpy()
        for s in supports
        if s.negative is not None
        for i in s.negative.gt(0.5).nonzero().flatten()
    ]
    if negatives:
        n = [max(s @ q for s in on_target) - max(s @ q for s in negatives) for q in places]
        score = [a / deviation(score) + 0.6 * min(0, b / deviation(n)) for a, b in zip(score, n, strict=True)]
    return (np.array(score) / deviation(score)).reshape(image.shape[1:])


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_score_is_that_of_a_loop_over_positions(seed: int, shots: int) -> None:
    supports = [described(10 * seed + n, positions=24 + n) for n in range(shots)]
    for given in (supports, [*supports, as_negative(described(7))]):
        score = target_score(query(seed), join(given))
        np.testing.assert_allclose(score.numpy(), naive(query(seed), given), atol=1e-4)


@torch.no_grad()
def test_the_score_of_middle_features_joins_a_networks_prediction_in_evaluation() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("efficientnet_lite0", weights="random")[0]
    model = networks.network(backbone, channels=8, prototype_channels=8, fem_scales=(1, 0.5), training_free=True).eval()
    inputs, supports, masks = episode(2, 2)
    out = model(inputs, supports, masks)
    scores = []
    for b in range(2):
        shown = []
        for k in range(2):
            target, other = (foreground((masks[b, k] == v).long()[None], (9, 9)).flatten() for v in (1, 0))
            feature = F.normalize(backbone.middle(supports[b, k][None])[0].flatten(1), dim=0)
            shown.append(Described(feature, target, other))
        scores.append(naive(F.normalize(backbone.middle(inputs[b][None])[0], dim=0), shown))
    expected = resize(out.fem.logits + torch.tensor(np.stack(scores))[:, None].float() / 2, (65, 65))
    torch.testing.assert_close(out.logits, expected, atol=1e-3, rtol=1e-3)
    trained = networks.trained_without_dropout(model)(inputs, supports, masks)
    torch.testing.assert_close(trained.logits, resize(trained.fem.logits, (65, 65)))


def test_every_degenerate_support_or_query_gives_a_finite_score() -> None:
    support, image = described(0), query(0)
    zeros = torch.zeros_like(support.target)
    assert target_score(image, support._replace(target=zeros)).isfinite().all()
    assert not target_score(image[:, :1, :1].expand_as(image), support).any()
    score = target_score(image, support._replace(other=zeros))
    assert score.isfinite().all() and (score > 0).any() and (score < 0).any()  # not everything is target
    faint = support._replace(target=zeros.index_fill(0, torch.tensor([3]), 0.02))
    nearest = (support.feature[:, 3] @ image.flatten(1)).argmax()
    assert target_score(image, faint).flatten()[nearest] > 0


def test_one_pixel_of_target_is_seen_and_ignored_pixels_are_neither() -> None:
    layers = torch.zeros(2, 17, 25)
    layers[1] = 1
    layers[:, :, 16:] = 0  # ignored
    layers[0, 5, 3], layers[1, 5, 3] = 1, 0
    found = describe_support(torch.ones(4, 3, 4), layers)
    target, other = found.target.reshape(3, 4), found.other.reshape(3, 4)
    assert target[1, 0] == pytest.approx(1 / 45)  # 9 rows and 5 columns of it lie in the image
    assert (target > 0).sum() == 1
    assert (other[:, 3] == 0).all() and (other[0, :2] == 1).all()


@pytest.fixture(scope="module")
def segmenter() -> TrainingFreeSegmenter:
    return NTRESegmenter.training_free(device="cpu", precision="fp32")


def test_a_disc_is_found_without_training_and_edges_find_its_border(segmenter: TrainingFreeSegmenter) -> None:
    support, truth_of = scene(1, 120, 150), scene(2, 150, 120)
    found = segmenter.segment(*support, truth_of[0])
    assert found.mask.shape == found.probability.shape == (150, 120)
    assert found.probability.min() >= 0 and found.probability.max() <= 1
    np.testing.assert_array_equal(found.mask, found.probability > 0.5)
    sharp = segmenter.segment(*support, truth_of[0], edges=True)
    np.testing.assert_array_equal(sharp.probability, found.probability)
    assert iou(found.mask, truth_of[1]) > 0.5
    assert iou(sharp.mask, truth_of[1]) > max(0.9, iou(found.mask, truth_of[1]))


def test_edges_keep_what_is_certain_follow_the_threshold_and_leave_an_empty_map_empty() -> None:
    image, disc = scene(2, 120, 150)
    blurred = F.avg_pool2d(torch.from_numpy(disc)[None].float(), 21, stride=1, padding=10)[0].numpy()
    probability = 0.05 + 0.6 * blurred
    sharp = sharp_mask(probability, image, 0.3)
    assert iou(sharp, disc) > 0.95 > iou(probability > 0.3, disc)
    assert not sharp_mask(probability, image, 0.9).any()
    assert sharp_mask(probability, image, 0.01).all()
    assert not sharp_mask(np.full(disc.shape, 0.2, np.float32), image).any()


@pytest.mark.usefixtures("small_side")
def test_the_score_without_a_checkpoint_is_that_of_a_loop_over_episodes(
    synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingFreeSegmenter, "POSITIONS", 1)
    overrides = [*data_at(synthetic), "data.shots=2", "eval.episodes=2", "device=cpu", "precision=fp32"]
    sizes, predict = list[int](), TrainingFreeMethod.predict

    def counted(self: TrainingFreeMethod, episodes: Any, *others: Any) -> Any:
        sizes.append(len(episodes))
        return predict(self, episodes, *others)

    monkeypatch.setattr(TrainingFreeMethod, "predict", counted)
    out = tmp_path / "r.json"
    done = succeeded(call(test_command, "--config", SYNTHETIC, "--baselines", "--out", out, *overrides))
    assert "training free edges" in done.out
    results = json.loads(out.read_text())
    assert results["checkpoint"] is None and "miou" not in results and results["seconds"] > 0.1
    assert sizes == [1, 1], "the bar moves after each episode, whatever eval.batch_size is"

    settings = load_config(SYNTHETIC, overrides)
    index = build_index(settings, "val")
    sampler = build_eval_sampler(settings, index, 0)
    method = NTRESegmenter.training_free(device="cpu", precision="fp32")
    names = ("training_free", "training_free_edges", "all_foreground")
    counts = {name: np.zeros((5, 2)) for name in names}  # class; intersection, union
    for number in range(2):
        episode = sampler(number)
        images = [np.array(Image.open(index.items[i].image)) for i in (episode.query, *episode.supports)]
        labels = [np.array(Image.open(index.items[i].mask)) for i in (episode.query, *episode.supports)]
        target = method.encode(images[1:], labels[1:], episode.class_id)
        query = method.encode_query(images[0])
        truth, valid = labels[0] == episode.class_id, labels[0] != 255
        masks = [method.segment_encoded(target, query, edges=edges).mask for edges in (False, True)]
        for name, mask in zip(names, [*masks, valid], strict=True):
            counts[name][episode.class_id - 1] += (mask & truth).sum(), ((mask | truth) & valid).sum()
    for name, count in counts.items():
        expected = 100 * (count[:, 0] / np.maximum(count[:, 1], 1)).mean()
        assert results["baselines"][name]["miou"]["mean"] == pytest.approx(expected, abs=0.01)
        assert expected > 1
    assert 0 < results["baselines"]["prior"]["precision"]["mean"] < 100
