"""test.py, end to end, against an evaluation by hand: episode by episode, files read with Pillow, counts in numpy."""

import itertools
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.harness import (
    NOVEL,
    Result,
    beside_progress_bars,
    call,
    evaluated,
    load,
    sha256,
    succeeded,
    test_command,
)
from util.config import Config, load_config
from util.data.episodes import EpisodeSampler
from util.engine.build import build_eval_sampler, build_index, build_model
from util.engine.panels import GAP, TILE
from util.photos.segmenter import TrainingFreeSegmenter

Tested = tuple[Result, dict[str, Any]]


@pytest.fixture(scope="module")
def mixed(short: Path, config: Path) -> Path:
    """The trained checkpoint with its last layer moved so that about half of all pixels, and of targets, is predicted.

    After a few steps a network predicts next to nothing; then all scores are 0 and every comparison holds.
    """
    state = load(short / "last.pt")
    settings = load_config(config)
    model, _ = build_model(settings, "random")
    model.load_state_dict(state["model"])
    sampler = build_eval_sampler(settings, build_index(settings, "val"), 0)
    scores, targets = [], []
    for number in range(8):
        logits, _, truth, class_id = episode_logits(model.eval(), sampler, number)
        scores.append(at_original_size(logits, truth)[truth != 255])
        targets.append(truth[truth != 255] == class_id)
    values, on_target = np.concatenate(scores), np.concatenate(targets)
    sign = 1 if values[on_target].mean() > values[~on_target].mean() else -1
    state["model"]["fem.classifier.3.weight"] *= sign
    state["model"]["fem.classifier.3.bias"] *= sign
    state["model"]["fem.classifier.3.bias"] -= float(np.median(sign * values))
    path = config.parent / "mixed.pt"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def tested(mixed: Path, config: Path) -> Tested:
    """test.py with three seeds and baselines: its ending and results."""
    out = config.parent / "out/results.json"
    arguments = ["--seeds", 0, 1, 2, "--episodes", 6, "--baselines", "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingFreeSegmenter, "SIDE", 129)  # a ninth of the work
        result = succeeded(call(test_command, "--config", config, "--checkpoint", mixed, *arguments))
    return result, json.loads(out.read_text())


def fitted(mask: np.ndarray) -> tuple[int, int]:
    """Height and width in the network's square of 65: the longer side fills it, both rounded down to 8."""
    height, width = mask.shape
    return 65 * height // max(height, width) // 8 * 8, 65 * width // max(height, width) // 8 * 8


def at_original_size(logits: torch.Tensor, truth: np.ndarray) -> np.ndarray:
    """Of logits (1, 65, 65) the part that shows the image, at the size of its mask."""
    height, width = fitted(truth)
    return F.interpolate(logits[None, :, :height, :width], truth.shape, mode="bilinear")[0, 0].numpy()


def episode_logits(
    model: torch.nn.Module, sampler: EpisodeSampler, number: int
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, int]:
    """Logits (1, S, S) and prior (1, h, w) of one episode, the query's mask as it is on disk, and the class."""
    files = sampler(number)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images, masks = [], []
    for place in (files.query, *files.supports):
        item = sampler.index.items[place]
        labels = np.array(Image.open(item.mask))
        binary = np.where(labels == 255, 255, labels == files.class_id).astype(np.uint8)
        height, width = fitted(binary)
        picture, mask = np.zeros((65, 65, 3), np.uint8), np.full((65, 65), 255, np.uint8)
        picture[:height, :width] = cv2.resize(np.array(Image.open(item.image)), (width, height))
        mask[:height, :width] = cv2.resize(binary, (width, height), interpolation=cv2.INTER_NEAREST)
        images.append(((picture / 255 - mean) / std).transpose(2, 0, 1))
        masks.append(mask)
    tensor = torch.tensor(np.stack(images), dtype=torch.float32)
    with torch.inference_mode():
        output = model(tensor[:1], tensor[None, 1:], torch.tensor(np.stack(masks[1:]))[None])
    truth = np.array(Image.open(sampler.index.items[files.query].mask))
    return output.logits[0], output.prior[0], truth, files.class_id


def scores_by_hand(settings: Config, checkpoint: Path, seed: int, episodes: int) -> dict[str, Any]:
    """miou, fb_iou, precision, per_class and the baselines' miou in percent."""
    model, _ = build_model(settings, "random")
    model.load_state_dict(load(checkpoint)["model"])
    model.eval()
    sampler = build_eval_sampler(settings, build_index(settings, "val"), seed)
    counts = {name: np.zeros((5, 2, 2)) for name in ("network", "prior", "all_foreground")}  # class, truth, prediction
    for number in range(episodes):
        logits, prior, truth, class_id = episode_logits(model, sampler, number)
        prior = F.interpolate(prior[None] - 0.5, size=(65, 65), mode="bilinear", align_corners=True)
        for name, map_ in (("network", logits), ("prior", prior[0]), ("all_foreground", torch.ones(1, 65, 65))):
            predicted = at_original_size(map_, truth) > 0
            for actual, guess in itertools.product((0, 1), (0, 1)):
                where = (truth != 255) & ((truth == class_id) == actual) & (predicted == guess)
                counts[name][class_id - 1, actual, guess] += where.sum()

    def iou(table: np.ndarray, of: int) -> float:
        union = table[of].sum() + table[:, of].sum() - table[of, of]
        return 100 * table[of, of] / union if union else 0.0

    total = counts["network"].sum(0)
    return {
        "per_class": {name: iou(table, 1) for name, table in zip(NOVEL, counts["network"], strict=True)},
        "miou": statistics.fmean(iou(table, 1) for table in counts["network"]),
        "fb_iou": (iou(total, 0) + iou(total, 1)) / 2,
        "precision": 100 * total[1, 1] / total[:, 1].sum(),
        "baselines": {
            name: statistics.fmean(iou(table, 1) for table in counts[name]) for name in ("prior", "all_foreground")
        },
    }


def test_results_tell_what_was_evaluated(tested: Tested, config: Path, mixed: Path, tiny: Path) -> None:
    _, results = tested
    expected = {"dataset": "Synthetic-5i", "fold": 0, "folds": 4, "shots": 1, "episodes": 6, "seeds": [0, 1, 2]}
    assert {key: results[key] for key in expected} == expected
    assert results["backbone"] == "efficientnet_lite0"
    assert results["config"] == load_config(config, ["eval.episodes=6", "train.epochs=1"]).model_dump()
    assert results["checkpoint_sha256"] == sha256(mixed)
    assert results["list_sha256"] == sha256(tiny / "lists/val.txt")
    assert results["environment"]["torch"] == torch.__version__


def test_mean_and_deviation_are_those_of_the_seeds(tested: Tested) -> None:
    _, results = tested
    for name in ("miou", "fb_iou", "precision"):
        per_seed = results[name]["per_seed"]
        assert len(set(per_seed)) == 3
        assert results[name]["mean"] == pytest.approx(statistics.mean(per_seed))
        assert results[name]["std"] == pytest.approx(statistics.stdev(per_seed))
    assert list(results["per_class"]) == NOVEL
    assert results["miou"]["mean"] == pytest.approx(statistics.mean(results["per_class"].values()))


def test_an_evaluation_by_hand_gives_the_same_scores(tested: Tested, config: Path, mixed: Path) -> None:
    _, results = tested
    seeds = [scores_by_hand(load_config(config), mixed, seed, episodes=6) for seed in (0, 1, 2)]
    assert min(seed["miou"] for seed in seeds) > 1  # else the comparison would say nothing
    for name in ("miou", "fb_iou", "precision"):
        assert results[name]["per_seed"] == pytest.approx([seed[name] for seed in seeds], abs=0.01)
    for name in NOVEL:
        mean = statistics.mean(seed["per_class"][name] for seed in seeds)
        assert results["per_class"][name] == pytest.approx(mean, abs=0.01)
    assert set(results["baselines"]) == {"all_foreground", "prior", "training_free", "training_free_edges"}
    for name in ("all_foreground", "prior"):
        scores, values = results["baselines"][name], [seed["baselines"][name] for seed in seeds]
        assert scores["miou"]["per_seed"] == pytest.approx(values, abs=0.01)
    assert results["baselines"]["all_foreground"]["miou"] != results["baselines"]["prior"]["miou"]
    longer = scores_by_hand(load_config(config), mixed, 0, episodes=7)
    assert abs(longer["fb_iou"] - seeds[0]["fb_iou"]) > 0.01  # one episode more would show


def test_three_shots_on_a_one_shot_checkpoint_score_as_by_hand(config: Path, mixed: Path, tmp_path: Path) -> None:
    results = evaluated(config, mixed, tmp_path / "r.json", "--shots", 3, "--episodes", 6)
    by_hand = scores_by_hand(load_config(config, ["data.shots=3"]), mixed, seed=0, episodes=6)
    assert results["shots"] == 3
    for name in ("miou", "fb_iou", "precision"):
        assert results[name]["mean"] == pytest.approx(by_hand[name], abs=0.01)


def test_neither_memory_nor_batches_nor_workers_change_a_score(config: Path, mixed: Path, tmp_path: Path) -> None:
    results = [
        evaluated(config, mixed, tmp_path / f"{i}.json", "--episodes", 8, "--shots", 3, "--seeds", 0, 1, *overrides)
        for i, overrides in enumerate(([], ["eval.cache_gib=1e-9"], ["eval.batch_size=1", "workers=1"]))
    ]
    a_few_pixels = 0.005  # percent: convolutions round otherwise in a batch, which can turn a pixel that stands at 0
    for other in results[1:]:
        for name in ("miou", "fb_iou", "precision"):
            assert other[name]["per_seed"] == pytest.approx(results[0][name]["per_seed"], abs=a_few_pixels)
        assert other["per_class"] == pytest.approx(results[0]["per_class"], abs=a_few_pixels)


def test_the_table_names_fold_classes_and_scores(tested: Tested) -> None:
    result, results = tested
    assert "Synthetic-5i fold 0 of 4, 1-shot, efficientnet_lite0: 6 episodes, seeds 0, 1, 2" in result.out
    for name in NOVEL:
        assert re.search(rf"^ +{name} +{results['per_class'][name]:.1f}$", result.out, re.MULTILINE)
    miou = results["miou"]
    assert re.search(rf"^ +mIoU +{miou['mean']:.1f} ± {miou['std']:.1f}", result.out, re.MULTILINE)
    prior = results["baselines"]["prior"]["miou"]
    assert re.search(rf"prior +{prior['mean']:.1f} ± {prior['std']:.1f}", result.out)
    assert beside_progress_bars(result.err) == []


def test_panels_show_the_best_worst_and_random_episodes(config: Path, mixed: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run/best.pt"
    checkpoint.parent.mkdir()
    shutil.copy(mixed, checkpoint)
    command = ["--config", config, "--checkpoint", checkpoint, "--episodes", 9, "--panel", tmp_path / "panel.png"]
    result = succeeded(call(test_command, *command, "--save-panels", 2))
    assert min(Image.open(tmp_path / "panel.png").size) > 4 * TILE  # four episodes, at least four tiles each
    folder = checkpoint.parent / "panels"
    assert str(folder / "contact_sheet.png") in result.out
    names = sorted(path.name for path in folder.iterdir())
    assert [name.split("_")[:2] for name in names if name != "contact_sheet.png"] == [
        [kind, rank] for kind in ("best", "random", "worst") for rank in "12"
    ]
    for name in names:  # six columns
        assert Image.open(folder / name).width == 6 * (TILE + GAP) + GAP
