"""The diagnosis of a checkpoint: AUC against scikit-learn, thresholds against loops, the command against test.py."""

import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from util.segment.baselines import better_of
from util.segment.segmenter import NTRESegmenter, TrainingFreeSegmenter

import train
from scripts import diagnose
from tests.harness import call, succeeded, test_command
from util.config import load_config
from util.data.episodes import EpisodeFiles
from util.data.synthetic import generate
from util.engine import diagnosis
from util.engine.build import build_eval_sampler, build_index, build_model, build_saved_model, find_hardware
from util.engine.checkpoint import load_checkpoint, save_checkpoint
from util.engine.diagnosis import EDGES, THRESHOLDS, Counts, area_under_curve, miou_by_threshold, predicted_share

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml"


def random_episodes(count: int = 12) -> tuple[list[list[np.ndarray]], Counts]:
    """Logits of each region of each episode, and their counts; every third episode has no other objects."""
    rng = np.random.default_rng(0)
    logits = [
        [rng.normal(centre, 3, int(rng.integers(20, 200)) if region != 1 or n % 3 else 0) for region, centre in means]
        for n, means in enumerate([list(enumerate((0.5, 0.0, -3.0)))] * count)
    ]
    histogram = np.array([[np.bincount(np.digitize(x, EDGES), minlength=len(EDGES) + 1) for x in e] for e in logits])
    return logits, Counts(histogram, np.full((count, 3), np.nan), np.arange(count) % 4 + 1)


@pytest.mark.parametrize("region", [1, 2])
def test_area_under_curve_is_the_mean_of_the_episodes_that_have_both(region: int) -> None:
    logits, counts = random_episodes()
    expected = [
        roc_auc_score(np.repeat([1, 0], [len(e[0]), len(e[region])]), np.concatenate([e[0], e[region]]))
        for e in logits
        if len(e[region])
    ]
    assert area_under_curve(counts, region) == pytest.approx(np.mean(expected), abs=2e-3)  # the bins' width


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_thresholds_are_exact(threshold: float) -> None:
    logits, counts = random_episodes()
    cut = np.log(threshold / (1 - threshold))
    ious = []
    for class_id in (1, 2, 3, 4):
        own = [e for e, c in zip(logits, counts.class_ids, strict=True) if c == class_id]
        hit = sum((e[0] > cut).sum() for e in own)
        union = sum(len(e[0]) + (e[1] > cut).sum() + (e[2] > cut).sum() for e in own)
        ious.append(hit / union)
    assert miou_by_threshold(counts, {c: str(c) for c in (1, 2, 3, 4)})[threshold] == pytest.approx(
        np.mean(ious), rel=1e-9
    )
    shares = [np.mean(np.concatenate([e[r] for e in logits]) > cut) for r in range(3)]
    assert predicted_share(counts, threshold) == pytest.approx(shares, rel=1e-9)


def run(module: ModuleType, *arguments: object) -> str:
    return succeeded(call(module, *arguments)).out


