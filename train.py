"""Train one fold: python train.py --config configs/pascal/resnet50_fold0_1shot.yaml [key=value ...]

Writes into run_dir: config.yaml, run.json (environment, hashes), metrics.jsonl (a line an evaluation), last.pt,
best.pt and TensorBoard events. resume=auto continues where last.pt stands.
"""

import argparse
import itertools
import time
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model.losses import LossTerms
from util.build import (
    build_eval_loader,
    build_eval_sampler,
    build_index,
    build_train_loader,
    build_train_sampler,
    select_hardware,
)
from util.class_index import ClassIndex
from util.config import add_config_argument, load_config, parse_arguments
from util.engine import evaluate, learning_rate, train_one_epoch
from util.episodes import EpisodeFiles, EpisodeList
from util.errors import UserError, run_command
from util.folds import base_classes, novel_classes
from util.metrics import scores
from util.record import append_json_line, environment, keep_json_lines, peak_memory_mib, write_json
from util.training import Training, start_or_resume
from util.visualize import draw_rows, episode_rows

EVAL_SEED = 0
"""of the validation episodes in training: the same for every run, so that runs compare"""
PANELS = 4
"""episodes shown in TensorBoard after each evaluation"""
SELECTION = {
    "miou": "the checkpoint with the highest novel-fold mIoU, as in the lineage",
    "last": "the last checkpoint",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    args, overrides = parse_arguments(parser)
    config = load_config(args.config, overrides)
    hardware = select_hardware(config)

    train_index, val_index = build_index(config, "train"), build_index(config, "val")
    train_sampler = build_train_sampler(config, train_index)
    val_sampler = build_eval_sampler(config, val_index, EVAL_SEED)
    lists = {str(index.list_path): index.list_sha256 for index in (train_index, val_index)}
    training = start_or_resume(config, hardware, lists)
    steps_per_epoch = max(1, len(train_sampler) // config.train.batch_size)
    total_steps = steps_per_epoch * config.train.epochs

    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_dir {run_dir} cannot be written ({error}); set run_dir=... to another folder") from error
    record = {
        **environment(hardware.device),
        "seed": config.seed,
        "eval_seed": EVAL_SEED,
        "weights": training.weights._asdict(),
        "list_sha256": lists,
        "resumed_at_step": training.step,
    }
    write_json(run_dir / "run.json", record)
    keep_json_lines(run_dir / "metrics.jsonl", lambda line: line["step"] <= training.step)
    announce(training, len(train_sampler), len(val_sampler), total_steps)
    if any(train_sampler.left_out.values()):
        left_out = ", ".join(f"{config.data.classes[c - 1]} {n}" for c, n in train_sampler.left_out.items())
        print(f"left out for novel classes in them (data.novel_in_train=drop), images a class: {left_out}")

    episodes = [val_sampler(number) for number in range(config.eval.episodes)]
    batches = iter(build_train_loader(config, train_sampler, start=training.step, stop=total_steps))
    options = config.train
    began = time.perf_counter() - training.seconds
    lr_at = partial(learning_rate, base=options.lr, total=total_steps, power=options.power, warmup=options.warmup)
    with (
        SummaryWriter(run_dir / "tensorboard", purge_step=training.step + 1) as writer,
        tqdm(total=total_steps, initial=training.step, unit="step", dynamic_ncols=True) as bar,
    ):
        while training.step < total_steps:
            epoch = training.step // steps_per_epoch + 1
            bar.set_description(f"epoch {epoch}/{config.train.epochs}")
            epoch_batches = itertools.islice(batches, steps_per_epoch)
            losses = train_one_epoch(
                training, epoch_batches, lr_at=lr_at, bar=bar, on_step=partial(write_losses, writer)
            )

            is_last = training.step == total_steps
            improved = False
            if epoch % config.eval.every == 0 or is_last:
                miou = validate(training, val_index, episodes, writer, losses)
                improved = miou > training.best_miou
                training.best_miou = max(training.best_miou, miou)
            if improved if config.eval.select == "miou" else is_last:
                training.save_best(run_dir / "best.pt")
            training.seconds = time.perf_counter() - began
            training.save_last(run_dir / "last.pt")
    write_json(run_dir / "run.json", record | {"finished": cost(training)})
    best = run_dir / "best.pt"
    kept = f"{best} is {SELECTION[config.eval.select]}" if best.exists() else "nothing improved on where it began"
    print(f"done: {kept}; highest validation mIoU {100 * training.best_miou:.1f}")


def cost(training: Training) -> dict[str, float]:
    """What the whole run took, for tables."""
    peak = peak_memory_mib(training.hardware.device)
    return {"steps": training.step, "seconds": training.seconds, "peak_memory_mib": peak}


def announce(training: Training, train: int, val: int, steps: int) -> None:
    """Say on screen what is about to run."""
    config, (device, precision), weights = training.config, training.hardware, training.weights
    data = config.data
    print(
        f"{data.dataset} fold {data.fold} of {data.num_folds}, {data.shots}-shot, {config.model.backbone}"
        f" on {device.type}, {str(precision).removeprefix('torch.')}\n"
        f"weights: {weights.source} (stem {weights.stem}, sha256 {weights.sha256[:16] or 'none'})\n"
        f"training: {train} images of {len(base_classes(data))} base classes,"
        f" {steps} steps of {config.train.batch_size} episodes"
        f"{f', resumed at step {training.step}' if training.step else ''}\n"
        f"validation: {config.eval.episodes} episodes over {val} images of"
        f" {', '.join(data.classes[c - 1] for c in novel_classes(data))}\n"
        f"best.pt is {SELECTION[config.eval.select]}; everything goes to {config.run_dir}",
        flush=True,
    )


def write_losses(writer: SummaryWriter, step: int, lr: float, terms: LossTerms) -> None:
    for name, value in terms._asdict().items():
        writer.add_scalar(f"loss/{name}", float(value), step)
    writer.add_scalar("lr", lr, step)


def validate(
    training: Training,
    index: ClassIndex,
    episodes: list[EpisodeFiles],
    writer: SummaryWriter,
    losses: dict[str, float],
) -> float:
    """Evaluate on the fold's validation episodes, write scores and pictures, return the mIoU.

    Args:
        losses: mean of every term over the epoch before, for metrics.jsonl.
    """
    config, step, hardware = training.config, training.step, training.hardware
    with tqdm(total=len(episodes), desc="validation", leave=False, dynamic_ncols=True) as bar:
        counts = evaluate(training.model, index, episodes, config=config, hardware=hardware, bar=bar)["network"]
    names = {c: config.data.classes[c - 1] for c in novel_classes(config.data)}
    found = scores(counts, np.array([episode.class_id for episode in episodes]), names)
    tqdm.write(f"step {step}: mIoU {100 * found.miou:.1f}  FB-IoU {100 * found.fb_iou:.1f}")
    for name in ("miou", "fb_iou", "precision"):
        writer.add_scalar(f"val/{name}", getattr(found, name), step)
    append_json_line(Path(config.run_dir) / "metrics.jsonl", {"step": step, **found._asdict(), "loss": losses})
    loader = build_eval_loader(config, EpisodeList(index, episodes), range(min(PANELS, len(episodes))))
    picture = draw_rows(episode_rows(training.model, loader, hardware=hardware))
    writer.add_image("episodes", picture, step, dataformats="HWC")
    return found.miou


if __name__ == "__main__":
    run_command(main)
