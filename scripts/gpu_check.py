"""Check a machine with a GPU and measure it: writes one Markdown page. Type: bash scripts/gpu_check.sh

    python scripts/gpu_check.py [--out gpu_check.md] [--batch 8] [--small]

The page holds the CUDA tests; a training of the quick start on the GPU beside the same on the CPU and, where there are
several cards, on all of them; and how fast ResNet-50 at 473 px trains, evaluates and loads at each precision, with 1
and 5 shots, compiled or not, its peak memory, and its share of what a large matrix product reaches (random weights:
nothing is fetched).
--small is the same in a short form with small sizes; it also runs on a CPU, where its figures mean nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import argparse
import json
import os
import subprocess
import tempfile
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from util.engine.loops import evaluate

from scripts.bench import build, make_config, read_peak, reset_peak, step_of, timed, training_batches
from util.config import Config
from util.data.loading import batches_of
from util.engine.build import (
    PRECISION,
    build_eval_sampler,
    build_index,
    build_train_loader,
    build_train_sampler,
    select_hardware,
)
from util.engine.record import environment
from util.errors import UserError
from util.files import require_writable, write_text

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("TFLOP/s", "of a large matrix product's", "peak MiB")
CONFIG = "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml"


class Sizes(NamedTuple):
    """How much is run."""

    side: int
    """pixels of the network's square input where speed is measured"""
    batch: int
    repeats: int
    images: int
    """pictures that the training that is compared reads"""
    epochs: int
    overrides: list[str]
    """what that training changes in the config"""
    shots: tuple[int, ...]
    pictures: int
    """that speed is measured on"""


FULL = Sizes(473, 8, 10, 400, 2, ["eval.episodes=200"], (1, 5), 96)
SMALL = Sizes(65, 2, 1, 40, 1, ["eval.episodes=4", "data.image_size=65", "data.min_area=64"], (1,), 48)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.md"))
    parser.add_argument("--batch", type=int, help="episodes of a training step where speed is measured")
    parser.add_argument("--small", action="store_true", help="a short form; the only one without a GPU")
    args = parser.parse_args()
    require_writable(args.out, ".md")
    sizes = SMALL if args.small else FULL
    sizes = sizes._replace(batch=args.batch or sizes.batch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        raise UserError(
            "torch sees no CUDA device; install a CUDA build of torch, or add --small for a short form on the CPU"
        )
    with tempfile.TemporaryDirectory() as folder:
        parts = [
            machine(torch.device(device)),
            tests(),
            *same_training(Path(folder), sizes, device),
            *throughput(Path(folder), sizes, device),
        ]
    write_text(args.out, "\n\n".join(parts) + "\n")
    print(f"written: {args.out}")


def machine(device: torch.device) -> str:
    known = environment(device)
    cards = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] or ["none"]
    lines = [f"- {name}: {known[name]}" for name in ("platform", "python", "torch", "git_revision")]
    return "\n".join([f"# {known['device']}", "", f"- GPUs: {', '.join(cards)}", f"- cores: {os.cpu_count()}", *lines])


