"""Loader processes: what a command says if one fails, and that they end."""

import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from tests.harness import SYNTHETIC, Run, data_at, evaluated, process, refused, short_run
from tests.scenes import SMALL
from util.config import Config, load_config
from util.data import loading
from util.data.loading import batches_of, start_worker, usable_workers
from util.engine.build import build_index, build_train_sampler, training_batches

RUN = "from util.command import run_command; from tests import test_loading; run_command(test_loading.{})"


class Numbers(Dataset[int]):
    """Item n is n, but item 3 kills the process that asks for it, and item 4 raises a RuntimeError."""

    def __getitem__(self, number: int) -> int:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 4:
            raise RuntimeError("a bug in a reader")
        return number


def load_numbers() -> None:
    """Load the items of the command line, each followed by a step of so many seconds."""
    seconds, *numbers = sys.argv[1:]
    loader = DataLoader(Numbers(), sampler=list(map(int, numbers)), num_workers=2, worker_init_fn=start_worker)
    for _ in batches_of(loader):
        time.sleep(float(seconds))


def config_of(root: Path | str, workers: int) -> Config:
    return load_config(SYNTHETIC, [*data_at(root), *SMALL, "train.batch_size=2", f"workers={workers}"])


def load_images() -> None:
    """Load five batches of the data set that the command line names."""
    config = config_of(sys.argv[1], workers=1)
    sampler = build_train_sampler(config, build_index(config, "train"))
    for _ in training_batches(config, sampler, start=0, stop=5):
        pass


@pytest.mark.parametrize("seconds", [0, 0.3], ids=["while loading", "during a step"])
def test_a_worker_that_the_system_kills_is_one_line(seconds: float) -> None:
    result = process("-c", RUN.format("load_numbers"), seconds, 0, 1, 2, 3, 5, 6)
    # torch may print where its signal handler interrupted it, and the other worker that its connection broke
    (error,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 2 and error.startswith("error: the system ended a loader process"), result.err


def test_an_error_of_the_code_in_a_worker_is_not_taken_for_a_killed_worker() -> None:
    result = process("-c", RUN.format("load_numbers"), 0, 1, 4)
    assert result.code == 1 and "RuntimeError: a bug in a reader" in result.err


def test_an_unreadable_image_names_its_file_and_the_command_ends(synthetic: Path, tmp_path: Path) -> None:
    root = shutil.copytree(synthetic, tmp_path / "data")
    config = config_of(root, workers=0)
    sampler = build_train_sampler(config, build_index(config, "train"))
    damaged = sampler.index.items[sampler(5).query].image
    damaged.write_bytes(damaged.read_bytes()[:500])
    refused(process("-c", RUN.format("load_images"), root), damaged)


def test_what_loader_processes_get_can_be_sent_to_one_that_is_spawned(
    config: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    sent = []

    class Loader(DataLoader[Any]):
        def __init__(self, dataset: Dataset[Any], **options: Any) -> None:
            sent.append(pickle.dumps((dataset, options["collate_fn"], options["worker_init_fn"])))
            super().__init__(dataset, **options)

    monkeypatch.setattr(loading, "DataLoader", Loader)
    short_run(config, run.folder.parent / "spawned")
    evaluated(config, run.folder / "best.pt", run.folder.parent / "spawned.json", "--baselines")
    assert len(sent) >= 5 and max(map(len, sent)) < 2**20  # nor is a network sent along


def test_workers_end_with_the_iterator(synthetic: Path) -> None:
    config, others = config_of(synthetic, workers=2), set(multiprocessing.active_children())
    batches = training_batches(config, build_train_sampler(config, build_index(config, "train")), start=0, stop=9)
    next(batches)
    assert set(multiprocessing.active_children()) > others
    batches.close()
    assert set(multiprocessing.active_children()) == others


@pytest.mark.parametrize(("free", "expected"), [(2**20, 0), (2**30, 1)])
def test_without_enough_shared_memory_images_are_loaded_without_workers(
    free: int, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30 - free, free))
    assert usable_workers(1, batch_bytes=2**20) == expected
    notes = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(notes) == (expected == 0) and all("1 MiB free" in line and "--shm-size" in line for line in notes)
