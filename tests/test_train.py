"""train.py, end to end: what a run leaves behind, what it repeats exactly, and what its switches change.

Expected values are computed here from files, from hashlib and from the paper's formulas, never recorded.
"""

import io
import itertools
import json
import math
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tqdm import tqdm
from util.engine.events import Events
from util.engine.monitor import BAR

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
from util.data.dataset import Episode, EpisodeDataset
from util.engine.build import build_index, build_train_sampler
from util.engine.metrics import Scores

BATCH, EPOCHS, LR, WARMUP, MIN_AREA = 2, 2, 0.03, 4, 256
"""of the tests' config"""
LOSSES = ("total", "final", "initial", "fem_aux", "bg", "pcl", "base")


@pytest.fixture(scope="module")
def steps(tiny: Path) -> int:
    """Steps of one epoch: as many whole batches as there are images in which a base class is large enough."""
    images = 0
    for path in sorted((tiny / "SegmentationClassAug").glob("train_*.png")):
        counts = np.bincount(np.array(Image.open(path)).ravel(), minlength=256)
        images += counts[6:21].max() >= MIN_AREA
    return int(images) // BATCH


# ---------------------------------------------------------------- files


def test_a_run_leaves_its_checkpoints_records_and_events_and_nothing_else(run: Run) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"config.yaml", "run.json", "metrics.jsonl", "last.pt", "previous.pt", "best.pt", "tensorboard"}
    (path,) = (run.folder / "tensorboard").iterdir()
    assert path.name.startswith("events.out.tfevents.")


def test_the_saved_config_loads_again_and_equals_the_one_that_was_given(run: Run, config: Path) -> None:
    given = load_config(config, [f"run_dir={run.folder}"])
    assert load_config(run.folder / "config.yaml") == given
    assert load(run.folder / "last.pt")["config"] == given.model_dump()


def test_the_record_of_a_run_names_versions_seed_and_hashes(run: Run, tiny: Path) -> None:
    record = json.loads((run.folder / "run.json").read_text())
    assert (record["python"], record["torch"]) == (platform.python_version(), torch.__version__)
    assert (record["seed"], record["resumed_at_step"]) == (0, 0)
    lists = [str(tiny / "lists/train.txt"), str(tiny / "lists/val.txt")]
    assert record["list_sha256"] == {path: sha256(Path(path)) for path in lists}
    assert record["weights"]["sha256"] == sha256(Path(record["weights"]["source"]))
    assert "train.py" in record["command"][0] and f"run_dir={run.folder}" in record["command"]


