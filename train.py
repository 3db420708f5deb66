"""Train one fold: python train.py --config configs/pascal/resnet50_fold0_1shot.yaml [key=value ...]

Writes into run_dir: config.yaml, run.json (environment, hashes), metrics.jsonl (a line an evaluation), last.pt,
best.pt and TensorBoard events. resume=auto continues where last.pt stands.
"""

import argparse
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model.losses import LossTerms, NTRELoss
from model.ntrenet import NTRENet
from model.weights import WeightsInfo
from util.build import (
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
from util.checkpoint import load_checkpoint, require_same, save_checkpoint, saved_config
from util.config import Config, load_config
from util.dataset import Episode
from util.engine import evaluate, learning_rate, train_one_epoch
from util.errors import UserError, run_command
from util.folds import base_classes, novel_classes
from util.record import append_json_line, environment, write_json
from util.visualize import episode_picture

EVAL_SEED = 0
"""of the validation episodes in training: the same for every run, so that runs compare"""
PANELS = 4
"""episodes shown in TensorBoard after each evaluation"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.lr=0.01 resume=auto")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    device, precision = select_hardware(config)
    run_dir = Path(config.run_dir)
    checkpoint = _checkpoint_to_resume(config, run_dir)

    torch.manual_seed(config.seed)
    if checkpoint is None:
        model, weights = build_model(config)
    else:
        weights = WeightsInfo(**checkpoint["weights"])
        model, _ = build_model(config, "random", deep_stem=weights.stem == "deep")
    model.to(device)
    criterion = build_loss(config).to(device)
    optimizer = build_optimizer(config, model)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    train_index, val_index = build_index(config, "train"), build_index(config, "val")
    train_sampler = build_train_sampler(config, train_index)
    val_sampler = build_eval_sampler(config, val_index, EVAL_SEED)
    val_batches = build_eval_loader(config, val_sampler, config.eval.episodes)
    steps_per_epoch = max(1, len(train_sampler) // config.train.batch_size)
    total_steps = steps_per_epoch * config.train.epochs

    step, best_miou = 0, -1.0
    if checkpoint is not None:
        step, best_miou = checkpoint["step"], checkpoint["best_miou"]
        model.load_state_dict(checkpoint["model"])
        criterion.load_state_dict(checkpoint["criterion"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        _set_random_state(checkpoint["random"], device)

    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False), encoding="utf-8")
    record = {
        **environment(device),
        "seed": config.seed,
        "eval_seed": EVAL_SEED,
        "weights": weights._asdict(),
        "train_list_sha256": train_index.list_sha256,
        "val_list_sha256": val_index.list_sha256,
        "resumed_at_step": step,
    }
    write_json(run_dir / "run.json", record)
    _announce(config, device, precision, weights, len(train_sampler), len(val_sampler), total_steps, step)

    classes = {c: config.data.classes[c - 1] for c in novel_classes(config.data)}
    loader = build_train_loader(config, train_sampler, start=step, stop=total_steps)
    batches = iter(loader) if step < total_steps else iter(())
    options = config.train
    lr_at = partial(learning_rate, base=options.lr, total=total_steps, power=options.power, warmup=options.warmup)
    with (
        SummaryWriter(run_dir / "tensorboard", purge_step=step) as writer,
        tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True) as bar,
    ):
        while step < total_steps:
            epoch = step // steps_per_epoch
            bar.set_description(f"epoch {epoch + 1}/{config.train.epochs}")
            step = train_one_epoch(
                model,
                criterion,
                itertools.islice(batches, steps_per_epoch),
                optimizer,
                scaler,
                step=step,
                lr_at=lr_at,
                device=device,
                precision=precision,
                bar=bar,
                on_step=partial(_write_losses, writer),
            )
            is_last = step == total_steps
            miou = math.nan
            if (epoch + 1) % config.eval.every == 0 or is_last:
                miou = _validate(config, model, val_batches, classes, device, precision, writer, run_dir, step)
            improved = miou > best_miou  # False for nan
            best_miou = miou if improved else best_miou
            state = {
                "config": config.model_dump(),
                "weights": weights._asdict(),
                "step": step,
                "best_miou": best_miou,
                "model": model.state_dict(),
            }
            if improved if config.eval.select == "miou" else is_last:
                save_checkpoint(run_dir / "best.pt", state)
            save_checkpoint(run_dir / "last.pt", state | _training_state(criterion, optimizer, scaler, device))
    print(
        f"done: {run_dir}/best.pt ({_selection(config)}), best validation mIoU {100 * best_miou:.1f}; {run_dir}/last.pt"
    )


def _checkpoint_to_resume(config: Config, run_dir: Path) -> dict[str, Any] | None:
    last = run_dir / "last.pt"
    if config.resume == "none":
        if last.exists():
            raise UserError(
                f"{run_dir} already holds a run; set resume=auto to continue it, or run_dir=... for another"
            )
        return None
    path = last if config.resume == "auto" else Path(config.resume)
    if config.resume == "auto" and not path.exists():
        return None
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} holds a model only and cannot be resumed; resume from last.pt")
    require_same(saved_config(checkpoint, path), config, path, resume=True)
    return checkpoint


def _announce(
    config: Config,
    device: torch.device,
    precision: torch.dtype,
    weights: WeightsInfo,
    train: int,
    val: int,
    steps: int,
    step: int,
) -> None:
    data = config.data
    print(
        f"{data.dataset} fold {data.fold} of {data.num_folds}, {data.shots}-shot, {config.model.backbone}"
        f" on {device.type}, {str(precision).removeprefix('torch.')}\n"
        f"weights: {weights.source} (stem {weights.stem}, sha256 {weights.sha256[:16] or 'none'})\n"
        f"training: {train} images of {len(base_classes(data))} base classes,"
        f" {steps} steps of {config.train.batch_size} episodes"
        f"{f', resumed at step {step}' if step else ''}\n"
        f"validation: {config.eval.episodes} episodes over {val} images of"
        f" {', '.join(data.classes[c - 1] for c in novel_classes(data))}\n"
        f"best.pt is {_selection(config)}; everything goes to {config.run_dir}",
        flush=True,
    )


def _selection(config: Config) -> str:
    return {
        "miou": "the checkpoint with the highest novel-fold mIoU, as in the lineage",
        "last": "the last checkpoint",
    }[config.eval.select]


def _write_losses(writer: SummaryWriter, step: int, lr: float, terms: LossTerms) -> None:
    for name, value in terms._asdict().items():
        writer.add_scalar(f"loss/{name}", float(value), step)
    writer.add_scalar("lr", lr, step)


def _validate(
    config: Config,
    model: NTRENet,
    batches: torch.utils.data.DataLoader[Episode],
    classes: dict[int, str],
    device: torch.device,
    precision: torch.dtype,
    writer: SummaryWriter,
    run_dir: Path,
    step: int,
) -> float:
    """Evaluate on the fold's validation episodes, write scores and pictures, return the mIoU."""
    with tqdm(total=config.eval.episodes, desc="validation", unit="episode", leave=False, dynamic_ncols=True) as bar:
        scores = evaluate(
            model,
            batches,
            classes=classes,
            device=device,
            precision=precision,
            geometry=config.eval.geometry,
            bar=bar,
        )["network"]
    tqdm.write(f"step {step}: mIoU {100 * scores.miou:.1f}  FB-IoU {100 * scores.fb_iou:.1f}")
    for name in ("miou", "fb_iou", "precision"):
        writer.add_scalar(f"val/{name}", getattr(scores, name), step)
    append_json_line(run_dir / "metrics.jsonl", {"step": step, **scores._asdict()})

    picture = episode_picture(model, batches, rows=PANELS, device=device, precision=precision)
    writer.add_image("episodes", picture, step, dataformats="HWC")
    return scores.miou


def _training_state(
    criterion: NTRELoss, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, device: torch.device
) -> dict[str, Any]:
    """What a resumed run needs beyond the model."""
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    return {
        "criterion": criterion.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "random": random,
    }


def _set_random_state(random: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(random["cpu"])
    if device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], device)


if __name__ == "__main__":
    run_command(main)
