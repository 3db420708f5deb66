"""How batches reach the main process: with little shared memory, with few file descriptors, and when they cannot."""

import multiprocessing
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from tests.harness import process, succeeded
from tests.scenes import SMALL
from util.config import load_config
from util.data import loading
from util.data.loading import LoadingError, batches_of, start_worker
from util.engine.build import (
    build_eval_loader,
    build_eval_sampler,
    build_index,
    build_train_loader,
    build_train_sampler,
)

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml"


def options(root: Path, *others: str) -> list[str]:
    lists = [f"data.{split}_list={root}/lists/{split}.txt" for split in ("train", "val")]
    return [f"data.root={root}", *lists, "device=cpu", *SMALL, *others]


# ---------------------------------------------------------------- little shared memory


@pytest.mark.parametrize(("free", "shared"), [(2**20, False), (2**30, True)])
def test_batches_are_the_same_with_little_shared_memory(
    free: int, shared: bool, synthetic: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(CONFIG, options(synthetic, "train.batch_size=32", "workers=2"))
    sampler = build_train_sampler(config, build_index(config, "train"))
    expected = list(build_train_loader(config.model_copy(update={"workers": 0}), sampler, start=0, stop=3))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30 - free, free))
    batches = list(batches_of(build_train_loader(config, sampler, start=0, stop=3)))
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.pixels, other.pixels) and torch.equal(batch.class_id, other.class_id)
        assert batch.pixels.is_shared() == shared
    note = capsys.readouterr().err
    assert ("(workers=2) need 6 MiB of shared memory" in note and "--shm-size" in note) != shared


class Ones(Dataset[torch.Tensor]):
    """Eight MiB of ones each."""

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.ones(2**21)


def fail_to_send() -> None:
    raise OSError("no way out")


class Unsendable:
    def __reduce__(self) -> tuple[Any, ...]:
        fail_to_send()
        return Unsendable, ()


def without_shared_memory(number: int) -> None:
    """A worker whose shared memory can hold files of 1 MiB."""
    start_worker(number, shared=True)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


@pytest.mark.parametrize(
    ("collate", "start"),
    [
        (lambda _: Unsendable(), partial(start_worker, shared=True)),
        (default_collate, without_shared_memory),
    ],
    ids=["cannot be pickled", "shared memory is full"],
)
def test_a_batch_that_cannot_be_sent_is_an_error_that_names_the_remedy(
    collate: Callable[[Any], Any], start: Callable[[int], None]
) -> None:
    given: dict[str, Any] = {"num_workers": 1, "timeout": 0.5, "collate_fn": collate, "worker_init_fn": start}
    loader = DataLoader(Ones(), batch_sampler=[[0], [1]], **given)
    with pytest.raises(LoadingError, match="--shm-size"):
        next(batches_of(loader))


class Slow(Dataset[int]):
    """Item n takes n seconds."""

    def __getitem__(self, number: int) -> int:
        time.sleep(number)
        return number


@pytest.mark.parametrize(("patience", "waits"), [(60, True), (0.5, False)])
def test_a_slow_disk_is_waited_for_and_one_that_hangs_is_not(
    patience: float, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "PATIENCE", patience)
    others = set(multiprocessing.active_children())
    numbers = [[0], [1], [0]] if waits else [[0], [1000]]
    start = partial(start_worker, shared=True)
    batches = batches_of(DataLoader(Slow(), batch_sampler=numbers, num_workers=1, timeout=0.2, worker_init_fn=start))
    assert int(next(batches)) == 0
    if waits:
        assert [int(batch) for batch in batches] == [1, 0]
        return
    with pytest.raises(LoadingError, match=r"no batch came .*workers=0 .* --shm-size"):
        next(batches)
    for worker in set(multiprocessing.active_children()) - others:
        worker.join(30)
        assert not worker.is_alive()


# ---------------------------------------------------------------- few file descriptors


def test_an_evaluation_of_many_images_needs_few_file_descriptors(synthetic: Path, tmp_path: Path) -> None:
    """All images of a round are kept; no file may stay open for any of them."""
    lines = (synthetic / "lists/val.txt").read_text().split()
    for copy in range(14):
        for name in lines:
            target = tmp_path / f"{copy}_{name.replace('/', '_')}"
            target.hardlink_to(synthetic / name)
    rows = [f"{copy}_{name.replace('/', '_')}" for copy in range(14) for name in lines]
    (tmp_path / "val.txt").write_text("".join(f"{a} {b}\n" for a, b in zip(rows[::2], rows[1::2], strict=True)))
    given = [
        f"data.root={tmp_path}",
        f"data.val_list={tmp_path}/val.txt",
        "data.folds=[[striped_star], [dotted_ring]]",
        "data.min_area=1",
        "model.weights=random",
        "model.channels=8",
        "workers=1",
        *SMALL,
    ]
    done = succeeded(process("-c", EVALUATION, CONFIG, *given))
    assert int(done.out) > 50, "images in one round, more than descriptors"


EVALUATION = """
import resource, sys
from pathlib import Path
from util.config import load_config
from util.engine.build import build_eval_sampler, build_index, build_model, select_hardware
from util.engine.loops import evaluate

config = load_config(Path(sys.argv[1]), sys.argv[2:])
index = build_index(config, "val")
sampler = build_eval_sampler(config, index, 0)
episodes = [sampler(number) for number in range(60)]
model, _ = build_model(config)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
evaluate(model, index, episodes, config=config, hardware=select_hardware(config))
print(len({place for query, supports, _ in episodes for place in (query, *supports)}))
"""


# ---------------------------------------------------------------- what is not done twice


def test_the_order_of_a_pass_is_drawn_once(synthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(CONFIG, options(synthetic))
    sampler = build_train_sampler(config, build_index(config, "train"))
    again = build_train_sampler(config, build_index(config, "train"))
    expected = [again(number) for number in reversed(range(3 * len(sampler)))][::-1]
    drawn = []
    make = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: (drawn.append(seed), make(seed))[1])
    assert [sampler(number) for number in range(3 * len(sampler))] == expected
    assert [seed for seed in drawn if seed[1] == 0] == [[config.seed, 0, n] for n in range(3)]


def test_episodes_of_an_evaluation_hold_what_it_needs_alone(synthetic: Path) -> None:
    config = load_config(CONFIG, options(synthetic, "workers=0"))
    sampler = build_eval_sampler(config, build_index(config, "val"), 0)
    (batch,) = build_eval_loader(config, sampler, range(2))
    assert batch.pixels.shape[1:3] == (2, 4) and batch.query_classes is None
