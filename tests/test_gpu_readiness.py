"""What a GPU would wait for, found without one: see tests/pretend_cuda.py."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from util.engine.compilation import compile_where_it_pays
from util.engine.loops import BASELINES, NETWORK, Frozen, encoding_size, evaluate, train
from util.engine.monitor import monitored
from util.engine.rounds import plan_rounds
from util.engine.run_state import Training, start_or_resume
from util.segment.segmenter import NTRESegmenter

from model.backbone import Backbone
from model.prior import prior_mask
from model.weights import WeightsInfo
from scripts.memory import Alive, step_memory
from tests.pretend_cuda import CPU, CUDA, MixedDevicesError, PretendCuda
from tests.scenes import scene, write_checkpoint
from util.config import Config, load_config
from util.data.dataset import Episode
from util.data.loading import batches_of
from util.data.transforms import normalize
from util.engine import build, compilation, loops
from util.engine.build import (
    Hardware,
    build_eval_sampler,
    build_index,
    build_model,
    build_train_loader,
    build_train_sampler,
    find_hardware,
)
from util.errors import UserError
from util.progress import progress

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
    compile_where_it_pays(training, STEPS)
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
    [
        (None, ("data.shots=5",)),
        ("authors", ("loss.pcl_drawn=4",)),
        ("base_learner", ()),
        *(pytest.param(name, (), marks=pytest.mark.slow) for name in [None, *ABLATIONS] if name != "base_learner"),
    ],
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


def evaluated(
    config: Config, hardware: Hardware, kept: dict[int, Frozen] | None = None, cuda: PretendCuda | None = None
) -> tuple[dict[str, np.ndarray], int]:
    """Counts of 12 episodes, with the baselines, and the number of rounds in which they ran."""
    torch.manual_seed(0)
    model = build_model(config)[0].to(hardware.device)
    index = build_index(config, "val")
    sampler = build_eval_sampler(config, index, seed=0)
    episodes = [sampler(number) for number in range(12)]
    rounds = plan_rounds(episodes, index, encoding_size(model, config, hardware), config.eval.cache_gib * 2**30)
    normalize(torch.zeros(1, 3, 8, 8, device=hardware.device))  # copies its constants there, once
    if cuda is not None:
        cuda.waits.clear()
    with progress(total=len(episodes), disable=True) as bar:
        counts = evaluate(
            model,
            index,
            episodes,
            config=config,
            hardware=hardware,
            predictors=NETWORK | BASELINES,
            bar=bar,
            kept=kept,
        )
    return counts, len(rounds)


@pytest.mark.parametrize(
    ("ablation", "shots"),
    [
        (None, 1),
        ("base_learner", 5),
        *(
            pytest.param(name, shots, marks=pytest.mark.slow)
            for name, shots in ((None, 5), ("base_learner", 1), *itertools.product(("pfenet", "per_scale"), (1, 5)))
        ),
    ],
)
def test_an_evaluation_waits_once_a_round_and_counts_what_a_cpu_does(
    synthetic: Path, tmp_path: Path, ablation: str | None, shots: int
) -> None:
    images = f"data.val_list={synthetic}/lists/train.txt"  # the other list has too few for five shots
    config = small(synthetic, tmp_path, ablation, images, f"data.shots={shots}", "eval.batch_size=3")
    expected, _ = evaluated(config, Hardware(CPU, torch.float32))
    with PretendCuda() as cuda:
        counts, rounds = evaluated(config, Hardware(CUDA, torch.float32), cuda=cuda)
    assert cuda.waits.total() <= rounds + len(counts), cuda.waits  # and once a predictor at the end
    for name, table in expected.items():
        assert np.abs(counts[name] - table).sum() <= 1e-3 * table.sum()


def test_what_the_backbone_gives_is_kept_from_one_evaluation_to_the_next(
    synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, hardware = small(synthetic, tmp_path, None, "eval.batch_size=3"), Hardware(CPU, torch.float32)
    expected, _ = evaluated(config, hardware)
    kept: dict[int, Frozen] = {}
    first, _ = evaluated(config, hardware, kept)
    loaded: list[int] = []
    run = loops.run_backbone
    monkeypatch.setattr(loops, "run_backbone", lambda model, batch, *rest: loaded.append(0) or run(model, batch, *rest))
    second, _ = evaluated(config, hardware, kept)
    assert kept and not loaded
    held = sum(frozen.bytes for frozen in kept.values())
    few: dict[int, Frozen] = {}
    gib = (held / 2 + 2e5) / 2**30  # some, beside the largest round
    third, _ = evaluated(small(synthetic, tmp_path, None, "eval.batch_size=3", f"eval.cache_gib={gib}"), hardware, few)
    assert 0 < len(few) < len(kept) and sum(frozen.bytes for frozen in few.values()) < gib * 2**30
    for name, table in expected.items():
        assert all((table == other[name]).all() for other in (first, second, third))


def test_a_prediction_is_read_from_the_device_at_once(tmp_path: Path) -> None:
    picture, mask = scene(0)
    query, _ = scene(1)
    path = write_checkpoint(tmp_path / "best.pt")
    segmenter = NTRESegmenter.from_checkpoint(path, "cpu", "fp32")
    expected = segmenter.segment(picture, mask, query)
    with PretendCuda() as cuda:
        segmenter.model.to(CUDA)
        segmenter.hardware = Hardware(CUDA, torch.float32)
        normalize(torch.zeros(1, 3, 8, 8, device=CUDA))  # copies its constants there, once
        cuda.waits.clear()
        target = segmenter.encode(picture, mask)
        assert cuda.waits.total() == 1  # whether the target is seen at all
        found = segmenter.segment_encoded(target, query)
        assert cuda.waits.total() == 2
        with pytest.raises(UserError, match="vanishes"):
            segmenter.encode(np.zeros((4000, 4000, 3), np.uint8), np.eye(4000, dtype=bool) & (np.arange(4000) == 9))
    for name in ("probability", "prior", "bg", "distractor"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-4)


@pytest.fixture
def flags() -> Iterator[None]:
    """What a device's choice sets, as it was again afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def test_float32_is_rounded_to_tf32_only_by_name(flags: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="precision=tf32 needs CUDA"):
        find_hardware("cpu", "tf32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for precision, rounded in (("tf32", True), ("fp32", False), ("bf16", False)):
        hardware = find_hardware("auto", precision)
        assert hardware.device.type == "cuda" and torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == rounded
        assert (hardware.precision == torch.float32) == (precision != "bf16")


@pytest.mark.slow
def test_the_check_of_a_machine_writes_its_page(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/gpu_check.py", "--small", "--out", str(tmp_path / "page.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "page.md").read_text()
    for part in ("## Tests on CUDA", "## One training on each", "## ResNet-50, 65 px", "images a second"):
        assert part in page
    for start in ("| 1 | fp32 | off |", "| 1 | auto | on |"):
        (row,) = [line for line in page.splitlines() if line.startswith(start)]
        numbers = [float(cell.strip().rstrip("%")) for cell in row.split("|")[4:-1]]
        assert len(numbers) == 5 and all(number >= 0 for number in numbers) and numbers[0] > 0


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_memory_is_counted_as_a_step_uses_it(synthetic: Path, tmp_path: Path, backbone: str) -> None:
    config = small(synthetic, tmp_path, None, f"model.backbone={backbone}", "data.shots=5", "precision=fp32")
    assert step_memory(config) == pytest.approx(step_memory(config, empty=False), rel=1e-3)


def test_a_prior_copies_one_episode_at_a_time() -> None:
    """In float32, beside its similarities: copies of all episodes together would be most of a 5-shot step's memory."""
    episodes, shots, positions, channels = 32, 5, 144, 64
    with Alive() as alive:
        query = torch.randn(episodes, channels, 12, 12, dtype=torch.bfloat16)
        support = torch.randn(episodes, shots, positions, channels, dtype=torch.bfloat16)
        prior = prior_mask(query, support)
    copy, similarity = 4 * shots * positions * channels, 4 * shots * positions * positions
    assert alive.bytes == query.nbytes + support.nbytes + prior.nbytes
    assert alive.most - alive.bytes < 3 * copy + 2 * similarity < episodes * copy / 4


# ---------------------------------------------------------------- compiled


class Graphs(list[GraphModule]):
    """In place of the compiler: keeps what it is given, which then runs as it is."""

    def __call__(self, graph: GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.append(graph)
        return graph.forward


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone of five convolutions, lest tracing it take most of the time; torch compiles each test's step anew."""
    torch._dynamo.reset()  # after eight graphs of one function it would give up

    def build_backbone(*_: object, **__: object) -> tuple[Backbone, WeightsInfo]:
        sizes = ((3, 8, 2), (8, 8, 2), (8, 8, 2), (8, 16, 1), (16, 16, 1))
        stages = [nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.ReLU()) for a, b, stride in sizes]
        return Backbone(stages=stages, middle_channels=24), WeightsInfo("random", "standard", "")

    monkeypatch.setattr(build, "build_backbone", build_backbone)


@pytest.mark.parametrize(
    ("ablation", "precision", "shots"),
    [
        (None, torch.float32, 1),
        pytest.param(None, torch.bfloat16, 5, marks=pytest.mark.slow),
        *(pytest.param(name, torch.float32, shots, marks=pytest.mark.slow) for name in ABLATIONS for shots in (1, 5)),
    ],
)
def test_a_step_is_two_graphs_whatever_the_masks_and_trains_as_without(
    synthetic: Path,
    tmp_path: Path,
    shallow: None,
    monkeypatch: pytest.MonkeyPatch,
    ablation: str | None,
    precision: torch.dtype,
    shots: int,
) -> None:
    """What a compiler and a CUDA graph need: nothing is left to Python, and no shape depends on a mask."""
    hardware, graphs = Hardware(CPU, precision), Graphs()
    monkeypatch.setattr(compilation, "compiled", partial(torch.compile, dynamic=False, backend=graphs))
    given = synthetic, tmp_path / "run", ablation, f"data.shots={shots}"
    expected, training = (trained(small(*given, f"train.compile={on}"), hardware) for on in ("off", "on"))
    assert len(graphs) == 2  # the network and the loss, once for all steps
    assert training.sums == pytest.approx(expected.sums, rel=1e-4 if precision == torch.float32 else 1e-2)
    states = [t.model.state_dict() | t.criterion.state_dict() for t in (training, expected)]
    assert states[0].keys() == states[1].keys()
    if precision == torch.float32:
        assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[1])


