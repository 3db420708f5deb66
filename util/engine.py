"""Training and evaluation loops, called by train.py and test.py alike."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from model.losses import LossTerms
from model.ntrenet import NTRENet, NTRENetOutput
from model.ops import resize
from util.build import Hardware
from util.config import Config
from util.dataset import Episode
from util.errors import UserError
from util.folds import novel_classes
from util.metrics import Counts, Scores
from util.training import Training
from util.transforms import normalize, to_original

Predictor = Callable[[NTRENetOutput], Tensor]
"""model output -> logits (B, 1, S, S)"""


def forward(model: NTRENet, batch: Episode, precision: torch.dtype) -> NTRENetOutput:
    """Run the model on a batch that lies on its device, in the given precision."""
    with torch.autocast(batch.query.device.type, dtype=precision, enabled=precision != torch.float32):
        return model(normalize(batch.query), normalize(batch.supports), batch.support_masks)


def learning_rate(step: int, *, base: float, total: int, power: float, warmup: int) -> float:
    """Polynomial decay base * (1 - step / total) ** power, after a linear rise over the first ``warmup`` steps."""
    return base * (1 - step / total) ** power * min(1.0, (step + 1) / max(warmup, 1))


def train_one_epoch(
    training: Training,
    batches: Iterable[Episode],
    *,
    lr_at: Callable[[int], float],
    bar: tqdm,
    on_step: Callable[[int, float, LossTerms], None],
) -> dict[str, float]:
    """Train on ``batches``, one step each; returns the mean of every loss term.

    Args:
        lr_at: learning rate of a step.
        on_step: called with (step, learning rate, loss terms) after each.
    Raises:
        UserError: a loss is not finite; names the step, every term and the files.
    """
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    model.train()
    sums, steps = dict.fromkeys(LossTerms._fields, 0.0), 0
    for batch in batches:
        lr = lr_at(training.step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        on_device = batch.to(training.hardware.device)
        output = forward(model, on_device, training.hardware.precision)
        losses = training.criterion(output, on_device.query_mask, on_device.support_masks, on_device.class_id)
        terms = LossTerms(*(term.detach() for term in losses))
        if not math.isfinite(terms.total):
            shown = ", ".join(f"{name} {float(value):g}" for name, value in terms._asdict().items())
            raise UserError(
                f"the loss of step {training.step} is not finite ({shown}); its episodes: {' | '.join(batch.names)};"
                " lower train.lr, set precision=fp32, or look at these files"
            )
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(losses.total).backward()
        scaler.step(optimizer)
        scaler.update()
        on_step(training.step, lr, terms)
        training.step += 1
        sums, steps = {name: sums[name] + float(value) for name, value in terms._asdict().items()}, steps + 1
        bar.set_postfix(
            loss=f"{float(terms.total):.3f}",
            final=f"{float(terms.final):.3f}",
            bg=f"{float(terms.bg):.3f}",
            pcl=f"{float(terms.pcl):.2f}",
            lr=f"{lr:.4f}",
            refresh=False,
        )
        bar.update()
    return {name: value / max(steps, 1) for name, value in sums.items()}


NETWORK: dict[str, Predictor] = {"network": lambda output: output.logits}

BASELINES: dict[str, Predictor] = {
    "all_foreground": lambda output: torch.ones_like(output.logits),
    "prior": lambda output: resize(output.prior - 0.5, (output.logits.shape[-2], output.logits.shape[-1])),
}
"""predictions that need no training: everything is target; the prior mask at 0.5"""


@torch.inference_mode()
def evaluate(
    model: NTRENet,
    loader: Iterable[Episode],
    *,
    config: Config,
    hardware: Hardware,
    predictors: Mapping[str, Predictor] = NETWORK,
    bar: tqdm | None = None,
) -> dict[str, Scores]:
    """Score every predictor on the same episodes, on the fold's novel classes, at each query's original size.

    Args:
        bar: advanced by one an episode, with the running mIoU of the first predictor.
    """
    model.eval()
    classes = {c: config.data.classes[c - 1] for c in novel_classes(config.data)}
    counts = {name: Counts(classes, hardware.device) for name in predictors}
    for number, batch in enumerate(loader):
        on_device = batch.to(hardware.device)
        output = forward(model, on_device, hardware.precision)
        for name, predict in predictors.items():
            for logits, truth, class_id in zip(
                predict(output).float(), on_device.truths, batch.class_id.tolist(), strict=True
            ):
                at_original = to_original(logits, truth.shape[0], truth.shape[1], config.eval.geometry)
                counts[name].add(at_original[0] > 0, truth, class_id)
        if bar is not None:
            bar.update(len(batch.truths))
            if number % 20 == 0:
                bar.set_postfix(mIoU=f"{100 * next(iter(counts.values())).scores().miou:.1f}", refresh=False)
    return {name: count.scores() for name, count in counts.items()}
