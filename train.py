"""Train one fold: python train.py --config configs/pascal/resnet50_fold0_1shot.yaml [ABLATION.yaml] [key=value ...]

Writes into run_dir: config.yaml, run.json (environment, hashes, starts), metrics.jsonl (a line an evaluation), last.pt
and the checkpoint before it, best.pt and TensorBoard events. resume=auto continues exactly where it stood; Ctrl-C,
SIGTERM and a closed terminal save first. torchrun --nproc_per_node=N train.py ... trains on N processes, with the same
result.
"""

from util.command import run_command

import argparse
import itertools
import json
import math
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from tqdm import tqdm

from model.parallel import processes, rank
from util.config import Config, add_config_argument, load_config, parse_arguments
from util.data.class_index import ClassIndex
from util.data.episodes import EpisodeFiles, EpisodeList, EpisodeSampler
from util.data.folds import base_classes, novel_classes
from util.data.loading import batches_of
from util.data.published import is_benchmark, overlap, title_of
from util.engine.build import (
    build_eval_loader,
    build_eval_sampler,
    build_index,
    build_saved_model,
    build_train_loader,
    build_train_sampler,
    select_hardware,
)
from util.engine.checkpoint import load_checkpoint, save_checkpoint
from util.engine.compilation import compile_where_it_pays
from util.engine.diagnosis import calibrated_threshold
from util.engine.distributed import first_process_first, joined_processes
from util.engine.loops import Frozen, evaluate, learning_rate, train
from util.engine.memory import peak_memory_mib, return_freed_memory
from util.engine.metrics import scores
from util.engine.monitor import Monitor, monitored
from util.engine.record import append_json_line, environment, keep_json_lines
from util.engine.run_state import Training, start_or_resume
from util.errors import UserError, first_of
from util.files import held_alone, read_json, write_json, write_text
from util.progress import progress
from util.segment.baselines import better_of
from util.segment.visualize import draw_rows, episode_rows

