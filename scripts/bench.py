"""Measure ours against a plain formulation, in one process, in turn, with a statement that both give the same.

    python scripts/bench.py --mode train  [--backbone resnet50] [--batch 2] [--shots 1] [--precision fp32]
    python scripts/bench.py --mode eval   [--episodes 1000] [--seeds 1] [--images 450] [--shots 1] [--precision fp32]
    python scripts/bench.py --mode loader [--images 64]
    python scripts/bench.py --mode index  [--masks 12000]

train: a step (forward, losses, backward, SGD) on the same batches from the same weights; peak memory of a process that
    runs nothing else; the largest difference of the logits and of the losses, dropout off.
eval: util.engine.loops.evaluate on all episodes against one episode after another, of which --plain-episodes are run
    and their time scaled up; their counts are compared.
loader: training images a second in one process, from JPEG and PNG to the network's input, against a resampling for
    each of scale, rotation, flip and crop and a float picture; how far the pictures differ.
index: the class index of a list of masks, built anew (cold) and from its cache (warm), against a plain loop.

The plain formulation is tests/plain.py, in fp32. Pictures are generated at 500x375. --json OUT keeps everything.
"""

import argparse
import ctypes
import gc
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
import torch
from PIL import Image
from util.engine.compilation import compiled
from util.engine.loops import evaluate, forward, loss_terms
from util.engine.memory import return_freed_memory

from model import IGNORE
from model.ntrenet import NTRENet
from tests.plain import plain_augment, plain_counts, plain_forward
from util.config import Config, load_config, parse_arguments
from util.data.class_index import ClassIndex, load_class_index, read_list
from util.data.dataset import Episode, read_pair
from util.data.episodes import EpisodeFiles, EpisodeList
from util.data.folds import novel_classes
from util.data.synthetic import CLASS_NAMES, make_image
from util.data.transforms import augment, normalize
from util.engine.build import (
    Hardware,
    build_eval_loader,
    build_eval_sampler,
    build_index,
    build_loss,
    build_model,
    build_optimizer,
    build_train_loader,
    build_train_sampler,
    select_hardware,
)
from util.engine.metrics import scores
from util.engine.record import environment
from util.errors import UserError
from util.files import require_writable, write_json
from util.progress import progress

R = TypeVar("R")
ROOT = Path(__file__).resolve().parent.parent
SIZE = (500, 375)
CPU = torch.device("cpu")
TRAINING_IMAGES = 80
MEMORY_STEPS = 8
"""each on a batch of its own: what is kept of every size that occurs counts"""
NUMBERS = {
    **{"batch": 2, "shots": 1, "repeats": 5, "images": 450, "episodes": 1000, "seeds": 1, "plain-episodes": 20},
    "masks": 12000,
}
"""options and their defaults"""
DIFFERENT_MASKS = 40
"""masks of --mode index that are drawn; the others are links to them"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=list(MODES), required=True)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=473, help="side of the network's input")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", help="of ours; the plain formulation is fp32")
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args, overrides = parse_arguments(parser)
    if min(getattr(args, name.replace("-", "_")) for name in NUMBERS) < 1:
        raise UserError("numbers must be at least 1")
    if args.json is not None:
        require_writable(args.json, ".json")
    with tempfile.TemporaryDirectory() as folder:
        result = MODES[args.mode](args, overrides, Path(folder))
    if args.json is not None:
        device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
        write_json(args.json, {"arguments": sys.argv[1:], **result, "environment": environment(device)})


# ---------------------------------------------------------------- train


def bench_train(args: argparse.Namespace, overrides: Sequence[str], root: Path) -> dict[str, Any]:
    config = make_config(args, overrides, root, images=TRAINING_IMAGES)
    hardware, plain_hardware = select_hardware(config), Hardware(select_hardware(config).device, torch.float32)
    batches = training_batches(config, count=2)
    return_freed_memory()
    ours, plain = (build(config, hardware, plain=name == "plain") for name in ("ours", "plain"))
    equality = compare_outputs(config, plain, ours, batches[0], hardware)

    steps = {"plain": step_of(config, plain, plain_hardware, plain=True), "ours": step_of(config, ours, hardware)}
    runs = {name: lambda turn, step=step: step(batches[turn % 2]) for name, step in steps.items()}
    times, _ = race(runs, args.repeats, hardware.device)
    memory = {name: peak_of_a_process(args, list(overrides), name) for name in steps}
    result = {"mode": "train", **ratio(times), **equality, "peak_memory_mib": memory}
    print(
        f"training step of {args.batch} episodes, {args.shots}-shot, {args.backbone}, {args.size} px:"
        f"\n  plain, fp32      {describe(times['plain'])}, peak {memory['plain']:.0f} MiB"
        f"\n  ours, {args.precision:<10} {describe(times['ours'])}, peak {memory['ours']:.0f} MiB"
        f"\n  {result['ratio']:.2f} times faster, {memory['ours'] / memory['plain']:.0%} of the memory;"
        f" largest difference of the logits {equality['logits_difference']:.1e} (of {equality['logits_scale']:.1f}),"
        f" of the loss {equality['loss_difference']:.1e} (of {equality['loss']:.3f})"
    )
    return result


def build(config: Config, hardware: Hardware, *, plain: bool) -> NTRENet:
    """Random weights, the same for both; plain as in PFENet's code: batch norm on its own, channels first."""
    torch.manual_seed(0)
    model = build_model(config, "random", fold=not plain)[0].to(hardware.device)
    return model.to(memory_format=torch.contiguous_format) if plain else model  # type: ignore[call-overload]


