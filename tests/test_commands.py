"""The real command lines, end to end: what they write, what they repeat exactly, and what they refuse and how.

A few runs go through ``python train.py`` as a process of its own; the others call the same ``main`` in this process.
Expected values are computed here from files, from hashlib and from the paper's formulas, never recorded.
"""

from util.command import run_command

import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import train
from util.config import Config, load_config
from util.data.dataset import Episode, EpisodeDataset
from util.data.episodes import EpisodeSampler
from util.data.synthetic import generate
from util.engine import loops
from util.engine.build import build_eval_sampler, build_index, build_model, build_train_sampler
from util.engine.metrics import Scores
from util.engine.monitor import BAR
from util.segment.visualize import GAP, TILE

ROOT = Path(__file__).resolve().parent.parent
TRAIN_IMAGES, VAL_IMAGES = 24, 32  # 3 and 4 images of each of the 20 classes
BATCH, EPOCHS, LR, WARMUP, MIN_AREA = 2, 2, 0.03, 4, 256
NOVEL = ["striped_star", "dotted_ring", "brick_arrow", "checked_heart", "cracked_leaf"]
"""classes 1 to 5: fold 0 of a contiguous scheme"""
LOSSES = ("total", "final", "initial", "fem_aux", "bg", "pcl", "base")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "https_proxy": "http://127.0.0.1:9",  # nothing listens there: a download fails at once
    "http_proxy": "http://127.0.0.1:9",
}

TINY = """\
base: {base}
data:
  root: {root}
  train_list: {root}/lists/train.txt
  val_list: {root}/lists/val.txt
  image_size: 65
  min_area: {min_area}
  rotation: 10
  scale: [0.75, 0.95]
model:
  backbone: efficientnet_lite0
  fem_scales: [1, 0.5]
  prototype_channels: 16
loss:
  bank_size: 50
train:
  epochs: {epochs}
  batch_size: {batch}
  lr: {lr}
  warmup: {warmup}
eval:
  episodes: 8
  batch_size: 4
  every: 1
  select: miou
  geometry: exact
precision: fp32
workers: 0
device: cpu
"""


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def _load_test_command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ntrenet_test_command", ROOT / "test.py")  # not Python's own 'test'
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


test_command = _load_test_command()


def process(*arguments: object) -> Result:
    """Run ``python arguments`` from the repository's root."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def call(module: ModuleType, *arguments: object) -> Result:
    """Run a command's ``main`` as its script does, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_command(module.main)
    assert isinstance(end.value.code, int)
    return Result(end.value.code, out.getvalue(), err.getvalue())


def beside_progress_bars(err: str) -> list[str]:
    """Lines of stderr, without tqdm's."""
    lines = (line.replace("\x1b[A", "").strip() for line in re.split(r"[\r\n]", err))
    return [line for line in lines if line and "%|" not in line]


def refused(result: Result, *pieces: object) -> str:
    """Assert that a command ended as refusals do, in one line that holds all of ``pieces``, and return the line."""
    assert result.code == 2, result
    assert "Traceback" not in result.out + result.err, result.err
    lines = beside_progress_bars(result.err)
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for piece in map(str, pieces):
        assert piece in lines[0], f"'{piece}' is not in '{lines[0]}'"
    return lines[0]


def succeeded(result: Result) -> Result:
    assert result.code == 0, result.err[-3000:]
    return result


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def differences(a: object, b: object, where: str = "") -> list[str]:
    """Places in which two nested records of tensors and plain values are not the same, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{where}.{key} only on one side" for key in a.keys() ^ b.keys()]
        return missing + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for n, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{where}[{n}]")]
    return [] if type(a) is type(b) and a == b else [f"{where}: {a!r} {b!r}"]


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (sha256(path), path.stat().st_mtime_ns) for path in files}


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every scalar in a run's TensorBoard events."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# Shared data and runs


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """pytest's, emptied after the test: a run leaves 100 MB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Root of a data set of a few images; ``tiny.yaml`` beside it is its config."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("commands") / "tiny"
    generate(root, TRAIN_IMAGES, VAL_IMAGES)
    config = root.parent / "tiny.yaml"
    text = TINY.format(
        base=ROOT / "configs/base/synthetic.yaml",
        root=root,
        min_area=MIN_AREA,
        epochs=EPOCHS,
        batch=BATCH,
        lr=LR,
        warmup=WARMUP,
    )
    config.write_text(text)
    yield root
    shutil.rmtree(root.parent)


@pytest.fixture(scope="session")
def config(tiny: Path) -> Path:
    return tiny.parent / "tiny.yaml"


@pytest.fixture(scope="session")
def steps(tiny: Path) -> int:
    """Steps of one epoch: as many whole batches as there are images in which a base class is large enough."""
    images = 0
    for path in sorted((tiny / "SegmentationClassAug").glob("train_*.png")):
        counts = np.bincount(np.array(Image.open(path)).ravel(), minlength=256)
        images += counts[6:21].max() >= MIN_AREA
    return int(images) // BATCH


class Run(NamedTuple):
    """A finished training run."""

    folder: Path
    result: Result


@pytest.fixture(scope="session")
def run(config: Path) -> Run:
    """Two epochs in one go, in a process of its own."""
    folder = config.parent / "run"
    return Run(folder, succeeded(process("train.py", "--config", config, f"run_dir={folder}")))


@pytest.fixture(scope="session")
def interrupted(config: Path) -> tuple[Run, Path]:
    """The same run with two loader workers, stopped by Ctrl-C in its second epoch; and a copy of its folder."""
    for attempt in range(4):  # where this process sleeps too long, the run is over before the signal
        folder = config.parent / f"interrupted{attempt}"
        command = [sys.executable, "train.py", "--config", str(config), f"run_dir={folder}", "workers=2"]
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while child.poll() is None and not (folder / "last.pt").exists():
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the loader's workers as well
        out, err = child.communicate(timeout=120)
        if child.returncode != 0:
            break
    stopped = shutil.copytree(folder, config.parent / "stopped")
    return Run(folder, Result(child.returncode, out, err)), stopped


@pytest.fixture(scope="session")
def resumed(interrupted: tuple[Run, Path], config: Path) -> Run:
    """The interrupted run, continued without workers."""
    folder = interrupted[0].folder
    return Run(folder, succeeded(process("train.py", "--config", config, f"run_dir={folder}", "resume=auto")))


def short_run(config: Path, folder: Path, *overrides: str) -> Path:
    """Train one epoch in this process."""
    succeeded(call(train, "--config", config, f"run_dir={folder}", "train.epochs=1", "eval.episodes=4", *overrides))
    return folder


@pytest.fixture(scope="session")
def short(config: Path) -> Path:
    return short_run(config, config.parent / "short")


@pytest.fixture(scope="session")
def mixed(run: Run, config: Path) -> Path:
    """The trained checkpoint with its last layer moved so that about half of all pixels, and of targets, is predicted.

    After a few steps a network predicts next to nothing; then all scores are 0 and every comparison holds.
    """
    state = load(run.folder / "last.pt")
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


