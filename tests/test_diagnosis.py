"""The diagnosis of a checkpoint: AUC against scikit-learn, thresholds against loops, the command against test.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from scripts import diagnose
from tests.harness import ROOT, call, data_at, process, succeeded, test_command
from util.config import load_config
from util.data.episodes import EpisodeFiles
from util.engine import diagnosis
from util.engine.build import build_index, build_model, find_hardware
from util.engine.checkpoint import load_checkpoint, save_checkpoint
from util.engine.diagnosis import THRESHOLDS, area_under_curve, histogram, miou_by_threshold, predicted_share
from util.photos.segmenter import NTRESegmenter

CLASS_IDS = np.arange(12) % 4 + 1


@pytest.fixture(scope="module")
def measured() -> tuple[list[list[np.ndarray]], np.ndarray]:
    """Logits of each region of twelve episodes, and their counts; every third episode has no other objects."""
    rng, logits, counts = np.random.default_rng(0), [], []
    for n, class_id in enumerate(CLASS_IDS.tolist()):
        sizes = rng.integers(20, 200, 3) * (1, n % 3 > 0, 1)
        regions = [rng.normal(centre, 3, size) for centre, size in zip((0.5, 0.0, -3.0), sizes, strict=True)]
        ids = np.repeat([class_id, 9, 0, 255], [*sizes, 50]).astype(np.uint8)
        score = np.concatenate([*regions, np.full(50, 20.0)])
        logits.append(regions)
        counts.append(histogram(torch.from_numpy(score)[None], torch.from_numpy(ids)[None], class_id).numpy())
    return logits, np.stack(counts)


@pytest.mark.parametrize("region", [1, 2])
def test_area_under_curve_is_the_mean_of_the_episodes_that_have_both(
    region: int, measured: tuple[list[list[np.ndarray]], np.ndarray]
) -> None:
    logits, counts = measured
    expected = [
        roc_auc_score(np.repeat([1, 0], [len(e[0]), len(e[region])]), np.concatenate([e[0], e[region]]))
        for e in logits
        if len(e[region])
    ]
    assert area_under_curve(counts, region) == pytest.approx(np.mean(expected), abs=2e-3)  # the bins' width


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_thresholds_are_exact(threshold: float, measured: tuple[list[list[np.ndarray]], np.ndarray]) -> None:
    logits, counts = measured
    cut, ious = np.log(threshold / (1 - threshold)), []
    for class_id in (1, 2, 3, 4):
        own = [e for e, c in zip(logits, CLASS_IDS, strict=True) if c == class_id]
        union = sum(len(e[0]) + (e[1] > cut).sum() + (e[2] > cut).sum() for e in own)
        ious.append(sum((e[0] > cut).sum() for e in own) / union)
    found = miou_by_threshold(counts, CLASS_IDS, {c: str(c) for c in (1, 2, 3, 4)})
    assert found[threshold] == pytest.approx(np.mean(ious), rel=1e-9)
    shares = [np.mean(np.concatenate([e[r] for e in logits]) > cut) for r in range(3)]
    assert predicted_share(counts.sum(0), threshold) == pytest.approx(shares, rel=1e-9)


def test_the_command_and_the_stored_threshold_agree_with_test_py(short: Path, config: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "best.pt", tmp_path / "found.json"
    checkpoint = load_checkpoint(short / "best.pt")
    save_checkpoint(path, checkpoint | {"threshold": 0.3})
    arguments = "--config", config, "--checkpoint", path, "--out", out, "eval.episodes=200"
    assert "AUC, target against other objects" in succeeded(call(diagnose, *arguments)).out
    found = json.loads(out.read_text())
    assert "mIoU at 0.3, the threshold chosen on base classes" in succeeded(call(test_command, *arguments)).out
    scored, miou = json.loads(out.read_text()), found["novel"]["miou"]
    assert miou["0.5"] == pytest.approx(scored["miou"]["mean"], abs=0.01)
    assert miou["0.3"] == pytest.approx(scored["calibrated"]["miou"]["mean"], abs=0.01)
    assert all(0 <= found[kind]["auc"]["background"] <= 100 for kind in ("novel", "base"))
    base = found["base"]["miou"]
    assert base[str(checkpoint["threshold"])] == max(base.values()), "on the same episodes"
    assert NTRESegmenter.from_checkpoint(path, "cpu").threshold == 0.3


@pytest.mark.parametrize(("target", "others", "best"), [(0.15, 0.08, 0.1), (0.95, 0.85, 0.9), (0.005, 0.005, 0.5)])
def test_a_threshold_is_chosen_on_200_episodes_of_base_classes_alone(
    config: Path, synthetic: Path, monkeypatch: pytest.MonkeyPatch, target: float, others: float, best: float
) -> None:
    """Of pixels with these probabilities; in the last case all thresholds are equal."""
    settings = load_config(config, [*data_at(synthetic), "eval.episodes=10"])
    index, seen = build_index(settings, "val"), list[int]()

    def evaluate(_method: object, _index: object, episodes: list[EpisodeFiles], **_: object) -> dict[str, np.ndarray]:
        seen.extend(episode.class_id for episode in episodes)
        score, ids = torch.tensor([[target, others, others]]).logit(), torch.tensor([[7, 8, 0]])
        return {"network": np.stack([histogram(score, ids, 7).numpy()] * len(episodes))}

    monkeypatch.setattr(diagnosis, "evaluate", evaluate)
    model, hardware = build_model(settings, "random")[0], find_hardware("cpu", "fp32")
    assert diagnosis.calibrated_threshold(model, index, config=settings, hardware=hardware)[0] == best
    assert len(seen) == 200 and set(seen) <= set(range(6, 21)) and len(set(seen)) > 5
    rare = settings.model_copy(update={"data": settings.data.model_copy(update={"min_area": 10**9})})
    assert diagnosis.calibrated_threshold(model, index, config=rare, hardware=hardware) == (0.5, None)


@pytest.mark.parametrize("script", ["bench.py", "convert_pfenet.py", "diagnose.py", "prepare_pascal.py"])
def test_a_script_that_no_other_test_starts_in_a_fresh_process_does(script: str, tmp_path: Path) -> None:
    assert "usage:" in succeeded(process(ROOT / "scripts" / script, "--help", cwd=tmp_path)).out
