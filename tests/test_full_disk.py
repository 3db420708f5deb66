"""A full disk is one line that names the file, in every command.

A limit on the size of files stands for the disk: it lets writes fail in the system, wherever they come from.
"""

from util.command import run_command

import contextlib
import errno
import importlib.util
import io
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import predict
import train
from scripts import check_data, make_lists, make_synthetic, report
from util.data.images import read_class_ids
from util.data.synthetic import generate

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CONFIG = """\
base: {base}
data:
  root: {root}
  train_list: {root}/lists/train.txt
  val_list: {root}/lists/val.txt
  min_area: 64
  image_size: 65
model: {{fem_scales: [1, 0.5], prototype_channels: 16}}
loss: {{bank_size: 50}}
train: {{epochs: 1, batch_size: 4, warmup: 2}}
eval: {{episodes: 4}}
precision: fp32
workers: 0
device: cpu
"""


def _test_command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ntrenet_test_command", ROOT / "test.py")  # not Python's own 'test'
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


test_command = _test_command()


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def call(module: ModuleType, *arguments: object, size: int | None = None) -> tuple[int, str]:
    """Exit code and stderr, without progress, of a command in this process."""
    err = io.StringIO()
    limit = contextlib.nullcontext() if size is None else files_of_at_most(size)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        with contextlib.redirect_stderr(err), limit, pytest.raises(SystemExit) as end:
            run_command(module.main)
    assert isinstance(end.value.code, int)
    lines = [line for line in re.split(r"[\r\n]", err.getvalue()) if line.strip() and "%|" not in line]
    return end.value.code, "\n".join(lines)


def refused(ending: tuple[int, str], path: Path) -> None:
    code, err = ending
    assert code == 2, err
    start = rf"error: cannot write (checkpoint )?{re.escape(str(path))} \("
    assert re.match(start, err) and "; free some space" in err and "\n" not in err, err
    assert not list(path.parent.glob("*.tmp"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full")
    generate(folder / "data", 28, 24)
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(base=ROOT / "configs/base/synthetic.yaml", root=folder / "data"))
    yield path
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def checkpoint(config: Path) -> Path:
    run = config.parent / "run"
    assert call(train, "--config", config, f"run_dir={run}") == (0, "")
    return run / "last.pt"


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl", "best.pt", "last.pt"])
def test_training(config: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fsync = os.fsync

    def full(file: int) -> None:
        if Path(f"/proc/self/fd/{file}").resolve().name.removesuffix(".tmp") == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    refused(call(train, "--config", config, f"run_dir={tmp_path}"), tmp_path / name)


@pytest.mark.parametrize(("size", "name"), [(0, "lock"), (5000, "tensorboard")])
def test_training_where_the_system_refuses(
    config: Path, checkpoint: Path, tmp_path: Path, size: int, name: str
) -> None:
    refused(call(train, "--config", config, f"run_dir={tmp_path}", size=size), tmp_path / name)


@pytest.mark.parametrize("option", ["--out r.json", "--write-episodes e.jsonl", "--panel p.png"])
def test_evaluation(config: Path, checkpoint: Path, tmp_path: Path, option: str) -> None:
    name, file = option.split()
    command = ["--config", config, "--checkpoint", checkpoint, name, tmp_path / file]
    refused(call(test_command, *command, size=0), tmp_path / file)


def test_prediction(config: Path, checkpoint: Path, tmp_path: Path) -> None:
    image = sorted((config.parent / "data/JPEGImages").iterdir())[0]
    mask = config.parent / "data/SegmentationClassAug" / f"{image.stem}.png"
    value = max(v for v in set(read_class_ids(mask).ravel().tolist()) if v != 255)
    files = ["--support", image, "--mask", mask, "--class-id", value, "--query", image, "--out", tmp_path / "out"]
    refused(call(predict, "--checkpoint", checkpoint, *files, size=0), tmp_path / "out/predict.json")
    settled = call(predict, "--checkpoint", checkpoint, *files, size=900)
    refused(settled, tmp_path / "out" / f"{image.stem}_overlay.jpg")


def test_scripts_that_write_data(config: Path, tmp_path: Path) -> None:
    data = config.parent / "data"
    folders = ["--root", data, "--images", data / "JPEGImages", "--masks", data / "SegmentationClassAug"]
    refused(call(make_lists, *folders, "--out", tmp_path, size=0), tmp_path / "train.txt")
    refused(call(check_data, "--config", config, "--json", tmp_path / "r.json", size=0), tmp_path / "r.json")
    made = tmp_path / "made"
    ending = call(make_synthetic, "--out", made, "--train", 20, "--val", 20, size=0)
    refused(ending, made / "JPEGImages/train_00000.jpg")


def test_report(config: Path, checkpoint: Path, tmp_path: Path) -> None:
    results = checkpoint.parent / "results.json"
    assert call(test_command, "--config", config, "--checkpoint", checkpoint, "--out", results)[0] == 0
    code, err = call(report, checkpoint.parent, "--out", tmp_path, size=0)
    assert code == 2
    assert re.fullmatch(rf"error: cannot write {tmp_path}/\S+ \(File too large\); free some space.*", err), err


def test_export_is_refused_and_not_aborted(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "n.pt2"
    done = subprocess.run(
        [sys.executable, "scripts/export.py", "--checkpoint", checkpoint, "--format", "pt2", "--out", out],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY)),
        check=False,
    )
    refused((done.returncode, done.stderr.strip()), tmp_path / "n.unchecked.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_output_that_is_full(config: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "scripts/check_data.py", "--config", config],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    lines = [line for line in done.stderr.splitlines() if "%|" not in line]
    assert lines == [
        "error: cannot write the output (No space left on device); free some space, or choose another place"
    ]
    assert done.returncode == 2
