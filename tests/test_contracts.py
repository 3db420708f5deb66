"""Contracts with code of others: a backbone that is not a CNN, the feature cache, a method to evaluate."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import train
from model import backbones
from model.backbone import Backbone, Source
from model.ops import foreground
from tests.harness import call, evaluated, load, refused, short_run
from tests.scenes import scene, spread
from util.config import Config, load_config
from util.data.class_index import ClassIndex
from util.data.episodes import EpisodeFiles
from util.engine.build import Hardware, build_eval_sampler, build_index, build_model
from util.engine.evaluation import BASELINES, IMAGE, NETWORK, Method, NetworkMethod, evaluate
from util.engine.feature_cache import FeatureCache, Key
from util.photos.segmenter import NTRESegmenter

# ---------------------------------------------------------------- a backbone with attention


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(d_model=24, nhead=2, dim_feedforward=48, dropout=0.0, batch_first=True)


class SmallTransformer(Backbone):
    """A patch convolution and two attention blocks: every feature depends on the whole image."""

    patches: nn.Module
    first: nn.Module
    second: nn.Module

    def __init__(self, network: nn.Module) -> None:
        sizes = {"middle_channels": 24, "high_channels": 24, "stride": 14}
        super().__init__(dict(network.named_children()), sides=(14, 0), **sizes)

    @torch.no_grad()
    def middle(self, images: Tensor) -> Tensor:
        return attend(self.first, self.patches(images))

    @torch.no_grad()
    def high(self, middle: Tensor, masks: Tensor | None = None) -> Tensor:
        high = attend(self.second, middle)
        return high if masks is None else high * foreground(masks, (high.shape[-2], high.shape[-1])).to(high.dtype)


def attend(block: nn.Module, x: Tensor) -> Tensor:
    return block(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[-2:]).contiguous()


def source(name: str) -> Source:
    def build(deep_stem: bool) -> nn.Module:
        parts = {"patches": nn.Conv2d(3, 24, 14, stride=14), "first": attention(), "second": attention()}
        network = nn.Module()
        for part, module in parts.items():
            network.add_module(part, module)
        return network

    return Source(build=build, cut=SmallTransformer, imagenet=lambda folder: folder, unused=())


def test_a_backbone_with_attention_is_trained_tested_and_predicts(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # under a name that is in the table already: the config has read it
    entry = backbones.Entry("Small transformer", "small_transformer")
    monkeypatch.setitem(backbones.BACKBONES, "efficientnet_lite0", entry)
    monkeypatch.setitem(sys.modules, "model.backbones.small_transformer", SimpleNamespace(source=source))
    options = ["model.weights=random", "data.image_size=70"]
    run = short_run(config, tmp_path / "run", *options)
    assert load(run / "best.pt")["model"]["backbone.patches.weight"].shape == (24, 3, 14, 14)
    results = evaluated(config, run / "best.pt", tmp_path / "results.json", "--shots", 3, *options)
    assert results["episodes"] == 8 and 0 <= results["miou"]["mean"] <= 100
    result = NTRESegmenter.from_checkpoint(run / "best.pt", "cpu").segment(*scene(0), scene(1)[0])
    assert result.mask.shape == (48, 60) and spread(result.probability) > 0
    wrong = f"run_dir={tmp_path / 'other'}", "model.weights=random", "data.image_size=65"
    refused(call(train, "--config", config, *wrong), "data.image_size", "take 56 or 70")


# ---------------------------------------------------------------- the feature cache


class Given(NamedTuple):
    """An untrained network that can be evaluated."""

    config: Config
    index: ClassIndex
    method: NetworkMethod

    def episodes(self, seed: int) -> list[EpisodeFiles]:
        sampler = build_eval_sampler(self.config, self.index, seed)
        return [sampler(number) for number in range(8)]


HARDWARE = Hardware(torch.device("cpu"), torch.float32)


def scores_of(score: Tensor, ids: Tensor, value: int) -> Tensor:
    """A measure that depends on every pixel."""
    return torch.stack([score.mean(), score.std(), score[ids == value].mean()])


def measured(given: Given, episodes: Sequence[EpisodeFiles], cache: FeatureCache | None = None) -> np.ndarray:
    found = evaluate(given.method, given.index, episodes, config=given.config, cache=cache, measure=scores_of)
    return np.stack([found[name] for name in ("network", "prior")])


@pytest.fixture
def given(config: Path) -> Given:
    settings = load_config(config, ["data.shots=2", "eval.batch_size=2"])
    torch.manual_seed(0)
    method = NetworkMethod(build_model(settings)[0], settings, HARDWARE, NETWORK | BASELINES)
    return Given(settings, build_index(settings, "val"), method)


def test_a_cache_gives_what_a_fresh_one_gives_whatever_it_holds_and_can_hold(given: Given) -> None:
    cache, small = FeatureCache(1.0), FeatureCache(1e-9)
    for seed in (0, 1, 0):
        episodes = given.episodes(seed)
        expected = measured(given, episodes)
        assert expected.shape == (2, 8, 3) and expected.std(1).min() > 0
        np.testing.assert_allclose(measured(given, episodes, cache), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(measured(given, episodes, small), expected, rtol=1e-4, atol=1e-5)
    assert len(cache.entries) > len(given.episodes(0)) and not small.entries


def test_a_cache_spares_the_backbone_images_that_it_holds(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, seen = given.method.model.backbone, []
    middle = backbone.middle
    monkeypatch.setattr(backbone, "middle", lambda images: [seen.append(len(images)), middle(images)][1])
    cache, episodes = FeatureCache(1.0), given.episodes(0)
    measured(given, episodes, cache)
    assert sum(seen) == len({line for e in episodes for line in (e.query, *e.supports)})
    seen.clear()
    measured(given, episodes[::-1], cache)
    assert seen == []


def test_a_cache_of_another_backbone_size_precision_or_list_is_refused(given: Given) -> None:
    cache, episodes = FeatureCache(1.0), given.episodes(0)
    measured(given, episodes, cache)
    model, data = given.method.model, given.config.data.model_copy(update={"image_size": 73})
    larger = given.config.model_copy(update={"data": data})
    low = Hardware(torch.device("cpu"), torch.bfloat16)
    for wrong in (
        given._replace(method=NetworkMethod(build_model(given.config)[0], given.config, HARDWARE)),
        given._replace(method=NetworkMethod(model, larger, HARDWARE)),
        given._replace(method=NetworkMethod(model, given.config, low)),
        given._replace(index=dataclasses.replace(given.index, list_sha256="of another list")),
    ):
        with pytest.raises(ValueError, match="cache"):
            evaluate(wrong.method, wrong.index, episodes, config=given.config, cache=cache)


# ---------------------------------------------------------------- a method of one's own


class Ids(NamedTuple):
    """All that the method below keeps of an image."""

    ids: Tensor


class UpperHalf(Method):
    """Predicts the upper half of every query."""

    owner = ("upper half",)

    def keys(self, episode: EpisodeFiles, value: int) -> list[Key]:
        return [(episode.query, IMAGE)]

    def nbytes(self, key: Key) -> int:
        return 1

    def read(self, image: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return ids.copy()

    def encode(self, missing: Sequence[Key], samples: Mapping[int, Any], held: Mapping[Key, Any]) -> dict[Key, Any]:
        return {(line, part): Ids(torch.from_numpy(samples[line])) for line, part in missing}

    def predict(
        self, episodes: Sequence[EpisodeFiles], values: Sequence[int], held: Mapping[Key, Any]
    ) -> dict[str, list[Tensor]]:
        sizes = [held[e.query, IMAGE].ids.shape for e in episodes]
        return {"upper": [(torch.arange(h) < h // 2).float()[:, None].expand(h, w) - 0.5 for h, w in sizes]}


def test_a_method_of_ones_own_is_evaluated_at_each_querys_size(given: Given) -> None:
    episodes = given.episodes(0)
    counts = evaluate(UpperHalf(), given.index, episodes, config=given.config)["upper"]
    for (query, _, class_id), found in zip(episodes, counts.tolist(), strict=True):
        ids = given.index.items[query].read(given.index.items[query].mask)
        upper = ids[: len(ids) // 2]
        tp, fp = (upper == class_id).sum(), ((upper != class_id) & (upper != 255)).sum()
        target, valid = (ids == class_id).sum(), (ids != 255).sum()
        assert found == [valid - target - fp, fp, target - tp, tp]
