"""The training loop learns: it overfits an episode, and ends at a loss that is not finite."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from model.losses import NTRELoss
from tests.harness import call, load, refused
from util.config import Config, load_config
from util.data.dataset import Episode
from util.engine.build import Hardware, build_index, build_train_sampler, forward, open_data, training_batches
from util.engine.interruption import Interruption
from util.engine.log import TrainingLog
from util.engine.metrics import mask_iou
from util.engine.training import Training, start_or_resume, train_epoch


@contextmanager
def started(config: Config, steps: int) -> Iterator[tuple[Training, list[Episode], Callable[[Episode], float]]]:
    """A new training in fp32 on the CPU, its batches, and the loop over one batch, which returns the total loss."""
    data = open_data(config)
    training = start_or_resume(config, Hardware(torch.device("cpu"), torch.float32), data.list_sha256)
    with closing(TrainingLog(training, steps)) as log, Interruption() as stop:

        def step(batch: Episode) -> float:
            before = training.sums["total"]
            train_epoch(training, [batch], steps, log, stop)
            return training.sums["total"] - before

        yield training, list(training_batches(config, data.train_sampler, start=0, stop=steps)), step


def test_one_episode_is_overfitted(config: Path, tmp_path: Path) -> None:
    large = ["data.image_size=97", "data.scale=[1.2, 1.3]"]
    schedule = ["train.batch_size=1", "train.lr=0.02", "train.warmup=10", "train.power=0"]
    with started(load_config(config, [*large, *schedule, f"run_dir={tmp_path}"]), 1) as (training, (episode,), step):
        for _ in range(100):
            step(episode)
        with torch.no_grad():
            logits = forward(training.model.eval(), episode, training.hardware).logits
    truth = episode.query_mask[0].numpy()
    assert 0.05 < (truth == 1).mean() < 0.5
    assert mask_iou((logits[0, 0] > 0).numpy(), truth) > 0.9


@pytest.mark.parametrize(
    ("precision", "interrupted"), [(torch.float32, False), (torch.float32, True), (torch.float16, False)]
)
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint_before(
    precision: torch.dtype, interrupted: bool, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 the scaler skips the step, and the first steps of the run, whose gradients overflow."""
    compute, steps = NTRELoss.forward, itertools.count(1)

    def spoiled(self: NTRELoss, *given: Any) -> dict[str, torch.Tensor]:
        losses, step = compute(self, *given), next(steps)
        if interrupted and step == 14:
            os.kill(os.getpid(), signal.SIGTERM)  # would save now, but the losses since step 10 are read first
        return {**losses, "total": losses["total"] * torch.inf} if step == 13 else losses

    monkeypatch.setattr(NTRELoss, "forward", spoiled)
    monkeypatch.setattr(train, "select_hardware", lambda _: Hardware(torch.device("cpu"), precision))
    options = [f"run_dir={tmp_path}", "train.epochs=9", "train.checkpoint_minutes=0", "eval.every=9"]
    options += ["data.image_size=33", "model.channels=8"]
    line = refused(call(train, "--config", config, *options), "the loss of step 13 is not finite (total inf, final ")
    settings = load_config(config, options)
    sampler = build_train_sampler(settings, build_index(settings, "train"))
    (batch,) = training_batches(settings, sampler, start=12, stop=13)
    assert len(batch.names) == 2 and all(name in line for name in batch.names)
    saved = load(tmp_path / "last.pt")
    assert 10 <= saved["step"] < 13
    assert all(value.isfinite().all() for value in (*saved["model"].values(), saved["loss"]["bank.prototypes"]))