def test_the_backbone_in_the_checkpoint_is_the_one_in_the_weights_file(run: Run) -> None:
    record = json.loads((run.folder / "run.json").read_text())
    saved, state = load(Path(record["weights"]["source"])), load(run.folder / "last.pt")["model"]
    for ours, conv, norm in (
        ("backbone.stem.0", "_conv_stem", "_bn0"),
        ("backbone.stage4.2._project_conv", "_blocks.10._project_conv", "_blocks.10._bn2"),
    ):
        weight, bias, mean, variance = (
            saved[f"{norm}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / (variance + 1e-3).sqrt()
        torch.testing.assert_close(state[f"{ours}.weight"], saved[f"{conv}.weight"] * scale[:, None, None, None])
        torch.testing.assert_close(state[f"{ours}.bias"], bias - mean * scale)


def test_every_evaluation_leaves_one_json_line_with_the_scores_of_test_py(
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


@pytest.mark.parametrize(("select", "epoch"), [("miou", 2), ("last", 3)])
def test_best_is_what_the_config_selects(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, epoch: int
) -> None:
    scores = iter([0.1, 0.9, 0.9])  # the first of equals is kept
    fake = {"fb_iou": 0.5, "precision": 0.5, "per_class": {}}
    monkeypatch.setattr(train, "scores", lambda *_: Scores(miou=next(scores), **fake))
    overrides = ["train.epochs=3", "train.batch_size=12", "data.image_size=33", f"eval.select={select}"]
    result = succeeded(call(train, "--config", config, f"run_dir={tmp_path}", *overrides))
    best, last = load(tmp_path / "best.pt"), load(tmp_path / "last.pt")
    assert best["step"] == epoch * last["step"] / 3 > 0
    assert best["best_miou"] == 0.9 and "optimizer" not in best
    rule = {"miou": "highest novel-fold mIoU", "last": "best.pt is the last checkpoint"}
    assert rule[select] in result.out


# ---------------------------------------------------------------- TensorBoard and the screen


def test_tensorboard_holds_every_loss_term_and_the_learning_rate_of_every_step(run: Run, steps: int) -> None:
    recorded, steps = scalars(run.folder), EPOCHS * steps
    for name in LOSSES:
        assert [step for step, _ in recorded[f"loss/{name}"]] == list(range(1, steps + 1))
        assert all(math.isfinite(value) for _, value in recorded[f"loss/{name}"])
    total, final, initial, aux, bg, pcl, _ = ([value for _, value in recorded[f"loss/{name}"]] for name in LOSSES)
    assert all(max(values) > 0 for values in (final, initial, aux, bg, pcl))
    weighted = [i + f + 0.4 * a + b + 0.01 * p for f, i, a, b, p in zip(final, initial, aux, bg, pcl, strict=True)]
    assert total == pytest.approx(weighted, rel=1e-5)  # eq. 11 with beta = lambda = 1, gamma = 0.01
    decay = [LR * (1 - step / steps) ** 0.9 for step in range(steps)]
    rise = [min(1, (step + 1) / WARMUP) for step in range(steps)]
    assert [step for step, _ in recorded["lr"]] == list(range(1, steps + 1))
    assert [lr for _, lr in recorded["lr"]] == pytest.approx([d * r for d, r in zip(decay, rise, strict=True)])


def test_tensorboard_holds_scores_classes_speed_memory_the_config_and_a_picture(run: Run, steps: int) -> None:
    recorded, lines = scalars(run.folder), json_lines(run.folder / "metrics.jsonl")
    for name in ("miou", "fb_iou", "precision"):
        assert recorded[f"val/{name}"] == [(line["step"], pytest.approx(line[name])) for line in lines]
    for name in NOVEL:
        expected = [(line["step"], pytest.approx(line["per_class"][name])) for line in lines]
        assert recorded[f"val_iou/{name}"] == expected
    for name in ("episodes_per_second", "peak_memory_mib"):
        assert [step for step, _ in recorded[name]] == [steps, EPOCHS * steps]
        assert all(value > 0 for _, value in recorded[name])
    found = events(run.folder)
    (text,) = found.Tensors("config/text_summary")
    (shown,) = (value.decode() for value in text.tensor_proto.string_val)
    assert yaml.safe_load(shown) == yaml.safe_load((run.folder / "config.yaml").read_text())
    (tag,) = found.Tags()["images"]
    pictures = found.Images(tag)
    assert [picture.step for picture in pictures] == [line["step"] for line in lines]
    assert np.array(Image.open(io.BytesIO(pictures[-1].encoded_image_string))).std() > 10


def test_the_gradient_norm_is_that_of_all_trained_weights(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    step = torch.optim.SGD.step

    def measured(self: torch.optim.SGD, *arguments: Any) -> Any:
        gradients = [p.grad.double().flatten() for group in self.param_groups for p in group["params"]]
        found.append(float(torch.cat(gradients).norm()))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", measured)
    short_run(config, tmp_path)
    assert [norm for _, norm in scalars(tmp_path)["gradient_norm"]] == pytest.approx(found, rel=1e-4)


def test_the_progress_bar_fits_100_columns() -> None:
    """At the longest of 200 epochs of PASCAL-5i: nothing is cut, the loss comes first."""
    line = tqdm.format_meter(
        n=29_800, total=37_200, elapsed=36_753, ncols=100, prefix="epoch 160/200", unit="step",
        bar_format=BAR, postfix="loss=12.345, lr=0.0300, waiting=13%", rate=1 / 1.23,
    )  # fmt: skip
    assert len(line) <= 100 and line.endswith(", loss=12.345, lr=0.0300, waiting=13%]")


def test_the_screen_says_device_selection_rule_classes_and_weights(run: Run, steps: int) -> None:
    (_, out, err), record = run.result, json.loads((run.folder / "run.json").read_text())
    for words in ("on cpu", "1-shot", "best.pt is the checkpoint with the highest novel-fold mIoU", "fold 0 of 4"):
        assert words in out
    assert re.search("fp32|float32", out)
    assert ", ".join(NOVEL) in out and str(run.folder) in out
    assert record["weights"]["source"] in out and record["weights"]["sha256"][:16] in out
    for path in record["list_sha256"]:
        assert f"list {path}, {len(Path(path).read_text().splitlines())} lines: unknown" in out
    assert f"step {steps}: mIoU" in out and f"step {EPOCHS * steps}: mIoU" in out
    assert re.search(rf"epoch 2/2: .*\d+/{EPOCHS * steps} .*step/?s?, loss=\d+\.\d+, lr=0\.\d+", err)
    assert beside_progress_bars(err) == [] and "loss=" not in out


def test_a_line_says_when_the_loader_is_the_limit(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = EpisodeDataset.__getitem__

    def slow(self: EpisodeDataset, number: int) -> Episode:
        time.sleep(0.15)
        return read(self, number)

    monkeypatch.setattr(EpisodeDataset, "__getitem__", slow)
    overrides = [f"run_dir={tmp_path}/run", "workers=0", "train.epochs=1", "eval.episodes=1"]
    said = re.findall(
        r"epoch 1: (\d+)% of the time went to waiting for images", call(train, "--config", config, *overrides).out
    )
    assert 25 <= int(said[0]) <= 100


# ---------------------------------------------------------------- weights


def test_an_epoch_changes_every_trained_weight_and_none_of_the_backbone(run: Run) -> None:
    before, after = (load(run.folder / name)["model"] for name in ("previous.pt", "last.pt"))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if not name.startswith("backbone.")}


def test_the_same_seed_gives_identical_weights_with_0_or_2_workers(short: Path, config: Path, tmp_path: Path) -> None:
    again = short_run(config, tmp_path, "workers=2")
    for part in ("model", "criterion", "optimizer", "random"):
        assert differences(load(short / "last.pt")[part], load(again / "last.pt")[part]) == []


def test_another_seed_gives_other_weights(short: Path, config: Path, tmp_path: Path) -> None:
    other = load(short_run(config, tmp_path, "seed=1") / "last.pt")["model"]
    different = differences(load(short / "last.pt")["model"], other)
    assert any("fem." in name for name in different)
    assert {name for name in different if "backbone." in name} == {".backbone.middle_scale"}  # of another first batch


def test_how_often_and_with_which_batches_is_evaluated_changes_no_weights(
    run: Run, config: Path, steps: int, tmp_path: Path
) -> None:
    overrides = ["eval.every=2", "eval.batch_size=1", f"run_dir={tmp_path}"]
    succeeded(call(train, "--config", config, *overrides))
    first, second = load(run.folder / "last.pt"), load(tmp_path / "last.pt")
    assert differences(first["model"], second["model"]) == []
    assert [line["step"] for line in json_lines(tmp_path / "metrics.jsonl")] == [EPOCHS * steps]


def test_of_two_starts_within_a_second_the_later_ones_events_count(tmp_path: Path, config: Path) -> None:
    time.sleep(1 - time.time() % 1)  # both fit into this second
    for pid, values in ((9, [1.0]), (10, [2.0, 3.0])):  # the name of the second, with 10, would come before that of 9
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.getpid", lambda pid=pid: pid)
            written = Events(tmp_path / "tensorboard", load_config([config], []), 0)
        for step, value in enumerate(values, 1):
            written.scalars(step, {"loss": value})
        written.close()
    assert [value for _, value in scalars(tmp_path)["loss"]] == [2.0, 3.0]


# ---------------------------------------------------------------- ablations and losses


@pytest.mark.parametrize(
    ("overrides", "parts", "terms"),
    [
        pytest.param(
            ["model.elimination=per_scale"],
            {"bgmm", "eliminations"},
            {"initial", "bg", "pcl"},
            marks=pytest.mark.slow,
        ),
        (["model.elimination=authors"], {"bgmm", "eliminations"}, {"initial", "bg", "pcl"}),
        (
            ["model.base_learner=true", "loss.pcl=false"],
            {"bgmm", "eliminations", "base_learner"},
            {"initial", "bg", "base"},
        ),
        (["loss.pcl=false", "model.doem=false"], {"bgmm", "bgem"}, {"bg"}),
        (["loss.pcl=false", "model.doem=false", "model.bgem=false"], set(), set()),
    ],
    ids=["per scale", "authors", "base learner without pcl", "bgem", "neither"],
)
def test_an_ablation_trains_and_evaluates_with_its_parts_and_losses_alone(
    config: Path, tmp_path: Path, overrides: list[str], parts: set[str], terms: set[str]
) -> None:
    folder = short_run(config, tmp_path / "run", *overrides)
    state = load(folder / "last.pt")
    always = {"backbone", "reduce_query", "reduce_support", "fem"}
    assert {name.split(".")[0] for name in state["model"]} - always == parts
    assert (state["criterion"] == {}) == ("pcl" not in terms)
    recorded = scalars(folder)
    for name in ("initial", "bg", "pcl", "base"):
        assert any(value for _, value in recorded[f"loss/{name}"]) == (name in terms)
    (line,) = json_lines(folder / "metrics.jsonl")
    results = evaluated(config, folder / "last.pt", tmp_path / "r.json", "--episodes", 4, *overrides)
    assert results["fb_iou"]["mean"] == pytest.approx(100 * line["fb_iou"], abs=1e-4)


def episodes_per_class(config: Path, steps: int, *overrides: str) -> list[int]:
    """Of one epoch of training, for each base class of fold 0."""
    settings = load_config(config, overrides)
    sampler = build_train_sampler(settings, build_index(settings, "train"))
    drawn = [sampler(number).class_id for number in range(steps * BATCH)]
    return [drawn.count(c) for c in range(6, 21)]


def test_the_bank_keeps_other_prototypes_for_each_kind_of_negatives(
    short: Path, config: Path, steps: int, tmp_path: Path
) -> None:
    banks = [load(short / "last.pt")["criterion"]]
    for kind in ("bg", "non_target"):
        banks.append(load(short_run(config, tmp_path / kind, f"loss.pcl_negatives={kind}") / "last.pt")["criterion"])
    episodes = episodes_per_class(config, steps)
    for bank in banks:
        stored = bank["bank.stored"].tolist()
        assert sum(stored) > 0
        assert all(count <= 2 * drawn for count, drawn in zip(stored, episodes, strict=True))
    non_target = banks[2]["bank.stored"].tolist()  # every support image has pixels that are not the target
    assert all(count >= drawn for count, drawn in zip(non_target, episodes, strict=True))
    first = [bank["bank.prototypes"][:, 0] for bank in banks]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))


def test_two_shot_training_stores_both_supports(config: Path, steps: int, tmp_path: Path) -> None:
    overrides = ["data.shots=2", "loss.pcl_negatives=non_target"]
    state = load(short_run(config, tmp_path / "run", *overrides) / "last.pt")
    stored, episodes = state["criterion"]["bank.stored"].tolist(), episodes_per_class(config, steps, *overrides)
    assert all(2 * drawn <= count <= 3 * drawn for count, drawn in zip(stored, episodes, strict=True))
    results = evaluated(config, tmp_path / "run/best.pt", tmp_path / "r.json", "--shots", 1, "--episodes", 3)
    assert results["shots"] == 1
