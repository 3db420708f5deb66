"""Measure speed and memory, against a plain formulation of the network on the same weights and images.

    python scripts/bench.py --mode train [--backbone resnet50] [--batch 2] [--shots 1] [--precision fp32] [key=value]
    python scripts/bench.py --mode eval [--episodes 1000] [--images 450] [--shots 1] [--precision fp32]
    python scripts/bench.py --mode loader [--images 450]

train: a training step (forward, loss, backward, SGD) and the plain one in turn; peak memory of --repeats steps in a
    process of their own (on CUDA: of the allocator); largest differences of logits and loss, without dropout.
eval: util.engine.evaluation.evaluate on all episodes, against one episode after another. Only --plain-episodes of the
    latter are run, and their time is scaled; their pixel counts are compared.
loader: training images a second in one process, from JPEG and PNG files to batches.

The plain formulation is tests/plain.py, in fp32. Images of 500x375 pixels are drawn and weights are random, so nothing
is downloaded.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
import torch
from PIL import Image

from model import IGNORE
from model.ntrenet import NTRENet
from model.parallel import Dropout2d
from tests.plain import plain_counts, plain_forward
from util.config import Config, load_config, parse_arguments
from util.data.dataset import Episode
from util.data.episodes import EpisodeList
from util.data.synthetic import make_image
from util.data.transforms import normalize
from util.engine.build import (
    Hardware,
    build_eval_loader,
    build_eval_sampler,
    build_index,
    build_loss,
    build_model,
    build_optimizer,
    build_train_sampler,
    forward,
    select_hardware,
    training_batches,
)
from util.engine.evaluation import NetworkMethod, evaluate
from util.progress import progress

R = TypeVar("R")
ROOT = Path(__file__).resolve().parent.parent
SIZE = (500, 375)
TRAINING_IMAGES = 80  # enough for every base class to have some
NUMBERS = {"size": 473, "batch": 2, "shots": 1, "repeats": 5, "images": 450, "episodes": 1000, "plain-episodes": 20}


class Result(NamedTuple):
    """One measurement."""

    measured: str
    text: str
    """speed, and agreement with the plain formulation"""
    plain: float | None = None
    """median of the seconds"""
    ours: float | None = None
    memory: Sequence[float] = ()
    """peak memory of the plain formulation and of ours, MiB"""

    def __str__(self) -> str:
        lines = [self.measured, self.text]
        if self.ours:
            lines.append(f"ours: {self.ours:.3g} s")
        if self.plain and self.ours:
            lines.append(f"plain: {self.plain:.3g} s, {self.plain / self.ours:.2f} times as long")
        if self.memory:
            lines.append("peak memory: plain {:.0f} MiB, ours {:.0f} MiB".format(*self.memory))
        return "\n  ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", help="of ours; the plain one is fp32, or tf32 with it")
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default} by default")
    args, overrides = parse_arguments(parser)
    with tempfile.TemporaryDirectory() as folder:
        print(MODES[args.mode](args, overrides, Path(folder)))


# ---------------------------------------------------------------- train


def bench_train(args: argparse.Namespace, overrides: Sequence[str], root: Path) -> Result:
    config = make_config(args, overrides, root, TRAINING_IMAGES)
    hardware, batches = select_hardware(config), load_batches(config, 2)
    ours, plain = (build(config, hardware, batches[0], plain=plain) for plain in (False, True))
    agreement = compare_outputs(config, plain, ours, batches[0], hardware)
    steps = {"plain": step_of(config, plain, hardware, plain=True), "ours": step_of(config, ours, hardware)}
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for turn in progress(range(-1, args.repeats), desc="turns", leave=False):  # the first one warms up
        for name, step in steps.items():
            took, _ = timed(partial(step, batches[turn % 2]))
            times[name] += [took] if turn >= 0 else []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = [pool.apply(peak_of_steps, (config, args.repeats, plain)) for plain in (True, False)]
    compiled = ", compiled" if config.train.compile else ""
    seconds = statistics.median(times["ours"])
    return Result(
        f"training step, {args.batch} x {args.shots}-shot, {args.backbone}, {args.size} px, {args.precision}{compiled}",
        f"{args.batch / seconds:.3g} episodes/s; {agreement}",
        statistics.median(times["plain"]),
        seconds,
        memory,
    )


def load_batches(config: Config, count: int) -> list[Episode]:
    sampler = build_train_sampler(config, build_index(config, "train"))
    return list(training_batches(config, sampler, start=0, stop=count))


def build(config: Config, hardware: Hardware, batch: Episode, *, plain: bool) -> NTRENet:
    """Random weights, the same for both; the plain one has batch norm layers and channels first, as PFENet's code."""
    torch.manual_seed(0)
    model = build_model(config, "random", fuse=not plain)[0].to(hardware.device)
    model.measure_scale(normalize(batch.query.to(hardware.device)))
    return model.to(memory_format=torch.contiguous_format) if plain else model  # type: ignore[call-overload]


