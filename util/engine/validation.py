"""The validations of a training run, and the threshold of its best checkpoint."""

import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from util.data.episodes import EpisodeList
from util.data.folds import novel_classes
from util.engine.build import Data, build_eval_loader, build_saved_model
from util.engine.checkpoint import load_checkpoint, save_checkpoint
from util.engine.diagnosis import calibrated_threshold
from util.engine.evaluation import NetworkMethod, evaluate
from util.engine.interruption import Interruption
from util.engine.log import TrainingLog
from util.engine.metrics import scores
from util.engine.panels import draw_rows, episode_rows
from util.engine.training import SELECTION, Training
from util.errors import UserError
from util.progress import progress


def validate(training: Training, data: Data, log: TrainingLog, stop: Interruption) -> float:
    """Evaluate on the fold's validation episodes, write scores and images, return the mIoU."""
    config = training.config
    episodes = [data.val_sampler(number) for number in range(config.eval.episodes)]
    method = NetworkMethod(training.model, config, training.hardware)
    began = time.monotonic()
    try:
        with progress(
            total=len(episodes), desc="validation", unit="episode", leave=False, disable=not log.first
        ) as bar:
            counts = evaluate(method, data.val, episodes, config=config, cache=data.cache, bar=bar, stop=stop)
    except (RuntimeError, UserError):  # a killed loader process, or no memory: keep the steps of this epoch
        with suppress(RuntimeError, UserError):
            training.save_last()
        raise
    names = {c: config.data.classes[c - 1] for c in novel_classes(config.data)}
    found = scores(counts["network"], np.array([episode.class_id for episode in episodes]), names)
    if log.first:
        log.bar.write(
            f"step {training.step}: mIoU {100 * found.miou:.1f}  FB-IoU {100 * found.fb_iou:.1f}"
            f"  in {time.monotonic() - began:.0f} s"
        )
        _, false_positive, missed, hit = counts["network"].sum(0)
        if false_positive + hit < 0.01 * (missed + hit):
            log.bar.write(
                f"{'hardly anything' if false_positive + hit else 'nothing'} is predicted at 0.5, so this mIoU says"
                " little; a threshold is chosen on base classes at the end of the run"
            )
        steps = training.step - training.finished_step
        losses = {name: value / steps for name, value in training.sums.items()}
        loader = build_eval_loader(config, EpisodeList(data.val, episodes), range(min(4, len(episodes))))
        image = draw_rows(episode_rows(training.model, loader, hardware=training.hardware))
        log.evaluation(training.step, found, losses, image)
    return found.miou


def finish_best(training: Training, data: Data, log: TrainingLog, stop: Interruption) -> None:
    """Store the calibrated threshold in best.pt, and say that the run is done, on screen and in run.json.

    The threshold is chosen on base classes. predict.py uses it; test.py stays at 0.5 and shows both.
    """
    if not log.first:
        return
    config, seconds = training.config, training.seconds
    path = Path(config.run_dir) / "best.pt"
    checkpoint = load_checkpoint(path)
    if "threshold" not in checkpoint:
        with torch.random.fork_rng(devices=[]):  # if this is stopped, last.pt is the same as without it
            model = build_saved_model(config, checkpoint, path).to(training.hardware.device)
        threshold, miou = calibrated_threshold(model, data.val, config=config, hardware=training.hardware, stop=stop)
        save_checkpoint(path, checkpoint | {"threshold": threshold, "base_miou": miou})
        stop.check(alone=True)
        print(f"threshold {threshold:g} is best on held-out episodes of base classes; predict.py uses it")
    log.finish(training.step, seconds, training.hardware.device)  # last: scripts/train_fold.sh skips a finished run
    print(f"done: {path} is {SELECTION[config.eval.select]}, of step {checkpoint['step']}")