def test_the_command_agrees_with_test_py_and_shows_novel_beside_base_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingFreeSegmenter, "SIDE", 129)  # a ninth of the work
    generate(tmp_path / "data", train=40, val=60, seed=0)
    lists = tmp_path / "data" / "lists"
    options = [
        *(f"data.root={tmp_path / 'data'}", f"data.train_list={lists / 'train.txt'}"),
        *(f"data.val_list={lists / 'val.txt'}", f"run_dir={tmp_path / 'run'}", "data.image_size=65"),
        *("data.min_area=256", "eval.episodes=6", "workers=0", "device=cpu", "train.epochs=1", "train.batch_size=8"),
    ]
    trained = run(train, "--config", CONFIG, *options)
    checkpoint = ["--config", CONFIG, "--checkpoint", tmp_path / "run" / "best.pt", *options]
    run(test_command, *checkpoint, "--baselines", "--out", tmp_path / "results.json")
    shown = run(diagnose, *checkpoint, "--out", tmp_path / "diagnosis.json")
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    scored = json.loads((tmp_path / "results.json").read_text())
    assert found["novel"]["miou"]["0.5"] == pytest.approx(scored["miou"]["mean"], abs=0.1)
    assert set(found["base"]) == set(found["novel"])
    for kind in ("novel", "base"):
        assert 0 <= found[kind]["auc"]["other objects"] <= 100
        assert set(found[kind]["miou_with_the_target_as_distractor"]) == {str(t) for t in THRESHOLDS}
    assert "AUC, target against other objects" in shown

    assert "warning: 4 steps are too few to learn from" in trained and "raise train.epochs to 150" in trained
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert f"of step 4, with a validation mIoU of {100 * json.loads(line)['miou']:.1f}" in trained.splitlines()[-1]

    path = tmp_path / "run" / "best.pt"
    threshold, base = load_checkpoint(path)["threshold"], found["base"]["miou"]
    assert base[str(threshold)] == max(base.values())
    assert f"threshold {threshold:g} is best on held-out episodes of base classes" in trained
    save_checkpoint(path, load_checkpoint(path) | {"threshold": 0.3})
    assert NTRESegmenter.from_checkpoint(path, "cpu").threshold == 0.3
    again = run(test_command, *checkpoint, "--out", tmp_path / "results.json")
    assert "mIoU at 0.3, the threshold chosen on base classes" in again
    calibrated = json.loads((tmp_path / "results.json").read_text())
    assert calibrated["miou"] == scored["miou"]
    assert calibrated["calibrated"]["miou"]["mean"] == pytest.approx(found["novel"]["miou"]["0.3"], abs=0.1)

    config, hardware = load_config(ROOT / CONFIG, list(map(str, options))), find_hardware("cpu", "fp32")
    index, model = build_index(config, "val"), build_saved_model(config, load_checkpoint(path), path)
    sampler = build_eval_sampler(config, index, 0)
    episodes = [sampler(number) for number in range(6)]
    told = better_of(model, 0.5, index, episodes, config=config, hardware=hardware)
    figures = [float(figure) for figure in re.findall(r"\d+\.\d", told)]
    seen = len({episode.class_id for episode in episodes}) / 5  # classes that no episode shows count in neither
    free = scored["baselines"]["training_free_edges"]["miou"]
    assert figures == pytest.approx([scored["miou"]["mean"] / seen, free / seen], abs=0.2)
    assert told.startswith("warning: ") and "what needs no training is the better of the two" in told


def test_a_threshold_is_chosen_on_base_classes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path, train=1, val=60, seed=0)
    options = [f"data.root={tmp_path}", f"data.val_list={tmp_path / 'lists/val.txt'}", "data.min_area=256"]
    config = load_config(ROOT / CONFIG, options)
    index, seen = build_index(config, "val"), list[int]()

    def counted(_model: object, _index: object, episodes: list[EpisodeFiles], **_options: object) -> Counts:
        """Target pixels at a probability of 0.15, all others at 0.08: best cut at 0.1."""
        seen.extend(episode.class_id for episode in episodes)
        histogram = np.zeros((len(episodes), 3, len(EDGES) + 1), int)
        for region, probability in enumerate((0.15, 0.08, 0.08)):
            histogram[:, region, np.digitize(np.log(probability / (1 - probability)), EDGES)] = 10
        return Counts(histogram, np.zeros((len(episodes), 3)), np.array([e.class_id for e in episodes]))

    monkeypatch.setattr(diagnosis, "count", counted)
    model, hardware = build_model(config, "random")[0], find_hardware("cpu", "fp32")
    assert diagnosis.calibrated_threshold(model, index, config=config, hardware=hardware) == 0.1
    assert len(seen) == 200 and set(seen) <= set(range(6, 21)) and len(set(seen)) > 10
    rare = config.model_copy(update={"data": config.data.model_copy(update={"min_area": 10**9})})
    assert diagnosis.calibrated_threshold(model, index, config=rare, hardware=hardware) == 0.5