def step_of(config: Config, model: NTRENet, hardware: Hardware, *, plain: bool = False) -> Callable[[Episode], None]:
    """Return the step of util.engine.training.train_epoch."""
    network: Callable[..., Any] = partial(plain_forward, model) if plain else model
    if plain:
        hardware = Hardware(hardware.device, torch.float32)
    elif config.train.compile:
        network = torch.compile(model, dynamic=False, options={"fallback_random": True})
    loss, optimizer = build_loss(config).to(hardware.device), build_optimizer(config, model.train())

    def step(batch: Episode) -> None:
        episodes = batch.to(hardware.device)
        output = forward(network, episodes, hardware)
        masks = episodes.query_mask, episodes.support_masks
        loss(output, *masks, episodes.class_id, episodes.query_classes)["total"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def compare_outputs(config: Config, plain: NTRENet, ours: NTRENet, batch: Episode, hardware: Hardware) -> str:
    """Describe the largest difference of the logits and that of the loss, in training mode without dropout."""
    for part in itertools.chain(plain.train().modules(), ours.train().modules()):
        if isinstance(part, Dropout2d):
            part.eval()
    episodes, fp32 = batch.to(hardware.device), Hardware(hardware.device, torch.float32)
    outputs = forward(partial(plain_forward, plain), episodes, fp32), forward(ours, episodes, hardware)
    labels = episodes.query_mask, episodes.support_masks, episodes.class_id, episodes.query_classes
    losses = [float(build_loss(config).to(hardware.device)(output, *labels)["total"]) for output in outputs]
    expected, logits = (output.logits.float() for output in outputs)
    return (
        f"logits differ by {float((logits - expected).abs().max()):.1e} of {float(expected.abs().max()):.1f},"
        f" loss by {abs(losses[1] - losses[0]):.1e} of {losses[0]:.3f}"
    )


def peak_of_steps(config: Config, count: int, plain: bool) -> float:
    """Run ``count`` steps on different batches, in a process of their own: its peak memory in MiB, nan if unknown."""
    hardware, batches = select_hardware(config), load_batches(config, count)
    step = step_of(config, build(config, hardware, batches[0], plain=plain), hardware, plain=plain)
    for batch in batches:
        step(batch)
    if hardware.device.type == "cuda":
        return torch.cuda.max_memory_allocated(hardware.device) / 2**20
    status = Path("/proc/self/status")  # not getrusage, whose maximum includes the parent's
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10 if status.exists() else float("nan")


# ---------------------------------------------------------------- eval


def bench_eval(args: argparse.Namespace, overrides: Sequence[str], root: Path) -> Result:
    config = make_config(args, overrides, root, args.images)
    hardware, index = select_hardware(config), build_index(config, "val")
    sampler = build_eval_sampler(config, index, 0)
    episodes = [sampler(number) for number in range(args.episodes)]
    chosen = np.linspace(0, len(episodes) - 1, min(args.plain_episodes, len(episodes))).astype(int).tolist()
    one_by_one = config.model_copy(update={"eval": config.eval.model_copy(update={"batch_size": 1})})
    batches = iter(build_eval_loader(one_by_one, EpisodeList(index, episodes), [0, *chosen]))
    first = next(batches)
    ours, plain = (build(config, hardware, first, plain=plain).eval() for plain in (False, True))
    with torch.no_grad():  # random weights predict nothing or everything, on which any two would agree
        shift = forward(ours, first.to(hardware.device), hardware).fem.logits.float().quantile(0.65)
        for model in (ours, plain):
            model.get_parameter("fem.classifier.3.bias").sub_(shift)

    def plain_episode(number: int) -> np.ndarray:
        item = index.items[episodes[number].query]
        return plain_counts(plain, next(batches).to(hardware.device), item.read(item.mask), config)

    plain_times, expected = zip(*(timed(partial(plain_episode, number)) for number in chosen), strict=True)
    with progress(total=len(episodes), desc="ours", unit="episode", leave=False) as bar:
        method = NetworkMethod(ours, config, hardware)
        seconds, counts = timed(partial(evaluate, method, index, episodes, config=config, bar=bar))
    differ = np.abs(counts["network"][chosen] - np.stack(expected)).sum() // 2
    return Result(
        f"evaluation, {args.episodes} episodes over {args.images} images, {args.shots}-shot,"
        f" {args.backbone}, {args.size} px, {args.precision}",
        f"{len(episodes) / seconds:.3g} episodes/s; {differ} of {np.stack(expected).sum()} pixels differ",
        len(episodes) * statistics.median(plain_times),
        seconds,
    )


def bench_loader(args: argparse.Namespace, overrides: Sequence[str], root: Path) -> Result:
    config = make_config(args, [*overrides, "workers=0"], root, TRAINING_IMAGES)
    sampler = build_train_sampler(config, build_index(config, "train"))
    steps = -(-args.images // (args.batch * (1 + args.shots)))
    batches = training_batches(config, sampler, start=0, stop=steps + 1)
    next(batches)
    seconds, images = timed(lambda: sum(batch.pixels.shape[:2].numel() for batch in batches))
    measured = f"loading {images} images of {SIZE[0]}x{SIZE[1]} to {args.size} px in one process"
    return Result(measured, f"{images / seconds:.0f} images/s", None, seconds)


# ---------------------------------------------------------------- shared by the modes


def make_config(args: argparse.Namespace, overrides: Sequence[str], root: Path, images: int) -> Config:
    """Draw a data set of so many images, and return a PASCAL config for it."""
    for number in range(images):
        draw(root, number, novel=args.mode == "eval")
    list_path = root / "list.txt"
    list_path.write_text("".join(f"{n:06d}.jpg {n:06d}.png\n" for n in range(images)), encoding="utf-8")
    data = {"root": root, "train_list": list_path, "val_list": list_path, "min_area": 1}
    data |= {"shots": args.shots, "image_size": args.size}
    others = {"model.backbone": args.backbone, "train.batch_size": args.batch, "device": args.device}
    others |= {"precision": args.precision, "workers": 0 if args.mode == "train" else 1}
    given = [f"data.{key}={value}" for key, value in data.items()] + [f"{key}={value}" for key, value in others.items()]
    return load_config(ROOT / "configs/pascal/resnet50_fold0_1shot.yaml", [*given, *overrides])


def draw(root: Path, number: int, *, novel: bool) -> None:
    """Draw a JPEG and its mask; ``novel``: every object is of classes 1 to 5, which fold 0 evaluates."""
    image, ids = make_image(0, "train", number)
    if novel:
        ids = np.where((ids == 0) | (ids == IGNORE), ids, 1 + ids % 5).astype(np.uint8)
    large = np.asarray(Image.fromarray(image).resize(SIZE, Image.Resampling.BICUBIC)).astype(np.int16)
    grain = np.random.default_rng(number).normal(0, 9, large.shape)  # photographs have it, and decode slower for it
    Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(root / f"{number:06d}.jpg", quality=94)
    Image.fromarray(ids).resize(SIZE, Image.Resampling.NEAREST).save(root / f"{number:06d}.png")


def timed(function: Callable[[], R]) -> tuple[float, R]:
    """Call a function: seconds until the GPU, if one is used, has finished, and what it returned."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    synchronize()
    started = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - started, result


MODES = {"train": bench_train, "eval": bench_eval, "loader": bench_loader}


if __name__ == "__main__":
    run_command(main)