def training_batches(config: Config, count: int) -> list[Episode]:
    loader = build_train_loader(config, build_train_sampler(config, build_index(config, "train")), start=0, stop=count)
    return list(loader)


def step_of(config: Config, model: NTRENet, hardware: Hardware, *, plain: bool = False) -> Callable[[Episode], None]:
    model.train()
    criterion, optimizer = build_loss(config).to(hardware.device), build_optimizer(config, model)
    on = config.train.compile == "on" and not plain
    network, losses = (compiled(part) if on else part for part in (model, criterion))

    def step(batch: Episode) -> None:
        batch = batch.to(hardware.device)
        output = plain_on(model, batch) if plain else forward(network, batch, hardware)
        loss = loss_terms(losses, output, batch)["total"]
        if plain:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not plain:
            optimizer.zero_grad()

    return step


def plain_on(model: NTRENet, batch: Episode) -> Any:
    return plain_forward(model, normalize(batch.query), normalize(batch.supports), batch.support_masks)


@torch.no_grad()
def compare_outputs(
    config: Config, plain: NTRENet, ours: NTRENet, batch: Episode, hardware: Hardware
) -> dict[str, float]:
    """Largest difference of the logits and of the loss between ours and the plain formulation, dropout off."""
    batch = batch.to(hardware.device)
    outputs = plain_on(plain.eval(), batch), forward(ours.eval(), batch, hardware)
    labels = batch.query_mask, batch.support_masks, batch.class_id
    losses = [float(build_loss(config).to(hardware.device)(output, *labels)["total"]) for output in outputs]
    logits = [output.logits.float() for output in outputs]
    return {
        "logits_difference": float((logits[1] - logits[0]).abs().max()),
        "logits_scale": float(logits[0].abs().max()),
        "loss_difference": abs(losses[1] - losses[0]),
        "loss": losses[0],
    }


def peak_of_a_process(args: argparse.Namespace, overrides: list[str], name: str) -> float:
    """MiB at the peak of ``MEMORY_STEPS`` steps in a process of their own (on CUDA: of the allocator)."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (args, overrides, name))


def _peak(args: argparse.Namespace, overrides: list[str], name: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(args, overrides, Path(folder), images=TRAINING_IMAGES)
        hardware = select_hardware(config)
        if name == "plain":
            hardware = Hardware(hardware.device, torch.float32)
        else:
            return_freed_memory()
        batches = training_batches(config, count=MEMORY_STEPS)
        step = step_of(config, build(config, hardware, plain=name == "plain"), hardware, plain=name == "plain")
        reset_peak(hardware.device)
        for batch in batches:
            step(batch)
        return read_peak(hardware.device)


def reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def read_peak(device: torch.device) -> float:
    """Since :func:`reset_peak`, in MiB; nan where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform != "linux":
        return float("nan")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