EVAL_SEED = 0
"""of the validation episodes in training: the same for every run, so that runs compare"""
SHORT, USUAL = 300, 600
"""steps below which a run has hardly begun to learn, and those of a short run that has; the quick start takes 584"""
PANELS = 4
"""episodes shown in TensorBoard after each evaluation"""
SELECTION = {
    "miou": "the checkpoint with the highest novel-fold mIoU, as in PFENet's code",
    "last": "the last checkpoint",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    args, overrides = parse_arguments(parser)
    config = load_config(args.config, overrides)
    with joined_processes(), held_alone(Path(config.run_dir)) if rank() == 0 else nullcontext():
        run(config)


class Data(NamedTuple):
    """What a run trains on and is evaluated on."""

    train: ClassIndex
    val: ClassIndex
    train_sampler: EpisodeSampler
    val_sampler: EpisodeSampler
    shared: str | None
    """what the lists have in common, as a sentence"""


def open_data(config: Config) -> Data:
    """Read the lists.

    Raises:
        UserError: a benchmark's lists have images in common; see also util/data/.
    """
    with first_process_first():
        train_index, val_index = build_index(config, "train"), build_index(config, "val")
    shared = overlap(train_index.items, val_index.items)
    if shared and is_benchmark(config.data.dataset):
        raise UserError(shared)
    val_sampler = build_eval_sampler(config, val_index, EVAL_SEED)
    return Data(train_index, val_index, build_train_sampler(config, train_index), val_sampler, shared)


def run(config: Config) -> None:
    """Train to the end, epoch after epoch, from the start or from where the run stood."""
    hardware = select_hardware(config)
    return_freed_memory()
    data = open_data(config)
    training = start_or_resume(config, hardware, {"train": data.train.list_sha256, "val": data.val.list_sha256})
    options = config.train
    epoch_steps = max(1, len(data.train_sampler) // options.batch_size)
    total_steps = epoch_steps * options.epochs
    training.require_place(epoch_steps, total_steps)
    lr_at = partial(learning_rate, base=options.lr, total=total_steps, power=options.power, warmup=options.warmup)
    episodes = [data.val_sampler(number) for number in range(config.eval.episodes)]
    kept: dict[int, Frozen] = {}
    batches = batches_of(build_train_loader(config, data.train_sampler, start=training.step, stop=total_steps))
    if rank() == 0:
        open_run(training, data)
        announce(training, data, total_steps)
    compile_where_it_pays(training, steps=total_steps - training.step)
    with monitored(training, epoch_steps, total_steps) as monitor:
        while training.finished_step < total_steps:
            end = training.finished_step + epoch_steps
            train(training, itertools.islice(batches, end - training.step), lr_at=lr_at, monitor=monitor)
            evaluated = (end // epoch_steps) % config.eval.every == 0 or end == total_steps
            miou = validate(training, data.val, episodes, monitor, kept) if evaluated else -1.0
            improved = training.finish_epoch(end, miou)
            if improved if config.eval.select == "miou" else end == total_steps:
                training.save_best()
            monitor.save()
    if rank() == 0:
        close_run(training, data.val, episodes)


def open_run(training: Training, data: Data) -> None:
    """config.yaml and run.json; what an interrupted run wrote after its last checkpoint goes."""
    config, run_dir = training.config, Path(training.config.run_dir)
    write_text(run_dir / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
    path = run_dir / "run.json"
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": training.step,
        **environment(training.hardware.device),
        "processes": processes(),
    }
    starts = read_json(path).get("starts", []) if training.step else []
    record = {
        **environment(training.hardware.device),
        "seed": config.seed,
        "eval_seed": EVAL_SEED,
        "weights": training.weights._asdict(),
        "list_sha256": {str(index.list_path): index.list_sha256 for index in (data.train, data.val)},
        "resumed_at_step": training.step,
        "starts": [*starts, start],
    }
    write_json(path, record)
    keep_json_lines(run_dir / "metrics.jsonl", lambda line: line["step"] <= training.finished_step)


def close_run(training: Training, val_index: ClassIndex, episodes: list[EpisodeFiles]) -> None:
    """Calibrate best.pt, compare it with what needs no training, and say that the run is done, here and in run.json."""
    run_dir = Path(training.config.run_dir)
    best, kept = run_dir / "best.pt", "nothing improved on where it began"
    if best.exists():
        checkpoint = load_checkpoint(best)
        if "threshold" not in checkpoint:
            calibrate(best, checkpoint, val_index, episodes, training)
        kept = f"{best} is {SELECTION[training.config.eval.select]}, of step {checkpoint['step']}"
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            if (scored := json.loads(line))["step"] == checkpoint["step"]:
                kept += f", with a validation mIoU of {100 * scored['miou']:.1f}"
    write_json(run_dir / "run.json", read_json(run_dir / "run.json") | {"finished": cost(training)})
    print(f"done: {kept}")


def calibrate(
    path: Path, checkpoint: dict[str, Any], index: ClassIndex, episodes: list[EpisodeFiles], training: Training
) -> None:
    """Store in a checkpoint the threshold that predictions use; test.py stays at 0.5 and shows both."""
    config, hardware = training.config, training.hardware
    model = build_saved_model(config, checkpoint, path).to(hardware.device)
    threshold = calibrated_threshold(model, index, config=config, hardware=hardware)
    save_checkpoint(path, checkpoint | {"threshold": threshold})
    print(f"threshold {threshold:g} is best on held-out episodes of base classes; predict.py uses it")
    if training.step >= SHORT:
        print(better_of(model, threshold, index, episodes, config=config, hardware=hardware))


def cost(training: Training) -> dict[str, float]:
    """What the whole run took, for tables."""
    peak = peak_memory_mib(training.hardware.device)
    return {"steps": training.step, "seconds": training.seconds, "peak_memory_mib": peak}


def announce(training: Training, data: Data, steps: int) -> None:
    """Say on screen what is about to run."""
    config, (device, precision), weights = training.config, training.hardware, training.weights
    options, sampler = config.data, data.train_sampler
    for index in (data.train, data.val):
        print(f"list {index.list_path}, {len(index.items)} lines: {title_of(index.items)}")
    if data.shared:
        print(f"warning: {data.shared}")
    print(
        f"{options.dataset} fold {options.fold} of {options.num_folds}, {options.shots}-shot, {config.model.backbone}"
        f" on {device.type}, {str(precision).removeprefix('torch.')}\n"
        f"weights: {weights.source} (stem {weights.stem}, sha256 {weights.sha256[:16] or 'none'})\n"
        f"training: {len(sampler)} images of {len(base_classes(options))} base classes,"
        f" {steps} steps of {config.train.batch_size} episodes"
        f"{f', resumed at step {training.step}' if training.step else ''}\n"
        f"validation: {config.eval.episodes} episodes over {len(data.val_sampler)} images of"
        f" {first_of([options.classes[c - 1] for c in novel_classes(options)], shown=20, separator=', ')}\n"
        f"best.pt is {SELECTION[config.eval.select]}; everything goes to {config.run_dir}",
        flush=True,
    )
    if any(sampler.left_out.values()):
        left_out = ", ".join(f"{options.classes[c - 1]} {n}" for c, n in sampler.left_out.items())
        print(f"left out for novel classes in them (data.novel_in_train=drop), images a class: {left_out}")
    if steps < SHORT:
        print(
            f"warning: {steps} steps are too few to learn from (the quick start takes 584): raise train.epochs to"
            f" {math.ceil(USUAL * config.train.epochs / steps)}, or leave out training: predict.py without --checkpoint"
        )


def validate(
    training: Training, index: ClassIndex, episodes: list[EpisodeFiles], monitor: Monitor, kept: dict[int, Frozen]
) -> float:
    """Evaluate on the fold's validation episodes, write scores and pictures, return the mIoU.

    Args:
        kept: from one validation to the next, see :func:`util.engine.loops.evaluate`.
    """
    config, step, hardware, events = training.config, training.step, training.hardware, monitor.events
    bar = progress(total=len(episodes), desc="validation", unit="episode", leave=False, disable=events is None)
    began = time.monotonic()
    with bar:
        counts = evaluate(
            training.model,
            index,
            episodes,
            config=config,
            hardware=hardware,
            bar=bar,
            stop=monitor.stop,
            kept=kept,
        )
    names = {c: config.data.classes[c - 1] for c in novel_classes(config.data)}
    found = scores(counts["network"], np.array([episode.class_id for episode in episodes]), names)
    if events is not None:
        seconds = time.monotonic() - began
        tqdm.write(f"step {step}: mIoU {100 * found.miou:.1f}  FB-IoU {100 * found.fb_iou:.1f}  in {seconds:.0f} s")
        losses = {name: value / monitor.epoch_steps for name, value in training.sums.items()}
        append_json_line(Path(config.run_dir) / "metrics.jsonl", {"step": step, **found._asdict(), "loss": losses})
        loader = build_eval_loader(config, EpisodeList(index, episodes), range(min(PANELS, len(episodes))))
        events.evaluation(step, found, draw_rows(episode_rows(training.model, loader, hardware=hardware)))
    return found.miou


if __name__ == "__main__":
    run_command(main)