@pytest.fixture(scope="session")
def tested(mixed: Path, config: Path) -> tuple[Result, dict[str, Any], Path]:
    """test.py in a process of its own: three seeds, baselines, picture; its ending, results and picture."""
    out, panel = config.parent / "out/results.json", config.parent / "out/panel.png"
    arguments = ["--seeds", 0, 1, 2, "--episodes", 6, "--baselines", "--out", out, "--panel", panel]
    result = succeeded(process("test.py", "--config", config, "--checkpoint", mixed, *arguments))
    return result, json.loads(out.read_text()), panel


def evaluated(config: Path, checkpoint: Path, out: Path, *arguments: object) -> dict[str, Any]:
    """Results of test.py, in this process; arguments with '=' are overrides."""
    options = [argument for argument in arguments if "=" not in str(argument)]
    overrides = [argument for argument in arguments if "=" in str(argument)]
    command = ["--config", config, "--checkpoint", checkpoint, *options, "--out", out, *overrides]
    succeeded(call(test_command, *command))
    return json.loads(out.read_text())


# Evaluation by hand: one episode at a time, files read with Pillow, counts in numpy


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


# train.py: what a run leaves behind


def test_a_run_leaves_its_checkpoints_records_and_events_and_nothing_else(run: Run) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"config.yaml", "run.json", "metrics.jsonl", "last.pt", "previous.pt", "best.pt", "tensorboard"}
    assert [path.name.split(".")[:3] for path in (run.folder / "tensorboard").iterdir()] == [
        ["events", "out", "tfevents"]
    ]


def test_the_saved_config_loads_again_and_equals_the_one_that_was_given(run: Run, config: Path) -> None:
    given = load_config(config, [f"run_dir={run.folder}"])
    assert load_config(run.folder / "config.yaml") == given
    assert load(run.folder / "last.pt")["config"] == given.model_dump()


def test_the_record_of_a_run_names_versions_seed_and_hashes(run: Run, tiny: Path) -> None:
    record = json.loads((run.folder / "run.json").read_text())
    assert record["python"] == platform.python_version()
    assert record["torch"] == torch.__version__
    assert record["seed"] == 0
    lists = [str(tiny / "lists/train.txt"), str(tiny / "lists/val.txt")]
    assert record["list_sha256"] == {path: sha256(Path(path)) for path in lists}
    assert record["weights"]["sha256"] == sha256(Path(record["weights"]["source"]))
    assert "train.py" in record["command"][0]
    assert f"run_dir={run.folder}" in record["command"]
    assert record["resumed_at_step"] == 0


def test_the_backbone_in_the_checkpoint_is_the_one_in_the_weights_file(run: Run) -> None:
    record = json.loads((run.folder / "run.json").read_text())
    saved, state = torch.load(record["weights"]["source"], weights_only=True), load(run.folder / "last.pt")["model"]
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


def test_every_evaluation_leaves_one_json_line(run: Run, steps: int) -> None:
    lines = json_lines(run.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [steps, EPOCHS * steps]
    for line in lines:
        assert list(line["per_class"]) == NOVEL
        assert line["miou"] == pytest.approx(statistics.fmean(line["per_class"].values()))
        assert 0 <= line["miou"] <= 1 and 0 < line["fb_iou"] < 1


def test_best_is_the_checkpoint_with_the_highest_miou(run: Run, steps: int) -> None:
    lines = json_lines(run.folder / "metrics.jsonl")
    highest = max(lines, key=lambda line: line["miou"])
    best, last = load(run.folder / "best.pt"), load(run.folder / "last.pt")
    assert best["step"] == highest["step"]
    assert best["best_miou"] == last["best_miou"] == highest["miou"]
    assert last["step"] == EPOCHS * steps
    assert "optimizer" not in best


@pytest.mark.parametrize(("select", "epoch"), [("miou", 2), ("last", 3)])
def test_best_is_what_the_config_selects(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, epoch: int
) -> None:
    scores = iter([0.1, 0.9, 0.9])  # the first of equals is kept
    fake = {"fb_iou": 0.5, "precision": 0.5, "per_class": {}}
    monkeypatch.setattr(train, "scores", lambda *_: Scores(miou=next(scores), **fake))
    overrides = ["train.epochs=3", "train.batch_size=12", "data.image_size=33", f"eval.select={select}"]
    result = succeeded(call(train, "--config", config, f"run_dir={tmp_path}", *overrides))
    steps = load(tmp_path / "last.pt")["step"] / 3
    assert steps >= 1
    assert load(tmp_path / "best.pt")["step"] == epoch * steps
    rule = {"miou": "highest novel-fold mIoU", "last": "best.pt is the last checkpoint"}
    assert rule[select] in result.out


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


def test_tensorboard_holds_the_validation_scores_and_a_picture(run: Run) -> None:
    recorded, lines = scalars(run.folder), json_lines(run.folder / "metrics.jsonl")
    for name in ("miou", "fb_iou", "precision"):
        assert recorded[f"val/{name}"] == [(line["step"], pytest.approx(line[name])) for line in lines]
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    (tag,) = events.Tags()["images"]
    pictures = events.Images(tag)
    assert [picture.step for picture in pictures] == [line["step"] for line in lines]
    picture = np.array(Image.open(io.BytesIO(pictures[-1].encoded_image_string)))
    assert picture.ndim == 3 and picture.std() > 10


def test_tensorboard_holds_classes_gradients_speed_memory_and_the_config(run: Run, config: Path, steps: int) -> None:
    recorded, lines = scalars(run.folder), json_lines(run.folder / "metrics.jsonl")
    for name in NOVEL:
        expected = [(line["step"], pytest.approx(line["per_class"][name])) for line in lines]
        assert recorded[f"val_iou/{name}"] == expected
    norms = recorded["gradient_norm"]
    assert [step for step, _ in norms] == list(range(1, EPOCHS * steps + 1))
    assert all(0 < norm < math.inf for _, norm in norms)
    for name in ("episodes_per_second", "peak_memory_mib"):
        assert [step for step, _ in recorded[name]] == [steps, EPOCHS * steps]
        assert all(value > 0 for _, value in recorded[name])
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("config/text_summary")
    (shown,) = (value.decode() for value in text.tensor_proto.string_val)
    assert yaml.safe_load(shown) == yaml.safe_load((run.folder / "config.yaml").read_text())


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


def test_the_progress_bar_with_loss_and_learning_rate_goes_to_stderr(run: Run, steps: int) -> None:
    assert re.search(rf"epoch 2/2: .*\d+/{EPOCHS * steps} .*step/?s?, loss=\d+\.\d+, lr=0\.\d+", run.result.err)
    assert "loss=" not in run.result.out


def test_a_run_writes_nothing_but_progress_bars_to_stderr(run: Run) -> None:
    assert beside_progress_bars(run.result.err) == []


def test_the_screen_says_device_selection_rule_classes_and_weights(run: Run, steps: int) -> None:
    out, record = run.result.out, json.loads((run.folder / "run.json").read_text())
    assert "on cpu" in out and "1-shot" in out
    assert re.search("fp32|float32", out)
    assert "best.pt is the checkpoint with the highest novel-fold mIoU" in out
    assert ", ".join(NOVEL) in out
    assert record["weights"]["source"] in out and record["weights"]["sha256"][:16] in out
    assert "fold 0 of 4" in out
    assert str(run.folder) in out
    lists = record["list_sha256"]
    assert len(lists) == 2
    for path in lists:
        assert f"list {path}, {len(Path(path).read_text().splitlines())} lines: unknown" in out
    assert f"step {steps}: mIoU" in out and f"step {EPOCHS * steps}: mIoU" in out


def test_training_scores_are_those_of_test_py_on_the_same_checkpoint(run: Run, config: Path, tmp_path: Path) -> None:
    best = load(run.folder / "best.pt")["step"]
    (line,) = [line for line in json_lines(run.folder / "metrics.jsonl") if line["step"] == best]
    results = evaluated(config, run.folder / "best.pt", tmp_path / "r.json", "--seeds", 0)
    for name in ("miou", "fb_iou", "precision"):
        assert results[name]["mean"] == pytest.approx(100 * line[name], abs=1e-6)


# Repeatable runs


def test_the_same_seed_gives_identical_weights_with_0_or_2_workers(short: Path, config: Path, tmp_path: Path) -> None:
    again = short_run(config, tmp_path, "workers=2")
    for part in ("model", "criterion", "optimizer", "random"):
        assert differences(load(short / "last.pt")[part], load(again / "last.pt")[part]) == []


def test_another_seed_gives_other_weights(short: Path, config: Path, tmp_path: Path) -> None:
    other = load(short_run(config, tmp_path, "seed=1") / "last.pt")["model"]
    first = load(short / "last.pt")["model"]
    different = differences(first, other)
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


# Interruption and resume


def test_ctrl_c_saves_first_and_says_where(interrupted: tuple[Run, Path], steps: int) -> None:
    (folder, result), stopped = interrupted
    assert result.code == 130
    assert beside_progress_bars(result.err) == []
    step = load(stopped / "last.pt")["step"]
    assert steps < step < EPOCHS * steps
    last = result.out.splitlines()[-1]
    assert last == f"stopped by SIGINT after step {step}, in {folder / 'last.pt'}; resume=auto goes on"


def test_an_interrupted_and_resumed_run_equals_one_in_one_go_bit_for_bit(run: Run, resumed: Run) -> None:
    straight, continued = load(run.folder / "last.pt"), load(resumed.folder / "last.pt")
    assert straight["criterion"]["bank.stored"].sum() > 0
    for part in ("model", "criterion", "optimizer", "scaler", "random", "step", "finished_step", "best_miou"):
        assert differences(straight[part], continued[part], part) == []
    best, continued_best = load(run.folder / "best.pt"), load(resumed.folder / "best.pt")
    assert best["step"] == continued_best["step"]
    assert differences(best["model"], continued_best["model"]) == []


def test_an_epoch_changes_every_trained_weight_and_none_of_the_backbone(
    interrupted: tuple[Run, Path], run: Run
) -> None:
    before, after = load(interrupted[1] / "last.pt")["model"], load(run.folder / "last.pt")["model"]
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if not name.startswith("backbone.")}


