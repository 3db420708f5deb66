"""Training and evaluation loops, called by train.py and test.py alike."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from model.backbone import Features
from model.ntrenet import NTRENet, NTRENetOutput, QueryEncoding, SupportEncoding, join_shots
from model.ops import resize
from model.parallel import log_mean, processes, rank
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


def forward(model: nn.Module, batch: Episode, hardware: Hardware) -> NTRENetOutput:
    """Run the model on a batch that lies on its device."""
    with hardware.autocast():
        output: NTRENetOutput = model(normalize(batch.query), normalize(batch.supports), batch.support_masks)
    return output


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
        losses = training.criterion(
            output, episodes.query_mask, episodes.support_masks, episodes.class_id, episodes.query_classes
        )
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


class Encoded(NamedTuple):
    """What is kept of one image while its round lasts."""

    truth: Tensor
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
) -> dict[str, np.ndarray]:
    """Run every predictor on the same episodes: the counts of each episode at its query's original size.

    Every image is read and encoded once a round, however many episodes it is in (see :mod:`util.engine.rounds`).
    Several processes share the rounds and sum their counts.

    Args:
        bar: of ``len(episodes)``; reading an image counts as part of its episodes. Shows the mIoU of the first
            predictor so far.
        stop: looked at between two batches.
    Returns:
        (N, 4) counts of :func:`util.engine.metrics.confusion` a predictor, in the order of ``episodes``
    Raises:
        Stopped: one of the processes was asked to.
    """
    model.eval()
    limit = config.eval.cache_gib * 2**30
    rounds = plan_rounds(episodes, index, encoding_size(model, config, hardware), limit)[rank() :: processes()]
    counts = {name: torch.zeros(len(episodes), 4, dtype=torch.long, device=hardware.device) for name in predictors}
    work, done = sum(len(part.episodes) + len(part.images) for part in rounds), 0

    def run_rounds() -> Iterator[int]:
        """Yields how many images were encoded, or episodes segmented, since it did so last."""
        batches = batches_of(build_image_loader(config, index, rounds))
        for last, part in enumerate(rounds, 1):
            encoded: dict[int, Encoded] = {}
            while len(encoded) < len(part.images):
                batch = next(batches)
                encoded |= encode(model, batch, part, hardware)
                yield len(batch.places)
            for numbers in batched(part.episodes, config.eval.batch_size):
                chosen = [episodes[number] for number in numbers]
                output = segment(model, chosen, encoded, config.data.image_size, hardware)
                for name, predict in predictors.items():
                    for number, episode, logits in zip(numbers, chosen, predict(output).float(), strict=True):
                        truth = encoded[episode.query].truth
                        at_original = to_original(logits, truth.shape[0], truth.shape[1], config.eval.geometry)
                        counts[name][number] = confusion(at_original[0] > 0, truth)
                yield len(numbers)
            if bar is not None:
                seen = [number for part in rounds[:last] for number in part.episodes]
                table = next(iter(counts.values()))[seen].cpu().numpy()
                class_ids = np.array([episodes[number].class_id for number in seen])
                names = {c: config.data.classes[c - 1] for c in np.unique(class_ids).tolist()}
                bar.set_postfix(mIoU=f"{100 * scores(table, class_ids, names).miou:.1f}", refresh=False)

    for steps in run_rounds():
        done += steps
        if bar is not None:
            bar.update(len(episodes) * done // work - bar.n)
        if stop is not None and stop.requested is not None:
            break
    if stop is not None:
        stop.check(hardware.device)
    if processes() > 1:
        for count in counts.values():
            dist.all_reduce(count)
    return {name: count.cpu().numpy() for name, count in counts.items()}


def encode(model: NTRENet, batch: ImageBatch, part: Round, hardware: Hardware) -> dict[int, Encoded]:
    """Read images as what they serve in this round; an image that is query and support goes through stage 3 once."""
    images = batch.images.to(hardware.device, non_blocking=True)
    masks = batch.masks.to(hardware.device, non_blocking=True)
    with hardware.autocast():
        features = model.backbone(normalize(images))
        queries, supports = (
            [n for n, place in enumerate(batch.places) if role in part.images[place]] for role in ("query", "support")
        )
        query_of: dict[int, QueryEncoding] = {}
        if queries:
            query = model.read_query(Features(*(feature[queries] for feature in features)))
            query_of = {
                n: QueryEncoding(*(part[None] for part in parts)) for n, *parts in zip(queries, *query, strict=True)
            }
        support_of: dict[int, SupportEncoding] = {}
        if supports:
            support, _ = model.read_supports(Features(*(feature[supports] for feature in features)), masks[supports])
            row = torch.arange(1, support.high.shape[2] + 1, device=images.device)
            last = ((support.high != 0).any(3) * row).amax((1, 2)).tolist()  # what follows is the batch's padding
            support_of = {
                n: SupportEncoding(prototype[None], high[None, :, : rows + 1].clone(), base[None])
                for n, rows, prototype, high, base in zip(supports, last, *support, strict=True)
            }
    return {
        place: Encoded(truth.to(hardware.device, non_blocking=True), query_of.get(n), support_of.get(n))
        for n, (place, truth) in enumerate(zip(batch.places, batch.truths, strict=True))
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
    others = sum(part.numel() * part.element_size() for part in (query.feature, query.base))
    return EncodingSize(query=high + others, whole=high)
