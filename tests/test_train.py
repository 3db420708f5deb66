"""train.py, end to end: the files that a run leaves, what it repeats exactly, and what its switches change.

Expected values are computed here from files, from hashlib and from the paper's formulas, never recorded.
"""

import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from tests.harness import (
    NOVEL,
    Run,
    beside_progress_bars,
    call,
    differences,
    evaluated,
    events,
    json_lines,
    load,
    scalars,
    sha256,
    short_run,
    succeeded,
)
from util.config import load_config
from util.engine import validation
from util.engine.build import build_index, build_train_sampler

BATCH, EPOCHS, LR, WARMUP, MIN_AREA = 2, 2, 0.03, 4, 256
"""of the tests' config"""
LOSSES = ("total", "final", "initial", "fem_aux", "bg", "pcl", "base", "dice")


@pytest.fixture(scope="module")
def steps(tiny: Path) -> int:
    """Steps of one epoch: as many complete batches as there are images in which a base class is large enough."""
    images = 0
    for path in sorted((tiny / "SegmentationClassAug").glob("train_*.png")):
        counts = np.bincount(np.array(Image.open(path)).ravel(), minlength=256)
        images += counts[6:21].max() >= MIN_AREA
    return int(images) // BATCH


def test_a_run_leaves_its_checkpoints_records_and_events_and_nothing_else(run: Run, config: Path, tiny: Path) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"config.yaml", "run.json", "metrics.jsonl", "last.pt", "previous.pt", "best.pt", "tensorboard"}
    given = load_config(config, [f"run_dir={run.folder}"])
    assert load_config(run.folder / "config.yaml") == given
    assert load(run.folder / "last.pt")["config"] == given.model_dump()
    record = json.loads((run.folder / "run.json").read_text())
    assert (record["torch"], record["seed"], record["resumed_at_step"]) == (torch.__version__, 0, 0)
    assert record["list_sha256"] == {str(path): sha256(path) for path in sorted((tiny / "lists").glob("*.txt"))}
    assert record["weights"]["sha256"] == sha256(Path(record["weights"]["source"]))


def test_every_validation_leaves_one_json_line_with_the_scores_of_test_py(
    run: Run, config: Path, steps: int, tmp_path: Path
) -> None:
    lines = json_lines(run.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [steps, EPOCHS * steps]
    for line in lines:
        assert list(line["per_class"]) == NOVEL
        assert line["miou"] == pytest.approx(statistics.fmean(line["per_class"].values()))
    results = evaluated(config, run.folder / "last.pt", tmp_path / "r.json", "--seeds", 0)
    for name in ("miou", "fb_iou", "precision"):
        assert results[name]["mean"] == pytest.approx(100 * lines[-1][name], abs=1e-6)


@pytest.mark.parametrize(
    ("select", "hits", "epoch"), [("miou", (10, 90, 20), 2), ("miou", (0, 0, 0), 3), ("last", (10, 90, 20), 3)]
)
def test_best_is_the_checkpoint_that_the_config_selects(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, hits: tuple[int, ...], epoch: int
) -> None:
    """Of zeros the last one: then nothing is predicted at 0.5 yet, and a line says so."""
    found = iter(hits)  # of the 100 pixels of each target
    counts = (np.tile([50, 0, 100 - hit, hit], (8, 1)) for hit in found)
    monkeypatch.setattr(validation, "evaluate", lambda *_, **__: {"network": next(counts)})
    overrides = ["train.epochs=3", "train.batch_size=12", "data.image_size=33", f"eval.select={select}"]
    result = succeeded(call(train, "--config", config, f"run_dir={tmp_path}", *overrides))
    best, last = load(tmp_path / "best.pt"), load(tmp_path / "last.pt")
    assert best["step"] == epoch * last["step"] / 3 > 0
    assert best["best_miou"] == max(line["miou"] for line in json_lines(tmp_path / "metrics.jsonl"))
    assert "optimizer" not in best
    assert {"miou": "highest novel-fold mIoU", "last": "best.pt is the last checkpoint"}[select] in result.out
    assert (result.out + result.err).count("nothing is predicted at 0.5") == hits.count(0)


def test_tensorboard_holds_every_loss_term_and_the_learning_rate_of_every_step(run: Run, steps: int) -> None:
    recorded, steps = scalars(run.folder), EPOCHS * steps
    for name in LOSSES:
        assert [step for step, _ in recorded[f"loss/{name}"]] == list(range(1, steps + 1))
        assert all(math.isfinite(value) for _, value in recorded[f"loss/{name}"])
    total, final, initial, aux, bg, pcl, *_ = ([value for _, value in recorded[f"loss/{name}"]] for name in LOSSES)
    assert all(max(values) > 0 for values in (final, initial, aux, bg, pcl))
    weighted = [
        0.6 * i + f + 0.4 * a + b + 0.01 * p for f, i, a, b, p in zip(final, initial, aux, bg, pcl, strict=True)
    ]
    assert total == pytest.approx(weighted, rel=1e-5)  # eq. 11 with beta = lambda = 1, gamma = 0.01
    decay = [LR * (1 - step / steps) ** 0.9 for step in range(steps)]
    rise = [min(1, (step + 1) / WARMUP) for step in range(steps)]
    assert [lr for _, lr in recorded["lr"]] == pytest.approx([d * r for d, r in zip(decay, rise, strict=True)])


def test_tensorboard_holds_scores_and_an_image_of_each_validation(run: Run) -> None:
    recorded, lines = scalars(run.folder), json_lines(run.folder / "metrics.jsonl")
    for name in ("miou", "fb_iou", "precision"):
        assert recorded[f"val/{name}"] == [(line["step"], pytest.approx(line[name])) for line in lines]
    assert recorded.keys() >= {f"val_iou/{name}" for name in NOVEL}
    found = events(run.folder)
    (tag,) = found.Tags()["images"]
    assert [image.step for image in found.Images(tag)] == [line["step"] for line in lines]


def test_the_screen_names_device_selection_rule_classes_and_weights(run: Run, tiny: Path, steps: int) -> None:
    (_, out, err), record = run.result, json.loads((run.folder / "run.json").read_text())
    assert "fold 0 of 4, 1-shot, efficientnet_lite0 on cpu, float32" in out
    assert ", ".join(NOVEL) in out and str(run.folder) in out
    assert record["weights"]["source"] in out and record["weights"]["sha256"][:16] in out
    assert all(str(tiny / f"lists/{split}.txt") in out for split in ("train", "val"))
    assert re.search(rf"step {steps}: mIoU", out + err) and re.search(rf"step {EPOCHS * steps}: mIoU", out + err)
    assert beside_progress_bars(err) == [] and "loss=" not in out


def test_an_epoch_changes_every_trained_weight_and_none_of_the_backbone(run: Run) -> None:
    before, after = (load(run.folder / name)["model"] for name in ("previous.pt", "last.pt"))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if not name.startswith("backbone.")} - {"middle_scale"}


