"""Commands as users start them, or in this process, how they ended, and a small run for tests that need one.

Expected values are never taken from here: this file starts things and compares files bit for bit.
"""

from util.command import run_command

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "https_proxy": "http://127.0.0.1:9",  # nothing listens there: a download fails at once
    "http_proxy": "http://127.0.0.1:9",
}
SYNTHETIC = ROOT / "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml"
NOVEL = ["striped_star", "dotted_ring", "brick_arrow", "checked_heart", "cracked_leaf"]
"""classes 1 to 5: fold 0 of a contiguous scheme"""
TINY = """\
base: {base}
data:
  root: {root}
  train_list: {root}/lists/train.txt
  val_list: {root}/lists/val.txt
  image_size: 65
  min_area: 256
  rotation: 10
  scale: [0.75, 0.95]
model:
  backbone: efficientnet_lite0
  fem_scales: [1, 0.5]
  prototype_channels: 16
loss: {{bank_size: 50}}
train: {{epochs: 2, batch_size: 2, lr: 0.03, warmup: 4}}
eval: {{episodes: 8, batch_size: 4, every: 1, select: miou, geometry: exact}}
precision: fp32
workers: 0
device: cpu
"""


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Run(NamedTuple):
    """A finished training run."""

    folder: Path
    result: Result


def _load_test_command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ntrenet_test_command", ROOT / "test.py")  # not Python's own 'test'
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


test_command = _load_test_command()


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start ``python arguments`` from the repository's root, in a process group of its own."""

    def heed_signals() -> None:  # under nohup, or behind a shell's &, a child would inherit that they are ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    given = {"cwd": ROOT, "env": ENVIRONMENT, "start_new_session": True, "preexec_fn": heed_signals} | pipes | options
    return subprocess.Popen([sys.executable, *map(str, arguments)], **given)


def finished(child: subprocess.Popen[str]) -> Result:
    """Wait for a started command."""
    out, err = child.communicate(timeout=300)
    return Result(child.returncode, out, err)


def process(*arguments: object, **options: Any) -> Result:
    """Run ``python arguments`` from the repository's root."""
    return finished(start(*arguments, **options))


def ended(action: Any) -> Result:
    """Run something as a command's ``main`` is run, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        run_command(action)
    assert isinstance(end.value.code, int)
    return Result(end.value.code, out.getvalue(), err.getvalue())


def call(module: ModuleType, *arguments: object) -> Result:
    """Run a command's ``main`` as its script does, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        return ended(module.main)


def beside_progress_bars(err: str) -> list[str]:
    """Lines of stderr, without tqdm's."""
    lines = (line.replace("\x1b[A", "").strip() for line in re.split(r"[\r\n]", err))
    return [line for line in lines if line and "%|" not in line and "image/s" not in line]


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
    """A file that torch.save wrote."""
    return torch.load(path, map_location="cpu", weights_only=True)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (sha256(path), path.stat().st_mtime_ns) for path in files}


def events(run: Path) -> EventAccumulator:
    """What a run wrote for TensorBoard."""
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every scalar in a run's TensorBoard events."""
    found = events(run)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def data_at(root: Path | str) -> list[str]:
    """Overrides that select a data set."""
    return [f"data.root={root}", *(f"data.{split}_list={root}/lists/{split}.txt" for split in ("train", "val"))]


def copied(tiny: Path, folder: Path) -> tuple[Path, list[str]]:
    """A copy of a data set that may be changed, and the overrides that select it."""
    root = shutil.copytree(tiny, folder / "data", ignore=shutil.ignore_patterns("*.npz"))
    return root, [*data_at(root), f"run_dir={folder / 'run'}"]


def short_run(config: Path, folder: Path, *overrides: str) -> Path:
    """Train one epoch in this process."""
    succeeded(call(train, "--config", config, f"run_dir={folder}", "train.epochs=1", "eval.episodes=4", *overrides))
    return folder


def evaluated(config: Path, checkpoint: Path, out: Path, *arguments: object) -> dict[str, Any]:
    """Results of test.py."""
    succeeded(call(test_command, "--config", config, "--checkpoint", checkpoint, "--out", out, *arguments))
    return json.loads(out.read_text())


class Trap:
    """Unpickled carelessly, makes a folder: stands for any code that a file can carry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return os.mkdir, (str(self.folder),)