def test_a_resumed_run_continues_its_logs_where_it_stood(run: Run, resumed: Run, interrupted: tuple[Run, Path]) -> None:
    step = load(interrupted[1] / "last.pt")["step"]
    assert f"resumed at step {step}" in resumed.result.out
    assert "epoch 2/2" in resumed.result.err and "epoch 1/2" not in resumed.result.err
    record = json.loads((resumed.folder / "run.json").read_text())
    assert record["resumed_at_step"] == step
    assert [start["step"] for start in record["starts"]] == [0, step]
    assert record["finished"]["steps"] == load(run.folder / "last.pt")["step"]
    assert json_lines(resumed.folder / "metrics.jsonl") == json_lines(run.folder / "metrics.jsonl")
    for name in ("loss/total", "loss/pcl", "lr"):
        assert scalars(resumed.folder)[name] == scalars(run.folder)[name]


def test_a_resumed_run_keeps_the_validation_scores_before_it(run: Run, resumed: Run) -> None:
    assert scalars(resumed.folder)["val/miou"] == scalars(run.folder)["val/miou"]


class Recovered(NamedTuple):
    """A run whose disk was full when it wrote last.pt for the second time, and that was resumed then."""

    folder: Path
    failure: Result
    hashes: tuple[str, str]
    """of last.pt: as the first epoch left it, and after the failure"""
    names: set[str]
    """of files after the failure"""


@pytest.fixture(scope="session")
def recovered(config: Path) -> Recovered:
    folder, fsync = config.parent / "recovered", os.fsync
    hashes: list[str] = []

    def full(file: int) -> None:
        if (folder / "last.pt.tmp").exists() and (folder / "last.pt").exists():
            hashes.append(sha256(folder / "last.pt"))
            raise OSError(28, "No space left on device")
        fsync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        failure = call(train, "--config", config, f"run_dir={folder}")
    hashes.append(sha256(folder / "last.pt"))
    names = {path.name for path in folder.iterdir()}
    succeeded(call(train, "--config", config, f"run_dir={folder}", "resume=auto"))
    return Recovered(folder, failure, (hashes[0], hashes[1]), names)


def test_a_full_disk_leaves_the_old_checkpoint(recovered: Recovered) -> None:
    refused(recovered.failure, recovered.folder / "last.pt", "No space left", "free some space", "run_dir")
    before, after = recovered.hashes
    assert before == after
    assert not any(name.endswith(".tmp") for name in recovered.names)


def test_a_run_resumed_after_a_full_disk_ends_where_it_would_have_ended(recovered: Recovered, run: Run) -> None:
    resumed, straight = load(recovered.folder / "last.pt"), load(run.folder / "last.pt")
    for part in ("model", "criterion", "optimizer", "random", "step", "best_miou"):
        assert differences(straight[part], resumed[part], part) == []


def test_an_evaluation_repeated_after_a_resume_leaves_one_line(recovered: Recovered, run: Run) -> None:
    assert json_lines(recovered.folder / "metrics.jsonl") == json_lines(run.folder / "metrics.jsonl")


