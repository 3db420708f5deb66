"""What a GPU would wait for, found without one: see tests/pretend_cuda.py."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.pretend_cuda import CPU, CUDA, MixedDevicesError, PretendCuda
from util.config import Config, load_config
from util.data.dataset import Episode
from util.data.loading import batches_of
from util.engine.build import Hardware, build_index, build_train_loader, build_train_sampler
from util.engine.loops import train
from util.engine.monitor import monitored
from util.engine.run_state import Training, start_or_resume

ROOT = Path(__file__).resolve().parent.parent
ABLATIONS = sorted(p.stem for p in (ROOT / "configs/ablation").glob("*.yaml") if not p.stem.startswith("channels_"))
STEPS = 3


def small(root: Path, run: Path, ablation: str | None, *overrides: str) -> Config:
    files = [ROOT / "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml"]
    files += [ROOT / f"configs/ablation/{ablation}.yaml"] if ablation else []
    data = [f"data.root={root}", f"data.train_list={root}/lists/train.txt", f"data.val_list={root}/lists/val.txt"]
    sizes = ["data.image_size=65", "data.min_area=64", "model.channels=32", "model.prototype_channels=32"]
    rest = ["model.fem_scales=[1,0.5]", "loss.bank_size=8", "loss.pcl_drawn=0", "train.batch_size=2", "workers=0"]
    return load_config(files, [*data, *sizes, *rest, f"run_dir={run}", *overrides])


def trained(config: Config, hardware: Hardware, cuda: PretendCuda | None = None) -> Training:
    """A training of a few steps, as train.py makes them; ``cuda`` counts from the second one on."""
    training = start_or_resume(config, hardware, {})
    sampler = build_train_sampler(config, build_index(config, "train"))
    loader = build_train_loader(config, sampler, start=0, stop=STEPS)

    def batches() -> Iterator[Episode]:
        for number, batch in enumerate(batches_of(loader)):
            if number == 1 and cuda is not None:
                cuda.waits.clear()
            yield batch

    with monitored(training, STEPS, STEPS) as monitor:
        train(training, batches(), lr_at=lambda _: 0.01, monitor=monitor)
    return training


@pytest.mark.parametrize(
    ("ablation", "overrides"),
    [*((name, ()) for name in [None, *ABLATIONS]), (None, ("data.shots=5",)), ("authors", ("loss.pcl_drawn=4",))],
)
def test_a_training_step_waits_once_and_late_and_computes_what_a_cpu_does(
    synthetic: Path, tmp_path: Path, ablation: str | None, overrides: Sequence[str]
) -> None:
    expected = trained(small(synthetic, tmp_path / "cpu", ablation, *overrides), Hardware(CPU, torch.float32))
    with PretendCuda() as cuda:
        config = small(synthetic, tmp_path / "cuda", ablation, *overrides)
        training = trained(config, Hardware(CUDA, torch.float32), cuda)
    assert [place for place in cuda.waits if "copied.synchronize()" not in place] == []
    assert cuda.waits.total() == 1  # for the last step, when the epoch is over
    assert cuda.late_waits.total() == STEPS - 1
    assert training.sums == pytest.approx(expected.sums, rel=1e-4)


def test_it_tells_devices_refuses_mixed_ones_and_counts_what_is_waited_for() -> None:
    with PretendCuda() as cuda:
        x, here = torch.ones(4, 3).to("cuda", non_blocking=True).requires_grad_(), torch.ones(4, 3)
        assert x.is_cuda and x[1:].T.device == CUDA and (x * 2).sum().is_cuda and not here.is_cuda
        (x * 2).sum().backward()
        assert x.grad is not None and x.grad.device == CUDA
        assert torch.zeros(3, device=x.device).is_cuda and not x.detach().to("cpu", non_blocking=True).is_cuda
        with pytest.raises(MixedDevicesError, match="add"):
            x + here
        assert not cuda.waits
        for count, wait in enumerate(
            (
                lambda: int(x.sum()),
                lambda: x.tolist(),
                lambda: x[x > 0],
                lambda: x[[0, 2]],
                lambda: x.detach().cpu(),
                lambda: here.to(x.device),
                lambda: bool((x > 0).all()),
                lambda: torch.tensor([1.0, 2.0], device=x.device),
                lambda: x.nonzero(),
            ),
            1,
        ):
            wait()
            assert cuda.waits.total() == count, (count, cuda.waits)
        done = torch.cuda.Event()
        done.record()
        for _ in range(100):
            x * 2
        done.synchronize()
        assert cuda.waits.total() == count and cuda.late_waits.total() == 1
        assert "tests/test_gpu_readiness.py" in next(iter(cuda.waits))
