"""Training for a GPU: no synchronisation between readings of the log, torch.compile, and, on a CUDA device, equality.

Without a GPU, tensors on the meta device take its place. They have no values, so reading one is an error, and code that
asks them is told that they are on CUDA.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from model.parallel import Dropout2d
from tests.harness import ROOT, SYNTHETIC, data_at, process, succeeded
from tests.scenes import SMALL
from util.config import Config, load_config
from util.data.dataset import Episode
from util.engine import training as training_module
from util.engine.build import (
    Hardware,
    build_eval_sampler,
    build_index,
    build_model,
    build_train_sampler,
    select_hardware,
    training_batches,
)
from util.engine.evaluation import NetworkMethod, evaluate
from util.engine.interruption import Interruption
from util.engine.log import TrainingLog
from util.engine.training import start_or_resume, train_epoch
from util.progress import progress

META = torch.device("meta")


def config_of(root: Path, run: Path, *overrides: str, ablation: str | None = None) -> Config:
    files = [SYNTHETIC, *([ROOT / f"configs/ablation/{ablation}.yaml"] if ablation else [])]
    sizes = ["data.min_area=64", "model.channels=32", "loss.bank_size=8", "train.batch_size=2", "workers=0"]
    return load_config(files, [*data_at(root), *SMALL, *sizes, f"run_dir={run}", *overrides])


def batches_of(config: Config, count: int) -> Iterator[Episode]:
    return training_batches(config, build_train_sampler(config, build_index(config, "train")), start=0, stop=count)


def trained(config: Config, *, dropout: bool = True, steps: int = 3) -> dict[str, float]:
    """Sums of the losses over a few steps, as train.py makes them."""
    training = start_or_resume(config, select_hardware(config), {})
    for part in training.model.modules():
        if isinstance(part, Dropout2d) and not dropout:
            part.p = 0.0
    with closing(TrainingLog(training, steps)) as log, Interruption() as stop:
        train_epoch(training, batches_of(config, steps), steps, log, stop)
    return training.sums


# ---------------------------------------------------------------- synchronisations


class PretendedCuda(TorchFunctionMode):
    """Tensors on the meta device say that they are on CUDA. Blocking copies and mixed devices are errors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__get__" and func.__self__ is Tensor.is_cuda:
            return args[0].is_meta
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name not in ("to", "tensor", "as_tensor"):
            assert len({tensor.is_meta for tensor in tensors if tensor.dim()}) < 2, f"{name} of tensors on both devices"
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        copied = result.is_meta and not any(tensor.is_meta for tensor in tensors)
        assert not copied or kwargs.get("non_blocking"), f"{name} waits for the device"
        return result


class OnMeta(Hardware):
    """Hardware with a device that torch.autocast does not know."""

    def autocast(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


class UnreadLog(TrainingLog):
    """Counts the steps between two readings instead of reading."""

    def __init__(self) -> None:
        self.bar, self.readings = progress(disable=True), list[int]()
        self._unread = []

    def read(self, sums: dict[str, float]) -> None:
        self.readings.append(len(self._unread))
        self._unread = []

    def checkpoint_is_due(self) -> bool:
        return False


@pytest.mark.parametrize(("ablation", "shots"), [(None, 5), ("ours", 1), ("base_learner", 1)])
def test_a_training_step_waits_for_the_device_only_when_the_log_is_read(
    synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ablation: str | None, shots: int
) -> None:
    config = config_of(synthetic, tmp_path, f"data.shots={shots}", ablation=ablation)
    sgd = torch.optim.SGD  # the fused one has no kernel for this device
    monkeypatch.setattr(torch.optim, "SGD", lambda *given, fused, **options: sgd(*given, **options))
    training = start_or_resume(config, OnMeta(META, torch.float32), {})
    monkeypatch.setattr(training_module, "LOG_EVERY", 2)
    batches, log = list(batches_of(config, 3)), UnreadLog()
    with PretendedCuda(), Interruption() as stop:
        train_epoch(training, batches, 3, log, stop)
    assert log.readings == [2, 1]


def test_waits_and_mixed_devices_are_errors_on_a_pretended_gpu() -> None:
    x, here = torch.ones(3, device=META), torch.ones(3)
    with PretendedCuda():
        assert x.is_cuda and not here.is_cuda and here.to(META, non_blocking=True).is_cuda
        waits = [lambda: float(x.sum()), x.tolist, x.cpu, lambda: x[x > 0], lambda: bool((x > 0).any())]
        waits += [lambda: here.to(META), lambda: torch.tensor([1], device=META)]
        for mistake in [*waits, lambda: x + here, lambda: torch.cat([x, here]), lambda: x[torch.tensor([0])]]:
            with pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
                mistake()


# ---------------------------------------------------------------- torch.compile


@pytest.mark.slow
def test_compiled_training_gives_the_losses_of_eager_training(synthetic: Path, tmp_path: Path) -> None:
    eager, compiled = (
        trained(config_of(synthetic, tmp_path / str(on), f"train.compile={on}")) for on in ("false", "true")
    )
    assert compiled == pytest.approx(eager, rel=1e-4)


# ---------------------------------------------------------------- speed


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval", "loader"])
def test_bench_measures_ours_and_the_plain_formulation(mode: str) -> None:
    small = ["--backbone", "efficientnet_lite0", "--size", 65, "--repeats", 1, "--images", 24, "--device", "cpu"]
    result = succeeded(process("scripts/bench.py", "--mode", mode, *small, "--episodes", 4, "--plain-episodes", 2))
    assert "ours: " in result.out and ("plain: " in result.out) == (mode != "loader")


# ---------------------------------------------------------------- on a GPU: python -m pytest -m gpu


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("tf32", 1e-2), ("bf16", 0.1), ("fp16", 0.1)])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_cuda_gives_the_losses_of_the_cpu(
    synthetic: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    expected = trained(config_of(synthetic, tmp_path / "cpu"), dropout=False)
    on_cuda = config_of(synthetic, tmp_path / "cuda", "device=cuda", f"precision={precision}")
    assert trained(on_cuda, dropout=False) == pytest.approx(expected, rel=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_evaluation_on_cuda_gives_the_counts_of_the_cpu(synthetic: Path, tmp_path: Path) -> None:
    counts = []
    for device in ("cpu", "cuda"):
        config = config_of(synthetic, tmp_path, f"device={device}")
        hardware, index = select_hardware(config), build_index(config, "val")
        sampler = build_eval_sampler(config, index, seed=0)
        torch.manual_seed(0)
        method = NetworkMethod(build_model(config)[0].to(hardware.device), config, hardware)
        counts.append(evaluate(method, index, [sampler(number) for number in range(12)], config=config)["network"])
    assert np.abs(counts[0] - counts[1]).sum() <= 1e-3 * counts[0].sum()