def no_compiler(*_: object, **__: object) -> None:
    raise RuntimeError("inductor raised:\nno C++ compiler found")


def test_training_goes_on_where_torch_cannot_compile(
    synthetic: Path,
    tmp_path: Path,
    shallow: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compilation, "compiled", no_compiler)
    given = synthetic, tmp_path / "run", "pfenet"
    expected, training = (
        trained(small(*given, f"train.compile={on}"), Hardware(CPU, torch.float32)) for on in ("off", "on")
    )
    assert training.sums == pytest.approx(expected.sums, rel=1e-4)
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert "torch cannot compile here (" in note and " compiler found" in note


@pytest.mark.slow
@pytest.mark.parametrize("ablation", [None, "authors"])
def test_what_inductor_makes_trains_as_without(
    synthetic: Path, tmp_path: Path, shallow: None, capsys: pytest.CaptureFixture[str], ablation: str | None
) -> None:
    expected, training = (
        trained(small(synthetic, tmp_path / "run", ablation, f"train.compile={on}"), Hardware(CPU, torch.float32))
        for on in ("off", "on")
    )
    assert "note:" not in capsys.readouterr().err
    assert training.sums == pytest.approx(expected.sums, rel=1e-4)
    state = training.model.state_dict()
    assert all(torch.allclose(state[name], value, atol=1e-5) for name, value in expected.model.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "device", "steps", "pays"),
    [("auto", CPU, 10**6, False), ("auto", CUDA, 10**6, True), ("auto", CUDA, 584, False), ("off", CUDA, 10**6, False)],
)
def test_auto_compiles_long_runs_on_cuda(
    synthetic: Path,
    tmp_path: Path,
    shallow: None,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    device: torch.device,
    steps: int,
    pays: bool,
) -> None:
    monkeypatch.setattr(compilation, "compiled", lambda part: partial(part))
    with PretendCuda():
        config = small(synthetic, tmp_path, "pfenet", f"train.compile={asked}")
        training = start_or_resume(config, Hardware(device, torch.float32), {})
        compile_where_it_pays(training, steps)
    assert (training.network is not training.model) == (training.loss is not training.criterion) == pays