def tests() -> str:
    """Run what is marked gpu; without a GPU there is nothing to run."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "tests/test_losses.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return f"## Tests on CUDA\n\n`pytest -m gpu`: {done.stdout.strip().splitlines()[-1].strip('= ')}"


def same_training(root: Path, sizes: Sizes, device: str) -> list[str]:
    """Train the quick start on the CPU, on the device, and on all GPUs: losses and scores of the last evaluation."""
    count = ["--train", str(sizes.images), "--val", str(sizes.images)]
    subprocess.run([sys.executable, "scripts/make_synthetic.py", "--out", root / "data", *count], cwd=ROOT, check=True)
    rows = [one_training(root, sizes, name, []) for name in dict.fromkeys(("cpu", device))]
    if (cards := torch.cuda.device_count()) > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cards}"]
        rows.append(one_training(root, sizes, f"{cards} x cuda, NCCL", launcher))
    note = "Same episodes and initial weights, other dropout: losses agree to a few per cent, mIoU to a few points."
    return ["## One training on each", table(["", "loss of the last epoch", "mIoU", "seconds"], rows), note]


def one_training(root: Path, sizes: Sizes, name: str, launcher: list[str]) -> list[str]:
    run = Path(tempfile.mkdtemp(dir=root)) / "run"
    data = [f"data.root={root}/data", *(f"data.{s}_list={root}/data/lists/{s}.txt" for s in ("train", "val"))]
    where = [f"device={'cpu' if name == 'cpu' else 'cuda'}", "precision=fp32", f"run_dir={run}"]
    options = [*data, *where, f"train.epochs={sizes.epochs}", "eval.every=1", *sizes.overrides]
    print(f"training: {name}", flush=True)
    subprocess.run([sys.executable, *launcher, "train.py", "--config", CONFIG, *options], cwd=ROOT, check=True)
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    seconds = json.loads((run / "run.json").read_text(encoding="utf-8"))["finished"]["seconds"]
    return [name, f"{last['loss']['total']:.4f}", f"{100 * last['miou']:.1f}", f"{seconds:.0f}"]


def throughput(root: Path, sizes: Sizes, device: str) -> list[str]:
    """Measure training, evaluation and loading."""
    given = argparse.Namespace(
        mode="eval",
        backbone="resnet50",
        shots=1,
        size=sizes.side,
        batch=sizes.batch,
        device=device,
        precision="fp32",
    )
    (root / "pictures").mkdir()
    config = make_config(given, ["model.weights=random"], root / "pictures", images=sizes.pictures)
    rows = []
    for shots in sizes.shots:
        precisions = tuple(PRECISION) if device == "cuda" else ("fp32",)
        for name, compiled in [*((name, "off") for name in precisions), ("auto", "on")]:
            data = config.data.model_copy(update={"shots": shots})
            options = config.train.model_copy(update={"compile": compiled})
            chosen = config.model_copy(update={"data": data, "precision": name, "train": options})
            try:
                speeds = [*training_speed(chosen, sizes), evaluation_speed(chosen, sizes)]
            except torch.OutOfMemoryError:
                speeds = ["out of memory", *[""] * 4]
            rows.append([str(shots), name, compiled, *speeds])
    return [
        f"## ResNet-50, {sizes.side} px, {sizes.batch} episodes a step",
        table(["shots", "precision", "compiled", "training, episodes/s", *MEASURED, "evaluation, episodes/s"], rows),
        f"Loader: {loading_speed(config, sizes)}",
    ]


def training_speed(config: Config, sizes: Sizes) -> list[str]:
    """Episodes a second, TFLOP/s, their share of what a large matrix product of that precision reaches, peak memory."""
    hardware = select_hardware(config)
    model, batches = build(config, hardware, plain=False), training_batches(config, count=2)
    eager = config.model_copy(update={"train": config.train.model_copy(update={"compile": "off"})})
    with FlopCounterMode(display=False) as counter:
        step_of(eager, model, hardware)(batches[0])
    step = step_of(config, model, hardware)
    step(batches[0])
    reset_peak(hardware.device)
    step(batches[1])
    seconds, _ = timed(lambda: [step(batches[n % 2]) for n in range(sizes.repeats)], hardware.device)
    reached = counter.get_total_flops() * sizes.repeats / seconds
    side = 8192 if hardware.device.type == "cuda" else 512
    square = torch.randn(side, side, device=hardware.device, dtype=hardware.precision)
    square @ square
    product, _ = timed(lambda: [square @ square for _ in range(sizes.repeats)], hardware.device)
    share = reached / (2 * side**3 * sizes.repeats / product)
    speed = sizes.batch * sizes.repeats / seconds
    return [f"{speed:.2f}", f"{reached / 1e12:.2f}", f"{share:.0%}", f"{read_peak(hardware.device):.0f}"]


def evaluation_speed(config: Config, sizes: Sizes) -> str:
    hardware, index = select_hardware(config), build_index(config, "val")
    sampler = build_eval_sampler(config, index, seed=0)
    episodes = [sampler(number) for number in range(10 * sizes.repeats)]
    model = build(config, hardware, plain=False)
    run = partial(evaluate, model, index, episodes, config=config, hardware=hardware)
    run()
    seconds, _ = timed(run, hardware.device)
    return f"{len(episodes) / seconds:.2f}"


def loading_speed(config: Config, sizes: Sizes) -> str:
    """Images a second of the loader alone, with as many workers as there are cores, up to eight."""
    workers = min(os.cpu_count() or 1, 8)
    config = config.model_copy(update={"workers": workers})
    sampler = build_train_sampler(config, build_index(config, "train"))
    batches = batches_of(build_train_loader(config, sampler, start=0, stop=4 * sizes.repeats + 1))
    next(batches)
    seconds, count = timed(lambda: sum(2 * len(batch.names) for batch in batches))
    return f"{count / seconds:.0f} images a second with {workers} workers, {count / seconds / workers:.0f} a worker"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_command(main)