def test_the_same_seed_gives_identical_weights_with_0_or_2_workers(short: Path, config: Path, tmp_path: Path) -> None:
    again = short_run(config, tmp_path, "workers=2")
    for part in ("model", "loss", "optimizer", "random"):
        assert differences(load(short / "last.pt")[part], load(again / "last.pt")[part]) == []


def test_another_seed_gives_other_weights(short: Path, config: Path, tmp_path: Path) -> None:
    other = load(short_run(config, tmp_path, "seed=1") / "last.pt")["model"]
    different = differences(load(short / "last.pt")["model"], other)
    assert any("fem." in name for name in different) and not any("backbone." in name for name in different)


def test_how_often_and_with_which_batches_is_validated_changes_no_weights(
    run: Run, config: Path, steps: int, tmp_path: Path
) -> None:
    overrides = ["eval.every=2", "eval.batch_size=1", f"run_dir={tmp_path}"]
    succeeded(call(train, "--config", config, *overrides))
    first, second = load(run.folder / "last.pt"), load(tmp_path / "last.pt")
    assert differences(first["model"], second["model"]) == []
    assert [line["step"] for line in json_lines(tmp_path / "metrics.jsonl")] == [EPOCHS * steps]


@pytest.mark.parametrize(
    ("overrides", "parts", "terms"),
    [
        (
            ["model.base_learner=true", "loss.pcl=0"],
            {"bgmm", "eliminations", "base_learner"},
            {"base", "initial", "bg"},
        ),
        (["loss.pcl=0", "model.doem=false", "model.bgem=false"], set(), set()),
    ],
    ids=["base learner without pcl", "pfenet"],
)
def test_an_ablation_trains_and_evaluates_with_its_parts_and_losses_alone(
    config: Path, tmp_path: Path, overrides: list[str], parts: set[str], terms: set[str]
) -> None:
    folder = short_run(config, tmp_path / "run", *overrides)
    state = load(folder / "last.pt")
    always = {"backbone", "reduce_query", "reduce_support", "fem", "middle_scale"}
    assert {name.split(".")[0] for name in state["model"]} - always == parts
    assert (state["loss"] == {}) == ("pcl" not in terms)
    recorded = scalars(folder)
    for name in ("initial", "bg", "pcl", "base"):
        assert any(value for _, value in recorded[f"loss/{name}"]) == (name in terms)
    (line,) = json_lines(folder / "metrics.jsonl")
    results = evaluated(config, folder / "last.pt", tmp_path / "r.json", "--episodes", 4, *overrides)
    assert results["fb_iou"]["mean"] == pytest.approx(100 * line["fb_iou"], abs=1e-4)


def episodes_per_class(config: Path, steps: int, *overrides: str) -> list[int]:
    """Episodes of one epoch of training, for each base class of fold 0."""
    settings = load_config(config, overrides)
    sampler = build_train_sampler(settings, build_index(settings, "train"))
    drawn = [sampler(number).class_id for number in range(steps * BATCH)]
    return [drawn.count(c) for c in range(6, 21)]


def test_two_shot_training_stores_both_supports(config: Path, steps: int, tmp_path: Path) -> None:
    overrides = ["data.shots=2", "loss.pcl_negatives=non_target"]
    state = load(short_run(config, tmp_path / "run", *overrides) / "last.pt")
    stored, episodes = state["loss"]["bank.stored"].tolist(), episodes_per_class(config, steps, *overrides)
    assert all(2 * drawn <= count <= 3 * drawn for count, drawn in zip(stored, episodes, strict=True))
    results = evaluated(config, tmp_path / "run/best.pt", tmp_path / "r.json", "--shots", 1, "--episodes", 3)
    assert results["shots"] == 1
