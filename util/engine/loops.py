"""Training and evaluation loops, called by train.py and test.py alike."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from model.ntrenet import NTRENet, NTRENetOutput, QueryEncoding, SupportEncoding, join_shots
from model.ops import foreground, resize
from model.parallel import log_mean, processes, rank
from model.prior import target_positions
from util.config import Config
from util.data.class_index import ClassIndex
from util.data.dataset import Episode, ImageBatch
from util.data.episodes import EpisodeFiles
from util.data.loading import batches_of
from util.data.transforms import normalize, to_original
from util.engine.build import Hardware, build_image_loader
from util.engine.interruption import Interruption
from util.engine.metrics import confusion, scores
from util.engine.monitor import Monitor
from util.engine.rounds import EncodingSize, Round, batched, plan_rounds
from util.engine.run_state import Training

Predictor = Callable[[NTRENetOutput], Tensor]
"""model output -> logits (B, 1, S, S)"""


def forward(model: Callable[..., NTRENetOutput], batch: Episode, hardware: Hardware) -> NTRENetOutput:
    """Run the model on a batch that lies on its device."""
    with hardware.autocast():
        return model(normalize(batch.query), normalize(batch.supports), batch.support_masks)


def loss_terms(loss: Callable[..., dict[str, Tensor]], output: NTRENetOutput, batch: Episode) -> dict[str, Tensor]:
    """Compare what the model found in a batch with its masks and classes: each term, and their ``total``."""
    return loss(output, batch.query_mask, batch.support_masks, batch.class_id, batch.query_classes)


def learning_rate(step: int, *, base: float, total: int, power: float, warmup: int) -> float:
    """Polynomial decay base * (1 - step / total) ** power, after a linear rise over the first ``warmup`` steps."""
    return base * (1 - step / total) ** power * min(1.0, (step + 1) / max(warmup, 1))


def train(training: Training, batches: Iterable[Episode], *, lr_at: Callable[[int], float], monitor: Monitor) -> None:
    """Train on ``batches``, one step each.

    From the first loss on that is not finite no weight changes; the monitor finds it one step later.

    Args:
        lr_at: learning rate of a step.
    Raises:
        UserError, Stopped: see :meth:`util.engine.monitor.Monitor.after_step`.
    """
    optimizer, scaler, device = training.optimizer, training.scaler, training.hardware.device
    training.model.train()
    broken = torch.zeros((), device=device)
    for batch in monitor.watched(batches):
        lr = lr_at(training.step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        episodes = batch.to(device)
        if training.step == 0:
            with training.hardware.autocast():
                training.model.backbone.measure_scale(normalize(episodes.query))
        output = forward(training.network, episodes, training.hardware)
        losses = loss_terms(training.loss, output, episodes)
        scaler.scale(losses["total"]).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in training.model.parameters() if p.grad is not None])
        values = log_mean(torch.stack([*(term.detach() for term in losses.values()), norm, monitor.asked_to_stop()]))
        broken = torch.maximum(broken, (~values[0].isfinite()).float())
        optimizer.found_inf = broken  # type: ignore[attr-defined]  # a fused optimiser takes no step where it is 1
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)  # here, so that no forward pass finds the gradients of the step before
        training.step += 1
        monitor.after_step(lr, batch.names, values)


NETWORK: dict[str, Predictor] = {"network": lambda output: output.logits}

BASELINES: dict[str, Predictor] = {
    "all_foreground": lambda output: torch.ones_like(output.logits),
    "prior": lambda output: resize(output.prior - 0.5, (output.logits.shape[-2], output.logits.shape[-1])),
}
"""predictions that need no training: everything is target; the prior mask at 0.5"""


class Frozen(NamedTuple):
    """What the frozen backbone makes of a batch of N images: the same at every evaluation, whatever was trained."""

    places: list[int]
    """of the images in the list"""
    ground_truths: list[Tensor]
    """masks at their own size, (H, W)"""
    queries: list[int]
    """which of the N serve as queries"""
    supports: list[int]
    """and which as supports"""
    middle: Tensor
    """(N, *, h, w)"""
    query_high: Tensor | None
    """stage 4 of the queries, (., C4, h, w)"""
    support_high: Tensor | None
    """of the supports, (., n, C4) of :func:`model.prior.target_positions`"""
    target: Tensor
    """(N, 1, h, w) of :func:`model.ops.foreground`"""
    covered: list[int]
    """how many of the h w positions show the target in each of the N"""

    @property
    def bytes(self) -> int:
        """Return how much memory the tensors take."""
        tensors = [*self.ground_truths, self.middle, self.query_high, self.support_high, self.target]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class Encoded(NamedTuple):
    """What is kept of one image while its round lasts."""

    ground_truth: Tensor
    query: QueryEncoding | None
    support: SupportEncoding | None


@torch.inference_mode()
def evaluate(
    model: NTRENet,
    index: ClassIndex,
    episodes: Sequence[EpisodeFiles],
    *,
    config: Config,
    hardware: Hardware,
    predictors: Mapping[str, Predictor] = NETWORK,
    bar: tqdm | None = None,
    stop: Interruption | None = None,
    kept: dict[int, Frozen] | None = None,
) -> dict[str, np.ndarray]:
    """Run every predictor on the same episodes: the counts of each episode at its query's original size.

    Every image is read and encoded once a round, however many episodes it is in (see :mod:`util.engine.rounds`).
    Several processes share the rounds and sum their counts. Of a GPU one value a round is read.

    Args:
        bar: of ``len(episodes)``; reading an image counts as part of its episodes. Shows the mIoU of the first
            predictor so far.
        stop: looked at between two batches.
        kept: what the frozen backbone gave in an evaluation before this one, with the same config and episodes; an
            empty dictionary for the first. As many batches are put into it as ``eval.cache_gib`` has room for beside
            a round's encodings, and they are neither loaded nor run through the backbone again.
    Returns:
        (N, 4) counts of :func:`util.engine.metrics.confusion` a predictor, in the order of ``episodes``
    Raises:
        Stopped: one of the processes was asked to.
    """
    model.eval()
    limit, size = config.eval.cache_gib * 2**30, encoding_size(model, config, hardware)
    rounds = plan_rounds(episodes, index, size, limit)[rank() :: processes()]
    counts = {name: torch.zeros(len(episodes), 4, dtype=torch.long, device=hardware.device) for name in predictors}
    work, done = sum(len(part.episodes) + len(part.images) for part in rounds), 0
    known = {} if kept is None else kept
    room = 0.0 if kept is None else limit - max((part.bytes(size, index) for part in rounds), default=0.0)

    def run_rounds() -> Iterator[int]:
        """Yields how many images were encoded, or episodes segmented, since it did so last."""
        batches = batches_of(build_image_loader(config, index, rounds, without=known.keys()))
        batch_numbers = count()
        for last, part in enumerate(rounds, 1):
            encoded: dict[int, Encoded] = {}
            while len(encoded) < len(part.images):
                number = next(batch_numbers)
                frozen = known.get(number) or run_backbone(model, next(batches), part, hardware)
                if number not in known and sum(f.bytes for f in known.values()) + frozen.bytes <= room:
                    known[number] = frozen
                encoded |= encode(model, frozen, hardware)
                yield len(frozen.places)
            for numbers in batched(part.episodes, config.eval.batch_size):
                chosen = [episodes[number] for number in numbers]
                output = segment(model, chosen, encoded, config.data.image_size, hardware)
                ground_truths = [encoded[episode.query].ground_truth for episode in chosen]
                for name, predict in predictors.items():
                    rows = count_pixels(predict(output), ground_truths, config.eval.geometry)
                    for number, row in zip(numbers, rows, strict=True):
                        counts[name][number] = row
                yield len(numbers)
            show_miou(bar, next(iter(counts.values())), episodes, rounds[:last])

    for steps in run_rounds():
        done += steps
        if bar is not None:
            bar.update(len(episodes) * done // work - bar.n)
        if stop is not None and stop.requested is not None:
            break
    if stop is not None:
        stop.check(hardware.device)
    return {name: summed(table).cpu().numpy() for name, table in counts.items()}


def summed(table: Tensor) -> Tensor:
    """Sum a table over the processes, in place."""
    if processes() > 1:
        dist.all_reduce(table)
    return table


def show_miou(bar: tqdm | None, counts: Tensor, episodes: Sequence[EpisodeFiles], rounds: Sequence[Round]) -> None:
    """Show the mIoU of the rounds so far beside the bar."""
    if bar is not None:
        seen = [number for part in rounds for number in part.episodes]
        bar.set_postfix(mIoU=f"{100 * miou_of(counts, episodes, seen):.1f}", refresh=False)


def count_pixels(logits: Tensor, ground_truths: Sequence[Tensor], geometry: str) -> list[Tensor]:
    """Count the pixels (4,) of each prediction of a batch, logits (B, 1, S, S), at the size (H, W) of its truth."""
    pairs = zip(logits.float(), ground_truths, strict=True)
    return [confusion(to_original(x, truth.shape[0], truth.shape[1], geometry)[0] > 0, truth) for x, truth in pairs]


def miou_of(counts: Tensor, episodes: Sequence[EpisodeFiles], numbers: list[int]) -> float:
    """The mIoU of some of the episodes, over the classes that occur in them."""
    class_ids = np.array([episodes[number].class_id for number in numbers])
    return scores(counts.cpu().numpy()[numbers], class_ids, {c: str(c) for c in np.unique(class_ids).tolist()}).miou


def run_backbone(model: NTRENet, batch: ImageBatch, part: Round, hardware: Hardware) -> Frozen:
    """Run the backbone on images as what they serve in this round; one that is query and support goes through once."""
    device, backbone = hardware.device, model.backbone
    queries, supports = (
        [n for n, place in enumerate(batch.places) if role in part.images[place]] for role in ("query", "support")
    )
    with hardware.autocast():
        middle, stage3 = backbone(normalize(batch.images.to(device, non_blocking=True)))
        target = foreground(batch.masks, (stage3.shape[-2], stage3.shape[-1]))  # on the host, which counts
        covered = (target > 0).sum((1, 2, 3)).tolist()
        target = target.to(device, non_blocking=True)
        query_high = backbone.high(picked(stage3, queries)) if queries else None
        most = max((covered[n] for n in supports), default=0)
        shown = (picked(stage3, supports), picked(target, supports)) if supports else None
        support_high = None if shown is None else target_positions(backbone, *shown, most)
    ground_truths = [ground_truth.to(device, non_blocking=True) for ground_truth in batch.ground_truths]
    return Frozen(batch.places, ground_truths, queries, supports, middle, query_high, support_high, target, covered)


def picked(x: Tensor, numbers: list[int]) -> Tensor:
    """Some of N things (N, ...), in order; a list as an index would have to be copied to the device."""
    return x if len(numbers) == len(x) else torch.cat([x[n : n + 1] for n in numbers])


def encode(model: NTRENet, frozen: Frozen, hardware: Hardware) -> dict[int, Encoded]:
    """Encode images as what they serve, place by place."""
    query_of: dict[int, QueryEncoding] = {}
    support_of: dict[int, SupportEncoding] = {}
    with hardware.autocast():
        if frozen.query_high is not None:
            query = model.read_query(picked(frozen.middle, frozen.queries), frozen.query_high)
            for n, *parts in zip(frozen.queries, *query, strict=True):
                query_of[n] = QueryEncoding(*(part[None] for part in parts))
        if frozen.support_high is not None:
            middle, target = (picked(x, frozen.supports) for x in (frozen.middle, frozen.target))
            support, _ = model.read_supports(middle, frozen.support_high, target)
            for n, prototype, high, *base in zip(frozen.supports, *support, strict=True):
                own = high[None, :, : frozen.covered[n] + 1].clone()  # what follows is the batch's padding
                support_of[n] = SupportEncoding(prototype[None], own, *(part[None] for part in base))
    return {
        place: Encoded(ground_truth, query_of.get(n), support_of.get(n))
        for n, (place, ground_truth) in enumerate(zip(frozen.places, frozen.ground_truths, strict=True))
    }


def segment(
    model: NTRENet, episodes: Sequence[EpisodeFiles], encoded: Mapping[int, Encoded], side: int, hardware: Hardware
) -> NTRENetOutput:
    """Run episodes whose images are encoded as one batch."""
    queries = [encoded[episode.query].query for episode in episodes]
    supports = [[encoded[place].support for place in episode.supports] for episode in episodes]
    joined = [join_shots([s for s in shots if s is not None]) for shots in supports]
    with hardware.autocast():
        return model.segment([q for q in queries if q is not None], joined, (side, side))


def encoding_size(model: NTRENet, config: Config, hardware: Hardware) -> EncodingSize:
    """Bytes of an image's encoding, found by encoding an empty one."""
    empty = torch.zeros(1, 3, config.data.image_size, config.data.image_size, device=hardware.device)
    with hardware.autocast():
        query = model.encode_query(empty)
    high = query.high.numel() * query.high.element_size()
    others = sum(part.numel() * part.element_size() for part in (query.feature, query.base, query.base_embedding))
    return EncodingSize(query=high + others, whole=high)