# ---------------------------------------------------------------- eval


def bench_eval(args: argparse.Namespace, overrides: Sequence[str], root: Path) -> dict[str, Any]:
    config = make_config(args, overrides, root, images=args.images)
    hardware = select_hardware(config)
    index = build_index(config, "val")
    samplers = [build_eval_sampler(config, index, seed) for seed in range(args.seeds)]
    episodes = [sampler(number) for sampler in samplers for number in range(args.episodes)]
    ours, plain = (build(config, hardware, plain=name == "plain").eval() for name in ("ours", "plain"))
    centre_predictions([ours, plain], config, EpisodeList(index, episodes), hardware)

    return_freed_memory()
    chosen = np.linspace(0, len(episodes) - 1, min(args.plain_episodes, len(episodes))).astype(int).tolist()
    one_by_one = plain_evaluation(plain, config, hardware, EpisodeList(index, episodes), chosen)
    plain_results = list(itertools.islice(one_by_one, len(chosen) // 2))
    # half before ours and half after, lest the machine's mood count
    with progress(total=1, desc="ours") as bar:
        run_ours = partial(evaluate, ours, index, episodes, config=config, hardware=hardware, bar=bar)
        ours_seconds, tables = timed(run_ours, hardware.device)
    peak = read_peak(hardware.device)
    plain_times, plain_table = zip(*plain_results, *one_by_one, strict=True)
    agreement = compare_counts(config, episodes, chosen, tables["network"][chosen], np.stack(plain_table))

    plain_seconds = statistics.fmean(plain_times) * len(episodes)
    result = {
        **{"mode": "eval", "episodes": len(episodes), "plain_seconds": plain_seconds, "ours_seconds": ours_seconds},
        **{"plain_seconds_each": plain_times, "ratio": plain_seconds / ours_seconds, "peak_memory_mib": peak},
        **agreement,
    }
    print(
        f"{args.seeds} x {args.episodes} episodes over {args.images} images, {args.shots}-shot, {args.backbone},"
        f" {args.size} px, {hardware.device}:"
        f"\n  plain, fp32      {plain_seconds:.0f} s (from {len(chosen)} episodes of {describe(plain_times)})"
        f"\n  ours, {args.precision:<10} {ours_seconds:.0f} s: {result['ratio']:.2f} times faster; peak {peak:.0f} MiB"
        f"\n  on the {len(chosen)} episodes mIoU {result['miou']:.4f}, difference {result['miou_difference']:.1e};"
        f" {result['pixels_that_differ']} of {result['pixels']} pixels differ"
    )
    return result


def plain_evaluation(
    plain: NTRENet, config: Config, hardware: Hardware, source: EpisodeList, chosen: list[int]
) -> Iterator[tuple[float, np.ndarray]]:
    """Seconds and counts of one episode after another, its reading included."""
    alone = config.model_copy(update={"eval": config.eval.model_copy(update={"batch_size": 1})})
    batches = iter(build_eval_loader(alone, source, chosen))

    def one(episode: EpisodeFiles) -> np.ndarray:
        _, ground_truth = read_pair(source.index.items[episode.query], episode.class_id)
        return plain_counts(plain, next(batches).to(hardware.device), ground_truth, config)

    for number in chosen:
        yield timed(partial(one, source(number)), hardware.device)


def compare_counts(
    config: Config, episodes: Sequence[EpisodeFiles], chosen: list[int], found: np.ndarray, expected: np.ndarray
) -> dict[str, float]:
    """How far the counts (N, 4) of the chosen episodes, and the mIoU from them, differ."""
    names = {c: config.data.classes[c - 1] for c in novel_classes(config.data)}
    class_ids = np.array([episodes[number].class_id for number in chosen])
    miou = [scores(table, class_ids, names).miou for table in (found, expected)]
    return {
        "miou_difference": abs(miou[0] - miou[1]),
        "miou": miou[1],
        "pixels_that_differ": int(np.abs(found - expected)[:, :2].sum()),
        "pixels": int(expected.sum()),
    }


@torch.no_grad()
def centre_predictions(models: Sequence[NTRENet], config: Config, source: EpisodeList, hardware: Hardware) -> None:
    """Shift random weights' maps such that they say yes in some places: lest equality be that of empty predictions."""
    batch = next(iter(build_eval_loader(config, source, range(4)))).to(hardware.device)
    biases = {
        "bgmm.classifier.bias": lambda output: output.query_bg_logits,
        "eliminations.0.matching.initial.2.bias": lambda output: output.eliminated[0].initial_logits,
        "fem.classifier.3.bias": lambda output: output.fem.logits,
    }
    for name, logits in biases.items():
        shift = logits(forward(models[0], batch, hardware)).float().quantile(0.65)
        for model in models:
            model.get_parameter(name).sub_(shift)


# ---------------------------------------------------------------- loader


def bench_loader(args: argparse.Namespace, overrides: Sequence[str], root: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = make_config(args, [*overrides, "workers=0"], root, images=args.images)
    data, index = config.data, build_index(config, "train")

    def load(augmented: Callable[..., Any], _: int) -> list[tuple[np.ndarray, np.ndarray]]:
        made = []
        for number in range(args.images):
            image, mask = read_pair(index.items[number], largest_class(index, number))
            rng = np.random.default_rng(number)
            made.append(augmented(image, mask, data.image_size, rng, tuple(data.scale), data.rotation))
        return made

    def channels_first(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        image, mask = augment(*arguments)
        return image.transpose(2, 0, 1).copy(), mask

    whole, made = race({"plain": partial(load, plain_augment), "ours": partial(load, channels_first)}, args.repeats)
    times = {name: [seconds / args.images for seconds in of] for name, of in whole.items()}
    agree = statistics.fmean(float((a[1] == b[1]).mean()) for a, b in zip(made["plain"], made["ours"], strict=True))
    result: dict[str, Any] = {"mode": "loader", **ratio(times), "mask_agreement": agree}
    print(
        f"one process, JPEGs at {SIZE[0]}x{SIZE[1]} to {args.size} px:"
        f"\n  plain {1 / result['plain_seconds']:.0f} images a second, ours {1 / result['ours_seconds']:.0f}:"
        f" {result['ratio']:.2f} times faster"
        f"\n  the same draws, up to where resampling rounds: masks agree in {agree:.2%} of pixels"
    )
    return result


def largest_class(index: ClassIndex, place: int) -> int:
    """The class with the most pixels in a line's mask."""
    areas = index.areas(place)
    return max((c for c in areas if c), key=lambda c: areas[c])


# ---------------------------------------------------------------- index


def bench_index(args: argparse.Namespace, overrides: Sequence[str], root: Path) -> dict[str, Any]:
    if args.masks < DIFFERENT_MASKS:
        raise UserError(f"--masks must be at least {DIFFERENT_MASKS}")
    list_path = draw_masks(root, args.masks)
    num_classes = len(CLASS_NAMES)
    cache = list_path.with_name(list_path.name + ".index.npz")

    def plain(_: int) -> np.ndarray:
        masks = (np.asarray(Image.open(item.mask)) for item in read_list(list_path, root))
        return np.stack([np.bincount(mask.ravel(), minlength=256) for mask in masks])[:, : num_classes + 1]

    def warm(_: int) -> ClassIndex:
        return load_class_index(list_path, root, num_classes, progress=False)

    def cold(turn: int) -> ClassIndex:
        cache.unlink(missing_ok=True)
        return warm(turn)

    runs: dict[str, Callable[[int], Any]] = {"plain": plain, "cold": cold, "warm": warm}
    times, found = race(runs, min(args.repeats, 3))
    equal = all(bool((found[name].pixels.toarray() == found["plain"]).all()) for name in ("cold", "warm"))
    result = {"mode": "index", "masks": args.masks, **ratio(times, "cold"), "equal": equal}
    print(
        f"class index of {args.masks} masks of {SIZE[0]}x{SIZE[1]}: plain loop {result['plain_seconds']:.2f} s,"
        f" ours cold {result['cold_seconds']:.2f} s ({result['ratio']:.2f} times faster),"
        f" warm {result['warm_seconds']:.2f} s; counts equal: {equal}"
    )
    return result


def draw_masks(root: Path, masks: int) -> Path:
    """Draw a list of ``masks`` lines below ``root``; files beyond the first are links."""
    for number in range(masks):
        if number < DIFFERENT_MASKS:
            draw(root, number)
        else:
            for suffix in ("jpg", "png"):
                os.link(root / f"{number % DIFFERENT_MASKS:06d}.{suffix}", root / f"{number:06d}.{suffix}")
    return write_list(root, masks)


# ---------------------------------------------------------------- what the modes share


def make_config(args: argparse.Namespace, overrides: Sequence[str], root: Path, images: int) -> Config:
    """Draw a data set of ``images`` images, and make a PASCAL config for it."""
    for number in range(images):
        draw(root, number, novel=args.mode == "eval")
    list_path = write_list(root, images)
    given = {
        "data.root": root,
        "data.train_list": list_path,
        "data.val_list": list_path,
        "data.min_area": 1,
        "data.shots": args.shots,
        "data.image_size": args.size,
        "model.backbone": args.backbone,
        "train.batch_size": args.batch,
        "device": args.device,
        "precision": args.precision,
        "workers": 0 if args.mode == "train" else 1,
    }
    config_file = ROOT / "configs/pascal/resnet50_fold0_1shot.yaml"
    return load_config(config_file, [*(f"{key}={value}" for key, value in given.items()), *overrides])


def write_list(root: Path, images: int) -> Path:
    path = root / "list.txt"
    path.write_text("".join(f"{number:06d}.jpg {number:06d}.png\n" for number in range(images)), encoding="utf-8")
    return path


def draw(root: Path, number: int, *, novel: bool = False) -> None:
    """A picture of 500x375 as a JPEG, and its mask; ``novel``: the largest object is of classes 1 to 5, no other is."""
    picture, ids = make_image(0, "train", number)
    if novel:
        areas = np.bincount(ids[ids != IGNORE], minlength=21)
        largest = 1 + int(areas[1:].argmax())
        other = (ids > 0) & (ids != IGNORE) & (ids != largest)
        ids = np.where(ids == largest, (largest - 1) % 5 + 1, np.where(other, 6 + ids % 15, ids)).astype(np.uint8)
    large = np.asarray(Image.fromarray(picture).resize(SIZE, Image.Resampling.BICUBIC)).astype(np.int16)
    grain = np.random.default_rng(number).normal(0, 9, large.shape)  # what photographs have and drawings lack
    Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(root / f"{number:06d}.jpg", quality=94)
    Image.fromarray(ids).resize(SIZE, Image.Resampling.NEAREST).save(root / f"{number:06d}.png")


def race(
    runs: Mapping[str, Callable[[int], R]], repeats: int, device: torch.device = CPU
) -> tuple[dict[str, list[float]], dict[str, R]]:
    """Run all in turn, once to warm up and then ``repeats`` times: the seconds of each, and what it gave last.

    Args:
        runs: each is given the number of its turn.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    given: dict[str, R] = {}
    for turn in progress(range(-1, repeats), desc="turns"):
        for name, run in runs.items():
            seconds, given[name] = timed(partial(run, turn), device)
            times[name] += [seconds] if turn >= 0 else []
    return times, given


def ratio(times: dict[str, list[float]], ours: str = "ours") -> dict[str, Any]:
    """Return the median seconds of each, how many times faster ``ours`` is than plain, and all times."""
    medians = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": medians["plain_seconds"] / medians[f"{ours}_seconds"], "spread": times}


def describe(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def timed(function: Callable[[], R], device: torch.device = CPU) -> tuple[float, R]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


MODES: dict[str, Callable[[argparse.Namespace, Sequence[str], Path], dict[str, Any]]] = {
    "train": bench_train,
    "eval": bench_eval,
    "loader": bench_loader,
    "index": bench_index,
}


if __name__ == "__main__":
    run_command(main)
