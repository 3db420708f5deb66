"""Fixtures that several files share. They cost time: every worker of pytest-xdist makes those it needs once."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train
from model.backbone import Backbone, build_backbone
from tests.harness import ROOT, TINY, Run, call, short_run, succeeded
from tests.scenes import write_checkpoint
from util.data.synthetic import generate
from util.photos.segmenter import NTRESegmenter, TrainingFreeSegmenter

SLOWEST = ("resume", "train", "predict", "model", "readme", "evaluate", "convert_pfenet", "extension", "export", "demo")
"""files of tests that take longest"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the slowest files first: pytest-xdist gives each worker whole files, and all shall end together."""
    places = {f"test_{name}.py": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Undo what a run in this process that was stopped leaves behind; children would inherit an ignored signal."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def small_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make training-free segmentation a ninth of the work."""
    monkeypatch.setattr(TrainingFreeSegmenter, "SIDE", 129)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small synthetic data set: 60 training and 40 validation images. Leave its files as they are."""
    root = tmp_path_factory.mktemp("synthetic")
    generate(root, train=60, val=40)
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Root of a data set of 3 training and 4 validation images a class. Leave its files as they are."""
    root = tmp_path_factory.mktemp("commands") / "tiny"
    generate(root, train=24, val=32)
    yield root
    shutil.rmtree(root.parent)


@pytest.fixture(scope="session")
def config(tiny: Path) -> Path:
    """A config of ``tiny`` for runs of seconds; what session fixtures make lies beside it."""
    path = tiny.parent / "tiny.yaml"
    path.write_text(TINY.format(base=ROOT / "configs/base/synthetic.yaml", root=tiny))
    return path


@pytest.fixture(scope="session")
def short(config: Path) -> Path:
    """Folder of a run of one epoch. Leave its files as they are."""
    return short_run(config, config.parent / "short")


@pytest.fixture(scope="session")
def run(config: Path) -> Run:
    """Two epochs in one go. Leave its files as they are."""
    folder = config.parent / "run"
    return Run(folder, succeeded(call(train, "--config", config, f"run_dir={folder}")))


@pytest.fixture(scope="session")
def lite0() -> Backbone:
    """The light backbone with its ImageNet weights."""
    return build_backbone("efficientnet_lite0")[0]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained checkpoint that predicts half of a scene. Leave it as it is."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small.pt")


@pytest.fixture(scope="session")
def segmenter(checkpoint: Path) -> NTRESegmenter:
    return NTRESegmenter.from_checkpoint(checkpoint, device="cpu", precision="fp32")
