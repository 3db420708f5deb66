"""Training and evaluation loops, called by train.py and test.py alike."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from model.losses import LossTerms, NTRELoss
from model.ntrenet import NTRENet, NTRENetOutput
from util.dataset import Episode
from util.errors import UserError
from util.metrics import Counts, Scores
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
    model: NTRENet,
    criterion: NTRELoss,
    batches: Iterable[Episode],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    step: int,
    lr_at: Callable[[int], float],
    device: torch.device,
    precision: torch.dtype,
    bar: tqdm,
    on_step: Callable[[int, float, LossTerms], None],
) -> int:
    """Train on ``batches``, one step each, and return the next step's number.

    Args:
        step: number of the first step in the whole run; the learning rate is a function of it.
        on_step: called with (step, learning rate, loss terms) after each.
    Raises:
        UserError: a loss is not finite; names the step, every term and the files.
    """
    model.train()
    for batch in batches:
        lr = lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        on_device = batch.to(device)
        output = forward(model, on_device, precision)
        terms = criterion(output, on_device.query_mask, on_device.support_masks, on_device.class_id)
        if not math.isfinite(float(terms.total)):
            shown = ", ".join(f"{name} {float(value):g}" for name, value in terms._asdict().items())
            raise UserError(
                f"the loss of step {step} is not finite ({shown}); its episodes: {' | '.join(batch.names)};"
                " lower train.lr, set precision=fp32, or look at these files"
            )
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(terms.total).backward()
        scaler.step(optimizer)
        scaler.update()
        on_step(step, lr, terms)
        step += 1
        bar.update()
        bar.set_postfix(
            loss=f"{float(terms.total):.3f}",
            final=f"{float(terms.final):.3f}",
            bg=f"{float(terms.bg):.3f}",
            pcl=f"{float(terms.pcl):.2f}",
            lr=f"{lr:.4f}",
            refresh=False,
        )
    return step


NETWORK: dict[str, Predictor] = {"network": lambda output: output.logits}

BASELINES: dict[str, Predictor] = {
    "all_foreground": lambda output: torch.ones_like(output.logits),
    "prior": lambda output: torch.nn.functional.interpolate(
        output.prior - 0.5, size=output.logits.shape[-2:], mode="bilinear", align_corners=True
    ),
}
"""predictions that need no training: everything is target; the prior mask at 0.5"""


@torch.inference_mode()
def evaluate(
    model: NTRENet,
    loader: Iterable[Episode],
    *,
    classes: dict[int, str],
    device: torch.device,
    precision: torch.dtype,
    geometry: str,
    predictors: Mapping[str, Predictor] = NETWORK,
    bar: tqdm | None = None,
) -> dict[str, Scores]:
    """Score every predictor on the same episodes, at each query's original size.

    Args:
        classes: ids and names of the fold's novel classes.
        geometry: see :func:`util.transforms.to_original`.
        bar: advanced by one an episode, with the network's running mIoU.
    """
    model.eval()
    counts = {name: Counts(classes, device) for name in predictors}
    for number, batch in enumerate(loader):
        on_device = batch.to(device)
        output = forward(model, on_device, precision)
        for name, predict in predictors.items():
            for logits, truth, class_id in zip(
                predict(output).float(), on_device.truths, batch.class_id.tolist(), strict=True
            ):
                at_original = to_original(logits, truth.shape[0], truth.shape[1], geometry)
                counts[name].add(at_original[0] > 0, truth, class_id)
        if bar is not None:
            bar.update(len(batch.truths))
            if number % 20 == 0:
                bar.set_postfix(mIoU=f"{100 * next(iter(counts.values())).scores().miou:.1f}", refresh=False)
    return {name: count.scores() for name, count in counts.items()}