@pytest.mark.parametrize("where", ["segment", "__del__"])
def test_a_signal_in_an_evaluation_stops_it_and_saves(
    config: Path, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Also within a destructor, where an exception would be swallowed."""
    segment = loops.segment

    class Closing:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(*arguments: Any) -> Any:
        if where == "segment":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            Closing()
        return segment(*arguments)

    monkeypatch.setattr(loops, "segment", asked)
    result = call(train, "--config", config, f"run_dir={tmp_path}")
    assert result.code == 143 and beside_progress_bars(result.err) == []
    state = load(tmp_path / "last.pt")
    assert (state["step"], state["finished_step"]) == (steps, 0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_no_event_stands_twice_after_a_resume(recovered: Recovered, run: Run) -> None:
    resumed, straight = scalars(recovered.folder), scalars(run.folder)
    for name in ("lr", "val/miou", *(f"loss/{name}" for name in LOSSES)):
        assert resumed[name] == straight[name]


def test_a_second_start_without_resume_is_refused_and_overwrites_nothing(run: Run, config: Path) -> None:
    before = contents(run.folder)
    result = process("train.py", "--config", config, f"run_dir={run.folder}")
    refused(result, run.folder, "resume=auto", "run_dir=")
    assert contents(run.folder) == before


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("train.lr=0.1", f"train.lr is {LR} there and 0.1 here"),
        ("seed=5", "seed is 0 there and 5 here"),
        ("data.fold=2", "data.fold is 0 there and 2 here"),
        ("train.epochs=3", "train.epochs is 2 there and 3 here"),
        ("loss.gamma=0.1", "loss.gamma is 0.01 there and 0.1 here"),
    ],
)
def test_resuming_with_another_setting_is_refused(run: Run, config: Path, override: str, difference: str) -> None:
    before = contents(run.folder)
    result = call(train, "--config", config, f"run_dir={run.folder}", "resume=auto", override)
    refused(result, run.folder / "last.pt", difference, "resume=none")
    assert contents(run.folder) == before


def test_resuming_names_every_setting_that_differs(run: Run, config: Path) -> None:
    overrides = [f"run_dir={run.folder}", "resume=auto", "train.lr=0.1", "train.momentum=0.5"]
    line = refused(call(train, "--config", config, *overrides), "train.lr", "train.momentum is 0.9 there and 0.5 here")
    assert "run_dir is" not in line and "resume is" not in line


def test_a_checkpoint_without_optimizer_is_not_resumed(run: Run, config: Path, tmp_path: Path) -> None:
    result = call(train, "--config", config, f"run_dir={tmp_path}", f"resume={run.folder / 'best.pt'}")
    refused(result, run.folder / "best.pt", "last.pt")


def test_a_truncated_last_checkpoint_is_not_resumed(
    interrupted: tuple[Run, Path], config: Path, tmp_path: Path
) -> None:
    whole = (interrupted[1] / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    result = call(train, "--config", config, f"run_dir={tmp_path}", "resume=auto")
    refused(result, tmp_path / "last.pt", "damaged", "use another one")


def test_resuming_a_finished_run_changes_no_weights(resumed: Run, config: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(resumed.folder, tmp_path / "run")
    result = succeeded(call(train, "--config", config, f"run_dir={folder}", "resume=auto"))
    assert "done" in result.out
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        assert sha256(folder / name) == sha256(resumed.folder / name)


def test_resuming_with_a_list_of_other_content_is_refused(tiny: Path, config: Path, tmp_path: Path) -> None:
    root, overrides = damaged(tiny, tmp_path)
    overrides += ["train.epochs=1", "train.batch_size=4", "data.image_size=33", "eval.episodes=1"]
    succeeded(call(train, "--config", config, *overrides))
    path = root / "lists/train.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[::-1]))  # the same images: other episodes
    refused(call(train, "--config", config, *overrides, "resume=auto"), path)


def test_a_run_resumes_with_its_data_moved_and_its_lists_copied_by_windows(
    tiny: Path, config: Path, tmp_path: Path
) -> None:
    root, overrides = damaged(tiny, tmp_path / "here")
    small = ["train.epochs=1", "train.batch_size=4", "data.image_size=33", "eval.episodes=1", f"run_dir={tmp_path}/run"]
    succeeded(call(train, "--config", config, *overrides, *small))
    moved = root.rename(tmp_path / "there")
    for path in (moved / "lists").glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    overrides = [word.replace(str(root), str(moved)) for word in overrides]
    succeeded(call(train, "--config", config, *overrides, *small, "resume=auto"))


@pytest.mark.parametrize(
    "forged",
    [
        {"step": 10**9},
        {"finished_step": 1},
        {"finished_step": 10**9},
        {"finished_step": -1},
        {"finished_step": 0},
        {"finished_step": True},
        {"sums": {}},
    ],
)
def test_a_checkpoint_at_a_place_where_no_run_stands_is_refused(
    run: Run, config: Path, tmp_path: Path, forged: dict[str, Any]
) -> None:
    (tmp_path / "run").mkdir()
    torch.save(load(run.folder / "last.pt") | forged, tmp_path / "run/last.pt")
    refused(call(train, "--config", config, f"run_dir={tmp_path / 'run'}", "resume=auto"), "checkpoint", "damaged")


@pytest.mark.parametrize("told", [{}, {"RANK": "x"}, {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "here"}])
def test_half_a_job_of_several_processes_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, str]
) -> None:
    for name, value in (told | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    refused(call(train, "--config", config, f"run_dir={tmp_path}/run"), "WORLD_SIZE=2", "torchrun", "unset WORLD_SIZE")


def test_resuming_from_elsewhere_does_not_overwrite_the_run_that_stands_in_run_dir(
    run: Run, resumed: Run, config: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run")
    before = contents(folder)
    result = call(train, "--config", config, f"run_dir={folder}", f"resume={resumed.folder / 'last.pt'}")
    refused(result, folder)
    assert contents(folder) == before


def test_a_run_resumed_from_elsewhere_names_only_files_that_exist(run: Run, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    result = succeeded(call(train, "--config", config, f"run_dir={folder}", f"resume={run.folder / 'last.pt'}"))
    named = re.findall(re.escape(str(folder)) + r"/\w+\.pt", result.out)
    assert all(Path(path).exists() for path in named)


# test.py


def test_results_tell_what_was_evaluated(
    tested: tuple[Result, dict[str, Any], Path], config: Path, mixed: Path, tiny: Path
) -> None:
    _, results, _ = tested
    expected = {"dataset": "Synthetic-5i", "fold": 0, "folds": 4, "shots": 1, "episodes": 6, "seeds": [0, 1, 2]}
    assert {key: results[key] for key in expected} == expected
    assert results["backbone"] == "efficientnet_lite0"
    assert results["config"] == load_config(config, ["eval.episodes=6"]).model_dump()
    assert results["checkpoint_sha256"] == sha256(mixed)
    assert results["list_sha256"] == sha256(tiny / "lists/val.txt")
    assert 0 < results["seconds"] < 300
    assert 50 < results["peak_memory_mib"] < 20_000
    assert results["environment"]["torch"] == torch.__version__


def test_mean_and_deviation_are_those_of_the_seeds(tested: tuple[Result, dict[str, Any], Path]) -> None:
    _, results, _ = tested
    for name in ("miou", "fb_iou", "precision"):
        per_seed = results[name]["per_seed"]
        assert len(set(per_seed)) == 3
        assert results[name]["mean"] == pytest.approx(statistics.mean(per_seed))
        assert results[name]["std"] == pytest.approx(statistics.stdev(per_seed))
    assert list(results["per_class"]) == NOVEL
    assert results["miou"]["mean"] == pytest.approx(statistics.mean(results["per_class"].values()))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_evaluation_by_hand_gives_the_same_scores(
    tested: tuple[Result, dict[str, Any], Path], config: Path, mixed: Path, seed: int
) -> None:
    _, results, _ = tested
    by_hand = scores_by_hand(load_config(config), mixed, seed, episodes=6)
    assert by_hand["miou"] > 1 and by_hand["precision"] > 1  # else the comparison would say nothing
    for name in ("miou", "fb_iou", "precision"):
        assert results[name]["per_seed"][seed] == pytest.approx(by_hand[name], abs=0.01)
    longer = scores_by_hand(load_config(config), mixed, seed, episodes=7)
    assert abs(longer["fb_iou"] - by_hand["fb_iou"]) > 0.01  # one episode more would show


def test_class_scores_and_baselines_by_hand_are_the_same(
    tested: tuple[Result, dict[str, Any], Path], config: Path, mixed: Path
) -> None:
    _, results, _ = tested
    seeds = [scores_by_hand(load_config(config), mixed, seed, episodes=6) for seed in (0, 1, 2)]
    for name in NOVEL:
        mean = statistics.mean(s["per_class"][name] for s in seeds)
        assert results["per_class"][name] == pytest.approx(mean, abs=0.01)
    assert list(results["baselines"]) == ["all_foreground", "prior", "training_free", "training_free_edges"]
    for name in ("all_foreground", "prior"):
        scores, values = results["baselines"][name], [s["baselines"][name] for s in seeds]
        assert scores["miou"] == pytest.approx(statistics.mean(values), abs=0.01)
        assert scores["std"] == pytest.approx(statistics.stdev(values), abs=0.01)
    assert results["baselines"]["all_foreground"]["miou"] != results["baselines"]["prior"]["miou"]


def test_three_shots_on_a_one_shot_checkpoint_score_as_by_hand(config: Path, mixed: Path, tmp_path: Path) -> None:
    results = evaluated(config, mixed, tmp_path / "r.json", "--shots", 3, "--episodes", 6)
    by_hand = scores_by_hand(load_config(config, ["data.shots=3"]), mixed, seed=0, episodes=6)
    assert results["shots"] == 3
    for name in ("miou", "fb_iou", "precision"):
        assert results[name]["mean"] == pytest.approx(by_hand[name], abs=0.01)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_exactly_the_asked_number_of_episodes_is_scored(
    config: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    scored: list[int] = []
    evaluate = test_command.evaluate

    def noting(model: Any, index: Any, episodes: Any, **options: Any) -> Any:
        scored.extend(episode.class_id for episode in episodes)
        counts = evaluate(model, index, episodes, **options)
        assert counts["network"].shape == (len(episodes), 4)
        assert (counts["network"].sum(1) > 0).all()
        return counts

    monkeypatch.setattr(test_command, "evaluate", noting)
    out = tmp_path / "r.json"
    results = evaluated(config, mixed, out, "--episodes", 5, "--seeds", 3, 4, f"eval.batch_size={batch_size}")
    assert len(scored) == 2 * 5
    assert results["episodes"] == 5
    settings = load_config(config)
    index = build_index(settings, "val")
    samplers = [build_eval_sampler(settings, index, seed) for seed in (3, 4)]
    assert scored == [sampler(number).class_id for sampler in samplers for number in range(5)]


@pytest.mark.parametrize("shots", [1, 3])
def test_memory_for_shared_features_does_not_change_a_score(
    config: Path, mixed: Path, tmp_path: Path, shots: int
) -> None:
    results = [
        evaluated(config, mixed, tmp_path / f"{i}.json", "--episodes", 8, "--shots", shots, "--seeds", 0, 1, *overrides)
        for i, overrides in enumerate(([], ["eval.cache_gib=1e-9"], ["eval.batch_size=1"]))
    ]
    for name in ("miou", "fb_iou", "precision"):
        for other in results[1:]:
            assert other[name]["per_seed"] == pytest.approx(results[0][name]["per_seed"], abs=1e-3)


def test_the_same_command_twice_gives_the_same_scores(
    tested: tuple[Result, dict[str, Any], Path], config: Path, mixed: Path, tmp_path: Path
) -> None:
    _, first, _ = tested
    again = evaluated(config, mixed, tmp_path / "r.json", "--seeds", 0, 1, 2, "--episodes", 6, "--baselines")
    for name in ("miou", "fb_iou", "precision", "per_class", "baselines"):
        assert again[name] == first[name]


def test_the_batch_size_of_an_evaluation_changes_no_score(config: Path, mixed: Path, tmp_path: Path) -> None:
    single = evaluated(config, mixed, tmp_path / "1.json", "--seeds", 0, 1, "eval.batch_size=1", "workers=0")
    batched = evaluated(config, mixed, tmp_path / "4.json", "--seeds", 0, 1, "eval.batch_size=4", "workers=1")
    assert single["miou"]["mean"] > 1
    a_few_pixels = 0.005  # percent: convolutions round otherwise in a batch, which can turn a pixel that stands at 0
    for name in ("miou", "fb_iou", "precision"):
        assert single[name]["per_seed"] == pytest.approx(batched[name]["per_seed"], abs=a_few_pixels)
    assert single["per_class"] == pytest.approx(batched["per_class"], abs=a_few_pixels)


def test_the_table_names_fold_classes_and_scores(tested: tuple[Result, dict[str, Any], Path]) -> None:
    result, results, _ = tested
    assert "Synthetic-5i fold 0 of 4, 1-shot, efficientnet_lite0: 6 episodes, seeds 0, 1, 2" in result.out
    for name in NOVEL:
        assert re.search(rf"^ +{name} +{results['per_class'][name]:.1f}$", result.out, re.MULTILINE)
    miou = results["miou"]
    assert re.search(rf"^ +mIoU +{miou['mean']:.1f} ± {miou['std']:.1f}", result.out, re.MULTILINE)
    assert re.search(rf"^ +FB-IoU +{results['fb_iou']['mean']:.1f} ±", result.out, re.MULTILINE)
    assert re.search(rf"all foreground +{results['baselines']['all_foreground']['miou']:.1f}", result.out)
    assert re.search(rf"training-free, edges +{results['baselines']['training_free_edges']['miou']:.1f}", result.out)
    assert "not the mean of folds" in result.out
    assert beside_progress_bars(result.err) == []


def test_the_picture_of_an_evaluation_opens(tested: tuple[Result, dict[str, Any], Path]) -> None:
    result, _, panel = tested
    assert str(panel) in result.out
    with Image.open(panel) as picture:
        assert picture.format == "PNG"
        pixels = np.array(picture)
    assert pixels.shape[0] > 4 * 65 and pixels.shape[1] > 4 * 65  # four episodes, at least four tiles each
    assert pixels.std() > 10


# Ablations and losses


@pytest.mark.parametrize(
    ("overrides", "parts", "terms"),
    [
        (["loss.pcl=false"], {"bgmm", "eliminations"}, {"initial", "bg"}),
        (["model.elimination=per_scale"], {"bgmm", "eliminations"}, {"initial", "bg", "pcl"}),
        (["model.elimination=authors"], {"bgmm", "eliminations"}, {"initial", "bg", "pcl"}),
        (
            ["model.base_learner=true"],
            {"bgmm", "eliminations", "base_learner"},
            {"initial", "bg", "pcl", "base"},
        ),
        (["loss.pcl=false", "model.doem=false"], {"bgmm", "bgem"}, {"bg"}),
        (["loss.pcl=false", "model.doem=false", "model.bgem=false"], set(), set()),
    ],
    ids=["bgem and doem", "per scale", "authors", "base learner", "bgem", "neither"],
)
def test_an_ablation_trains_and_evaluates_with_its_parts_and_losses_alone(
    config: Path, tmp_path: Path, overrides: list[str], parts: set[str], terms: set[str]
) -> None:
    folder = short_run(config, tmp_path / "run", *overrides)
    state = load(folder / "last.pt")
    assert {name.split(".")[0] for name in state["model"]} - {
        "backbone",
        "reduce_query",
        "reduce_support",
        "fem",
    } == parts
    assert (state["criterion"] == {}) == ("pcl" not in terms)
    recorded = scalars(folder)
    for name in ("initial", "bg", "pcl", "base"):
        values = [value for _, value in recorded[f"loss/{name}"]]
        assert any(values) == (name in terms)
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
    assert state["config"]["data"]["shots"] == 2
    assert all(2 * drawn <= count <= 3 * drawn for count, drawn in zip(stored, episodes, strict=True))
    results = evaluated(config, tmp_path / "run/best.pt", tmp_path / "r.json", "--shots", 1, "--episodes", 3)
    assert results["shots"] == 1


# Refusals: configs and the command line


def test_a_typo_in_a_config_names_file_key_and_the_nearest_key(config: Path, tmp_path: Path) -> None:
    broken = tmp_path / "typo.yaml"
    broken.write_text(f"base: {config.parent / 'plain.yaml'}\n{yaml.safe_dump({'train': {'batchsize': 2}})}")
    shutil.copy(ROOT / "configs/base/synthetic.yaml", config.parent / "plain.yaml")
    refused(process("train.py", "--config", broken), broken, "train.batchsize", "did you mean 'train.batch_size'?")


@pytest.mark.parametrize("module", [train, test_command], ids=["train", "test"])
@pytest.mark.parametrize(
    ("override", "pieces"),
    [
        ("train.lrr=0.1", ["command line", "'train.lrr'", "did you mean 'train.lr'?"]),
        ("train.lr", ["command line", "'train.lr' is not key=value"]),
        ("train.lr=fast", ["command line", "train.lr", "'fast'"]),
        ("train.lr=-1", ["command line", "train.lr", "greater than 0", "-1"]),
        ("data.image_size=64", ["data", "8n + 1", "65"]),
        ("data.fold=4", ["fold must be 0 to 3"]),
        ("model.backbone=resnet18", ["model.backbone", "resnet50", "'resnet18'"]),
        ("model.doem=false", ["loss.pcl needs model.doem", "loss.pcl=false"]),
        ("train=3", ["command line", "train", "3"]),
    ],
)
def test_a_wrong_override_is_refused_by_name(
    module: ModuleType, config: Path, run: Run, tmp_path: Path, override: str, pieces: list[str]
) -> None:
    checkpoint = ["--checkpoint", run.folder / "best.pt"] if module is test_command else []
    refused(call(module, "--config", config, *checkpoint, f"run_dir={tmp_path / 'run'}", override), *pieces)
    assert not (tmp_path / "run").exists()


def test_a_missing_config_is_refused_with_the_nearest_one(config: Path) -> None:
    missing = config.with_name("tinny.yaml")
    refused(call(train, "--config", missing), missing, "does not exist", f"did you mean {config}?")


@pytest.mark.parametrize("script", ["train.py", "test.py"])
def test_without_a_config_the_command_prints_its_usage(script: str) -> None:
    result = process(script)
    assert result.code == 2
    assert result.err.startswith(f"usage: {script}")
    assert "--config" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_cuda_without_a_cuda_device_is_refused(
    config: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = process("train.py", "--config", config, f"run_dir={tmp_path / 'run'}", "device=cuda")
    refused(result, "device=cuda", "device=cpu")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint = run.folder / "best.pt"
    refused(call(test_command, "--config", config, "--checkpoint", checkpoint, "device=cuda"), "device=cpu")


@pytest.mark.parametrize("module", [train, test_command], ids=["train", "test"])
def test_fp16_on_a_cpu_is_refused(module: ModuleType, config: Path, run: Run, tmp_path: Path) -> None:
    checkpoint = ["--checkpoint", run.folder / "best.pt"] if module is test_command else []
    result = call(module, "--config", config, *checkpoint, f"run_dir={tmp_path / 'run'}", "precision=fp16")
    refused(result, "precision=fp16", "precision=bf16 or fp32")


def test_a_run_dir_with_a_file_in_its_way_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / "run"
    refused(call(train, "--config", config, f"run_dir={folder}"), folder)


@pytest.mark.parametrize("seeds", [["-1"], ["0", "0"]], ids=["negative", "twice"])
def test_wrong_seeds_are_refused(config: Path, run: Run, seeds: list[str]) -> None:
    result = call(test_command, "--config", config, "--checkpoint", run.folder / "best.pt", "--seeds", *seeds)
    refused(result, "--seeds", "different whole numbers")


@pytest.mark.parametrize("option", ["--shots", "--episodes"])
def test_no_shots_and_no_episodes_are_refused(config: Path, run: Run, option: str) -> None:
    result = call(test_command, "--config", config, "--checkpoint", run.folder / "best.pt", option, 0)
    refused(result, option.removeprefix("--"), "greater than or equal to 1")


def test_overrides_can_follow_the_seeds_as_the_usage_says(config: Path, mixed: Path) -> None:
    arguments = ["--config", config, "--checkpoint", mixed, "--episodes", 2, "--seeds", 0, 1, "eval.batch_size=2"]
    assert "eval.batch_size" not in succeeded(call(test_command, *arguments)).err


def test_results_that_cannot_be_written_are_refused(config: Path, mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "file" / "results.json"
    arguments = ["--config", config, "--checkpoint", mixed, "--episodes", 2, "--out", out]
    refused(call(test_command, *arguments), out)


def test_a_picture_of_unknown_kind_is_refused(config: Path, mixed: Path, tmp_path: Path) -> None:
    panel = tmp_path / "panel.text"
    arguments = ["--config", config, "--checkpoint", mixed, "--episodes", 2, "--panel", panel]
    refused(call(test_command, *arguments), panel)


# Refusals: data


def damaged(tiny: Path, folder: Path, *, keep_index: bool = False) -> tuple[Path, list[str]]:
    """A copy of the data set to be damaged, and the overrides that select it."""
    root = shutil.copytree(tiny, folder / "data", ignore=None if keep_index else shutil.ignore_patterns("*.npz"))
    lists = [f"data.{split}_list={root}/lists/{split}.txt" for split in ("train", "val")]
    return root, [f"data.root={root}", *lists, f"run_dir={folder / 'run'}"]


def _remove(path: Path) -> None:
    path.unlink()


def _halve_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _halve_picture(path: Path) -> None:
    picture = Image.open(path)
    picture.resize((picture.width // 2, picture.height // 2)).save(path)


def _write_text(path: Path) -> None:
    path.write_text("This is not a picture.\n")


def _to_rgb(path: Path) -> None:
    Image.open(path).convert("RGB").save(path)


def _class_77(path: Path) -> None:
    mask = np.array(Image.open(path))
    mask[:10, :10] = 77
    Image.fromarray(mask).save(path)


IMAGE, MASK = "JPEGImages/{}_00003.jpg", "SegmentationClassAug/{}_00003.png"


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("file", "damage", "pieces"),
    [
        (IMAGE, _remove, ["image", "does not exist", "data.root"]),
        (MASK, _remove, ["mask", "does not exist", "data.root"]),
        (IMAGE, _halve_picture, ["image", "mask", MASK, "must be the same size"]),
        (IMAGE, _write_text, ["image", "cannot be read", "replace it or take it off the list"]),
        (MASK, _halve_file, ["mask", "cannot be read", "replace it or take it off the list"]),
        (MASK, _to_rgb, ["mask", "mode RGB", "palette or greyscale"]),
        (MASK, _class_77, ["mask", "value 77", "data.classes"]),
        ("lists/{}.txt", _remove, ["list", "does not exist", "README"]),
        ("lists/{}.txt", _write_text, ["list", "line 1", "'image mask'"]),
    ],
    ids=[
        "missing image",
        "missing mask",
        "sizes differ",
        "text as image",
        "truncated mask",
        "RGB mask",
        "unknown class",
        "missing list",
        "text as list",
    ],
)
def test_damaged_data_is_refused_by_file_and_remedy_before_training(
    tiny: Path,
    config: Path,
    tmp_path: Path,
    split: str,
    file: str,
    damage: Callable[[Path], None],
    pieces: list[str],
) -> None:
    root, overrides = damaged(tiny, tmp_path)
    path = root / file.format(split)
    damage(path)
    refused(call(train, "--config", config, *overrides), path, *(piece.format(split) for piece in pieces))
    assert not (tmp_path / "run").exists()


def test_damaged_data_is_refused_in_evaluation_too(tiny: Path, config: Path, mixed: Path, tmp_path: Path) -> None:
    root, overrides = damaged(tiny, tmp_path)
    path = root / MASK.format("val")
    _to_rgb(path)
    refused(call(test_command, "--config", config, "--checkpoint", mixed, *overrides), path, "mode RGB")


def test_a_class_without_enough_images_is_refused_by_name(tiny: Path, config: Path, tmp_path: Path) -> None:
    result = call(train, "--config", config, f"run_dir={tmp_path / 'run'}", "data.shots=3")
    line = refused(result, tiny / "lists/train.txt", "3-shot episodes need 4", "data.shots", "data.min_area")
    name = line.split("class '")[1].split("'")[0]
    classes = load_config(config).data.classes
    masks = [np.array(Image.open(path)) for path in sorted((tiny / "SegmentationClassAug").glob("train_*"))]
    qualifying = sum(int((mask == classes.index(name) + 1).sum()) >= MIN_AREA for mask in masks)
    assert name not in NOVEL and qualifying < 4
    assert f"has {qualifying} images with at least {MIN_AREA} pixels" in line
    assert not (tmp_path / "run").exists()


def _truncate_images(root: Path, split: str) -> None:
    """Cut every picture of a split in the middle: its header says the right size, so only decoding meets it."""
    for path in (root / "JPEGImages").glob(f"{split}_*.jpg"):
        _halve_file(path)
        assert Image.open(path).size == Image.open(root / "SegmentationClassAug" / f"{path.stem}.png").size


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_picture_met_in_training_is_refused(tiny: Path, config: Path, tmp_path: Path, workers: int) -> None:
    root, overrides = damaged(tiny, tmp_path)
    _truncate_images(root, "train")
    command = ["--config", config, *overrides, f"workers={workers}"]
    result = process("train.py", *command) if workers else call(train, *command)
    line = refused(result, "image", "truncated", "replace it or take it off the list")
    assert re.match(rf"error: image {root}/JPEGImages/train_\d+\.jpg cannot be read", line)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_picture_met_in_evaluation_is_refused(
    tiny: Path, config: Path, mixed: Path, tmp_path: Path, workers: int
) -> None:
    root, overrides = damaged(tiny, tmp_path)
    _truncate_images(root, "val")
    result = call(test_command, "--config", config, "--checkpoint", mixed, *overrides, f"workers={workers}")
    line = refused(result, "replace it or take it off the list")
    assert re.match(rf"error: image {root}/JPEGImages/val_\d+\.jpg cannot be read", line)


def test_a_picture_that_changed_its_size_after_the_index_was_built_is_refused(
    tiny: Path, config: Path, tmp_path: Path, short: Path
) -> None:
    root, overrides = damaged(tiny, tmp_path, keep_index=True)
    assert (root / "lists/train.txt.index.npz").exists()
    for path in (root / "JPEGImages").glob("train_*.jpg"):
        _halve_picture(path)
    line = refused(call(train, "--config", config, *overrides), "must be the same size")
    assert re.search(rf"{root}/JPEGImages/(train_\d+)\.jpg .*{root}/SegmentationClassAug/\1\.png", line)
    assert not (tmp_path / "run").exists()


def test_lists_that_share_photos_are_refused_on_a_benchmark_and_warned_of_elsewhere(
    tiny: Path, config: Path, tmp_path: Path
) -> None:
    root, overrides = damaged(tiny, tmp_path)
    first = (root / "lists/train.txt").read_text().splitlines()[0]
    with (root / "lists/val.txt").open("a") as file:
        file.write(f"{first}\n")
    words = f"1 photos stand in the training and in the validation list ({root}/{first.split()[0]})"
    refused(call(train, "--config", config, *overrides, "data.dataset=COCO-20i"), words)
    assert not (tmp_path / "run").exists()
    elsewhere = call(train, "--config", config, *overrides, "train.lr=1e30")
    assert f"warning: {words}" in elsewhere.out and "not finite" in elsewhere.err


def test_a_loss_that_is_not_finite_stops_the_run_with_step_terms_and_files(
    tiny: Path, config: Path, tmp_path: Path
) -> None:
    result = call(train, "--config", config, f"run_dir={tmp_path / 'run'}", "train.lr=1e30")
    line = refused(result, "loss", "not finite", "train.lr", *LOSSES)
    step = int(line.split("loss of step ")[1].split()[0])
    settings = load_config(config)
    sampler = build_train_sampler(settings, build_index(settings, "train"))
    for number in range(step * BATCH, (step + 1) * BATCH):
        files = sampler(number)
        query, support = (sampler.index.items[n].image for n in (files.query, *files.supports))
        assert f"query {query}, supports {support}" in line
    assert not (tmp_path / "run/last.pt").exists()


# Refusals: checkpoints and weights


@pytest.mark.parametrize(
    ("overrides", "difference"),
    [
        (["data.fold=1"], "data.fold is 0 there and 1 here"),
        (["model.backbone=resnet50"], "model.backbone is efficientnet_lite0 there and resnet50 here"),
        (["model.doem=false", "loss.pcl=false"], "model.doem is True there and False here"),
        (["model.prototype_channels=32"], "model.prototype_channels is 16 there and 32 here"),
        (["model.fem_scales=[1]"], "model.fem_scales is [1.0, 0.5] there and [1.0] here"),
        (["data.image_size=97"], "data.image_size is 65 there and 97 here"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    run: Run, config: Path, overrides: list[str], difference: str
) -> None:
    best = run.folder / "best.pt"
    result = call(test_command, "--config", config, "--checkpoint", best, *overrides)
    refused(result, best, difference, "use the config it was trained with")


def test_a_missing_checkpoint_is_refused(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "nothing.pt"
    refused(call(test_command, "--config", config, "--checkpoint", path), path, "does not exist")


def test_a_truncated_checkpoint_is_refused(run: Run, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    shutil.copy(run.folder / "best.pt", path)
    _halve_file(path)
    refused(call(test_command, "--config", config, "--checkpoint", path), path, "damaged", "use another one")


def test_text_is_no_checkpoint(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.pt"
    _write_text(path)
    result = process("test.py", "--config", config, "--checkpoint", path)
    refused(result, path, "not a checkpoint", "use another one")


def test_tensors_alone_are_no_checkpoint(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"fem.fuse.0.weight": torch.zeros(3)}, path)
    refused(call(test_command, "--config", config, "--checkpoint", path), path, "not a checkpoint of this project")


def test_a_checkpoint_of_an_earlier_format_is_refused_as_such(run: Run, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(load(run.folder / "best.pt") | {"format": 1}, path)
    refused(call(test_command, "--config", config, "--checkpoint", path), path, "is of format 1", "check out")


def test_a_checkpoint_that_lacks_an_entry_is_refused(run: Run, config: Path, tmp_path: Path) -> None:
    state, path = load(run.folder / "best.pt"), tmp_path / "part.pt"
    del state["model"]["fem.fuse.0.weight"]
    torch.save(state, path)
    refused(call(test_command, "--config", config, "--checkpoint", path), path, "fem.fuse.0.weight")


class _Bomb:
    """Unpickled carelessly, creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.fixture(params=["torch file", "bare pickle"])
def bomb(request: pytest.FixtureRequest, run: Run, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint with code in it; the test fails where the code has run."""
    path, target = tmp_path / "bomb.pt", tmp_path / "exploded"
    state = {**load(run.folder / "best.pt"), "extra": _Bomb(target)}
    if request.param == "torch file":
        torch.save(state, path)
        torch.load(path, weights_only=False)
    else:
        path.write_bytes(pickle.dumps({"format": 1, "extra": _Bomb(target)}))
        pickle.loads(path.read_bytes())
    assert target.is_dir()  # it works
    target.rmdir()
    yield path
    assert not target.exists()


def test_code_in_a_checkpoint_is_not_run_by_test_py(bomb: Path, config: Path) -> None:
    refused(call(test_command, "--config", config, "--checkpoint", bomb), bomb, "damaged or not a checkpoint")


def test_the_reason_of_a_refusal_is_not_torchs_advice_on_weights_only(bomb: Path, config: Path) -> None:
    assert "weights_only" not in call(test_command, "--config", config, "--checkpoint", bomb).err


def test_code_in_a_checkpoint_is_not_run_by_resume(bomb: Path, config: Path, tmp_path: Path) -> None:
    result = call(train, "--config", config, f"run_dir={tmp_path / 'run'}", f"resume={bomb}")
    refused(result, bomb, "damaged or not a checkpoint")


def test_code_in_a_weights_file_is_not_run(bomb: Path, config: Path, tmp_path: Path) -> None:
    result = call(train, "--config", config, f"run_dir={tmp_path / 'run'}", f"model.weights={bomb}")
    refused(result, bomb, "cannot be read")


def test_a_missing_weights_file_is_refused(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "initmodel/resnet50.pth"
    result = call(train, "--config", config, f"run_dir={tmp_path / 'run'}", f"model.weights={path}")
    refused(result, path, "does not exist", "model.weights")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_backbone_are_refused(run: Run, config: Path, tmp_path: Path) -> None:
    source = json.loads((run.folder / "run.json").read_text())["weights"]["source"]
    overrides = [f"run_dir={tmp_path / 'run'}", "model.backbone=vgg16_bn", f"model.weights={source}"]
    refused(call(train, "--config", config, *overrides), source, "missing", "another architecture")


def test_weights_that_cannot_be_fetched_are_refused_with_address_and_place(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(url: str, *_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.chdir(tmp_path)  # where no initmodel/ is filled
    result = call(train, "--config", config, f"run_dir={tmp_path / 'run'}", "model.backbone=resnet50")
    refused(result, "resnet50", "https://download.pytorch.org/", "initmodel/resnet50-", "no route to host")


# Scripts


SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_has_no_syntax_error(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("name", ["train_fold.sh", "test_fold.sh"])
def test_a_fold_script_without_arguments_prints_its_usage(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ROOT / "scripts" / name], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert f"bash scripts/{name} DATASET BACKBONE FOLD SHOT [ABLATION] [key=value ...]" in done.stderr
    assert done.stdout == ""


def test_train_fold_hands_its_arguments_to_train_py(tmp_path: Path) -> None:
    folders = os.pathsep.join([str(Path(sys.executable).parent), ENVIRONMENT["PATH"]])
    done = subprocess.run(
        ["bash", ROOT / "scripts/train_fold.sh", "pascal", "resnet50", "0", "1", "device=cuda"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PATH": folders},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    refused(Result(done.returncode, done.stdout, done.stderr), "device=cuda")


def test_panels_show_the_best_worst_and_random_episodes_with_a_baseline_beside(
    config: Path, mixed: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run/best.pt"
    checkpoint.parent.mkdir()
    shutil.copy(mixed, checkpoint)
    switches = ["model.bgem=false", "model.doem=false", "loss.pcl=false"]
    baseline = short_run(config, tmp_path / "pfenet", *switches) / "last.pt"
    command = ["--config", config, "--checkpoint", checkpoint, "--episodes", 9]
    result = succeeded(call(test_command, *command, "--save-panels", 2, "--baseline-checkpoint", baseline))
    folder = checkpoint.parent / "panels"
    assert str(folder / "contact_sheet.png") in result.out
    names = sorted(path.name for path in folder.iterdir())
    assert [name.split("_")[:2] for name in names if name != "contact_sheet.png"] == [
        [kind, rank] for kind in ("best", "random", "worst") for rank in "12"
    ]
    sizes = {name: Image.open(folder / name).size for name in names}
    width, height = sizes.pop("contact_sheet.png")
    (single,) = set(sizes.values())  # one row each, as wide as the sheet; with the baseline's column
    assert (width, height) == (single[0], 6 * (single[1] - GAP) + GAP)
    assert single[0] == 7 * (TILE + GAP) + GAP
    without = succeeded(call(test_command, *command, "--seeds", 0, 1, "--save-panels", 1))
    assert "panels" in without.out
    assert "18/18" in without.err and "/19" not in without.err  # episodes of both seeds, and no images among them
    assert max(int(name.stem.rsplit("episode")[-1]) for name in folder.glob("*episode*")) < 9  # of the first seed
    assert len(list(folder.iterdir())) == 4
    assert Image.open(next(folder.glob("best_1_*"))).width == 7 * (TILE + GAP) + GAP - (TILE + GAP)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--save-panels", 0], ["--save-panels", "at least 1"]),
        (["--baseline-checkpoint", "x.pt"], ["--save-panels N"]),
        (["--save-panels", 1, "--baseline-checkpoint", "x.pt"], ["x.pt does not exist"]),
    ],
)
def test_panel_options_that_make_no_sense_are_refused(
    config: Path, mixed: Path, arguments: list[Any], words: list[str]
) -> None:
    refused(call(test_command, "--config", config, "--checkpoint", mixed, "--episodes", 2, *arguments), *words)


# ---------------------------------------------------------------------------------------------------------------------
# whether the loader or the model is the limit
# ---------------------------------------------------------------------------------------------------------------------


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
