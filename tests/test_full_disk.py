"""A full disk is one line that names the file, in every command.

A limit on the size of files stands for the disk: it lets writes fail in the system, wherever they come from.
"""

import contextlib
import errno
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import predict
import train
from scripts import check_data, make_lists, make_synthetic, report
from tests.harness import Result, call, process, succeeded, test_command
from tests.harness import refused as ended_in_one_line
from util.data.images import read_class_ids


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full(size: int, module: ModuleType, *arguments: object) -> Result:
    """How a command ends where no file can be larger than ``size``."""
    with files_of_at_most(size):
        return call(module, *arguments)


def refused(result: Result, path: Path) -> None:
    line = ended_in_one_line(result, "; free some space")
    assert re.match(rf"error: cannot write (checkpoint )?{re.escape(str(path))} \(", line), line
    assert not list(path.parent.glob("*.tmp"))


@pytest.fixture
def checkpoint(short: Path) -> Path:
    return short / "last.pt"


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl", "best.pt", "last.pt"])
def test_training(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fsync = os.fsync

    def full(file: int) -> None:
        if Path(f"/proc/self/fd/{file}").resolve().name.removesuffix(".tmp") == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    smallest = ["train.epochs=1", "train.batch_size=12", "data.image_size=33", "eval.episodes=1"]
    refused(call(train, "--config", config, f"run_dir={tmp_path}", *smallest), tmp_path / name)


@pytest.mark.parametrize(("size", "name"), [(0, "lock"), (5000, "tensorboard")])
def test_training_where_the_system_refuses(config: Path, tmp_path: Path, size: int, name: str) -> None:
    refused(full(size, train, "--config", config, f"run_dir={tmp_path}"), tmp_path / name)


@pytest.mark.parametrize("option", ["--out r.json", "--write-episodes e.jsonl", "--panel p.png"])
def test_evaluation(config: Path, checkpoint: Path, tmp_path: Path, option: str) -> None:
    name, file = option.split()
    command = ["--config", config, "--checkpoint", checkpoint, "--episodes", 2, name, tmp_path / file]
    refused(full(0, test_command, *command), tmp_path / file)


def test_prediction(tiny: Path, checkpoint: Path, tmp_path: Path) -> None:
    image = sorted((tiny / "JPEGImages").iterdir())[0]
    mask = tiny / "SegmentationClassAug" / f"{image.stem}.png"
    value = max(v for v in set(read_class_ids(mask).ravel().tolist()) if v != 255)
    files = ["--support", image, "--mask", mask, "--class-id", value, "--query", image, "--out", tmp_path / "out"]
    refused(full(0, predict, "--checkpoint", checkpoint, *files), tmp_path / "out/predict.json")
    settled = full(900, predict, "--checkpoint", checkpoint, *files)
    refused(settled, tmp_path / "out" / f"{image.stem}_overlay.jpg")


def test_scripts_that_write_data(config: Path, tiny: Path, tmp_path: Path) -> None:
    folders = ["--root", tiny, "--images", tiny / "JPEGImages", "--masks", tiny / "SegmentationClassAug"]
    refused(full(0, make_lists, *folders, "--out", tmp_path), tmp_path / "train.txt")
    refused(full(0, check_data, "--config", config, "--json", tmp_path / "r.json"), tmp_path / "r.json")
    made = tmp_path / "made"
    ending = full(0, make_synthetic, "--out", made, "--train", 20, "--val", 20)
    refused(ending, made / "JPEGImages/train_00000.jpg")


def test_report(config: Path, checkpoint: Path, tmp_path: Path) -> None:
    results = tmp_path / "runs/one/results.json"
    command = ["--config", config, "--checkpoint", checkpoint, "--episodes", 2, "--out", results]
    succeeded(call(test_command, *command))
    line = ended_in_one_line(full(0, report, results.parent, "--out", tmp_path / "report"))
    assert re.match(rf"error: cannot write {tmp_path}/report\S* \(File too large\); free some space", line), line


@pytest.mark.slow
def test_export_is_refused_and_not_aborted(checkpoint: Path, tmp_path: Path) -> None:
    command = ["scripts/export.py", "--checkpoint", checkpoint, "--format", "pt2", "--out", tmp_path / "n.pt2"]
    small = (1000, resource.RLIM_INFINITY)
    done = process(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, small))
    refused(done, tmp_path / "n.unchecked.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_output_that_is_full(config: Path) -> None:
    with Path("/dev/full").open("w") as device:
        done = process("scripts/check_data.py", "--config", config, stdout=device)
    assert ended_in_one_line(done._replace(out="")) == (
        "error: cannot write the output (No space left on device); free some space, or choose another place"
    )
