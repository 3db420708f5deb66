"""Evaluation: one loop for every method, in which images that episodes share are read and encoded once.

Images are resized the same way every time and the backbone is frozen, so features are cached. Episodes are sorted by
class and query, so that images come together; results are in the order of the episodes.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from model.backbone import Features
from model.ntrenet import NTRENet, NTRENetOutput
from model.ops import resize
from model.parallel import processes, rank
from util.config import Config
from util.data.class_index import ClassIndex
from util.data.dataset import read_image_and_ids, target_of
from util.data.episodes import EpisodeFiles
from util.data.loading import load
from util.data.transforms import fit, normalize, squash, to_original
from util.engine.build import Hardware
from util.engine.feature_cache import FeatureCache, Key, Step
from util.engine.interruption import Interruption
from util.engine.metrics import confusion, scores

Measure = Callable[[Tensor, Tensor, int], Tensor]
"""(score map (H, W), class ids (H, W), the target's id) -> the measure of an episode, always of one shape"""
IMAGE, QUERY = "image", "query"
"""kinds of cached entries; a class id is the third"""


class Method(ABC):
    """Something that segments queries by supports. An entry is anything that the method keeps of an image.

    The entry of (line, IMAGE) is made of the loaded image and has an attribute ``ids``, its mask (H, W) of class ids.
    Other entries of the same line are derived from it.
    """

    owner: tuple[object, ...]
    """everything that entries depend on"""
    read: Callable[[np.ndarray, np.ndarray], Any]
    """prepares an image (H, W, 3) and its mask (H, W) in a loader process, which may be spawned and gets this alone"""

    @abstractmethod
    def keys(self, episode: EpisodeFiles, value: int) -> list[Key]:
        """Return the keys of all entries that an episode needs; ``value`` is its class in the masks."""

    @abstractmethod
    def nbytes(self, key: Key) -> int:
        """Return the memory of an entry."""

    @abstractmethod
    def encode(self, missing: Sequence[Key], samples: Mapping[int, Any], held: Mapping[Key, Any]) -> dict[Key, Any]:
        """Compute entries; ``samples`` has what ``read`` returned for the line of every missing (line, IMAGE)."""

    @abstractmethod
    def predict(
        self, episodes: Sequence[EpisodeFiles], values: Sequence[int], held: Mapping[Key, Any]
    ) -> dict[str, list[Tensor]]:
        """Return score maps (H, W) at each query's own size, by name; above 0 is target."""


Predictor = Callable[[NTRENetOutput], Tensor]
"""the network's output -> logits (B, 1, S, S)"""
NETWORK: dict[str, Predictor] = {"network": lambda output: output.logits}
BASELINES: dict[str, Predictor] = {
    "all_foreground": lambda output: torch.ones_like(output.logits),
    "prior": lambda output: resize(output.prior - 0.5, (output.logits.shape[-2], output.logits.shape[-1])),
}
"""predictions that need no training: everything is target; the prior mask at 0.5"""


class Encoded(NamedTuple):
    """The network's entry of an image."""

    middle: Tensor
    """(1, Cm, h, w), with the channels that only ``high`` reads"""
    fitted: Tensor
    """class ids at the network's input size, (1, S, S)"""
    ids: Tensor
    """class ids at the image's own size, (H, W)"""


class NetworkMethod(Method):
    """The network, with any number of predictions from its output."""

    def __init__(
        self, model: NTRENet, config: Config, hardware: Hardware, predictors: Mapping[str, Predictor] = NETWORK
    ) -> None:
        self.model, self.hardware, self.predictors = model.eval(), hardware, predictors
        self.size, self.geometry = config.data.image_size, config.eval.geometry
        self.owner = (model.backbone, self.size, hardware.precision)
        self.read = partial(_fit, size=self.size)

    def keys(self, episode: EpisodeFiles, value: int) -> list[Key]:
        """Query and supports; the high features of a support depend on its target."""
        supports = [(line, part) for line in episode.supports for part in (IMAGE, value)]
        return [(episode.query, IMAGE), (episode.query, QUERY), *supports]

    def nbytes(self, key: Key) -> int:
        """Bytes of the middle features and two masks, or of the high features."""
        backbone = self.model.backbone
        positions = backbone.map_side(self.size) ** 2 * self.hardware.precision.itemsize
        if key[1] == IMAGE:
            return positions * (backbone.middle_channels + backbone.carried_channels) + 2 * self.size**2
        return positions * backbone.high_channels

    def encode(self, missing: Sequence[Key], samples: Mapping[int, Any], held: Mapping[Key, Any]) -> dict[Key, Any]:
        """Run the backbone on new images, and to its end on those that serve as queries and supports."""
        device, backbone = self.hardware.device, self.model.backbone
        new: dict[Key, Any] = {}
        with self.hardware.autocast():
            if lines := [line for line, part in missing if part == IMAGE]:
                images, fitted, ids = zip(*(map(torch.from_numpy, samples[line]) for line in lines), strict=True)
                pixels = torch.stack(images).to(device).permute(0, 3, 1, 2)
                middles, masks = backbone.middle(normalize(pixels)), torch.stack(fitted).to(device)
                for n, line in enumerate(lines):
                    one = slice(n, n + 1)  # cloned, so that an entry does not keep its whole batch in memory
                    new[line, IMAGE] = Encoded(middles[one].clone(), masks[one].clone(), ids[n].to(device))
            for part in dict.fromkeys(part for _, part in missing if part != IMAGE):
                lines = [line for line, other in missing if other == part]
                whole = [new.get((line, IMAGE)) or held[line, IMAGE] for line in lines]
                masks = None if isinstance(part, str) else target_of(torch.cat([entry.fitted for entry in whole]), part)
                high = backbone.high(torch.cat([entry.middle for entry in whole]), masks)
                new.update(((line, part), high[n : n + 1].clone()) for n, line in enumerate(lines))
        return new

    def predict(
        self, episodes: Sequence[EpisodeFiles], values: Sequence[int], held: Mapping[Key, Any]
    ) -> dict[str, list[Tensor]]:
        """Run the head on episodes of one number of shots as one batch."""
        pairs = [(line, value) for e, value in zip(episodes, values, strict=True) for line in e.supports]
        shots, for_head = (len(episodes), len(pairs) // len(episodes)), self.model.backbone.for_head
        query = Features(
            for_head(torch.cat([held[e.query, IMAGE].middle for e in episodes])),
            torch.cat([held[e.query, QUERY] for e in episodes]),
        )
        supports = Features(
            for_head(torch.cat([held[line, IMAGE].middle for line, _ in pairs])).unflatten(0, shots),
            torch.cat([held[pair] for pair in pairs]).unflatten(0, shots),
        )
        masks = torch.cat([target_of(held[line, IMAGE].fitted, value) for line, value in pairs]).unflatten(0, shots)
        with self.hardware.autocast():
            output = self.model.head(query, supports, masks)
        sizes = [held[e.query, IMAGE].ids.shape for e in episodes]
        return {
            name: [
                to_original(logits, size[0], size[1], self.geometry)[0]
                for logits, size in zip(predict(output).float(), sizes, strict=True)
            ]
            for name, predict in self.predictors.items()
        }


def _fit(image: np.ndarray, ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit an image and its mask to the network's input."""
    return *fit(image, ids, size), ids.copy()  # writable


def confusion_of(score: Tensor, ids: Tensor, value: int) -> Tensor:
    """Count the pixels of a prediction, (4,), see :func:`util.engine.metrics.confusion`."""
    return confusion(score > 0, target_of(ids, value))


@torch.inference_mode()
def evaluate(
    method: Method,
    index: ClassIndex,
    episodes: Sequence[EpisodeFiles],
    *,
    config: Config,
    cache: FeatureCache | None = None,
    bar: tqdm | None = None,
    stop: Interruption | None = None,
    measure: Measure = confusion_of,
    alone: bool = False,
) -> dict[str, np.ndarray]:
    """Measure a method's predictions on episodes, each at its query's original size; several processes share them.

    With ``eval.square`` every image and mask is squashed when it is read, and that is its original size.

    Args:
        cache: from an evaluation before this one, of the same list.
        stop: looked at between two batches; raises Stopped.
        alone: this process evaluates all episodes.
    Returns:
        (N, ...) of ``measure`` for each name of ``method.predict``, in the order of ``episodes``
    """
    cache = FeatureCache(config.eval.cache_gib, keep=False) if cache is None else cache
    batches = batches_in_order(episodes, config.eval.batch_size, alone)
    values = [index.items[episode.query].value_of(episode.class_id) for episode in episodes]
    requests = [[key for n in batch for key in method.keys(episodes[n], values[n])] for batch in batches]
    steps = cache.plan(requests, method.nbytes, (*method.owner, index.list_sha256))
    loaded = load_images(method, index, steps, config)
    rows: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for turn, (batch, step) in enumerate(zip(batches, steps, strict=True)):
        samples = next(loaded) if any(part == IMAGE for _, part in step.missing) else {}
        cache.entries.update(method.encode(step.missing, samples, cache.entries))
        scored = method.predict([episodes[n] for n in batch], [values[n] for n in batch], cache.entries)
        for name, maps in scored.items():
            for n, score in zip(batch, maps, strict=True):
                rows[name][n] = measure(score, cache.entries[episodes[n].query, IMAGE].ids, values[n])
        for key in step.evicted:
            del cache.entries[key]
        if bar is not None:
            bar.update(len(batch))
            if measure is confusion_of and turn % 20 == 0:
                show_miou(bar, next(iter(rows.values())), episodes)
        if stop is not None and stop.requested:
            break
    loaded.close()
    if stop is not None:
        stop.check(alone=alone)
    return {name: ordered(of_name, len(episodes), alone) for name, of_name in rows.items()}


def batches_in_order(episodes: Sequence[EpisodeFiles], size: int, alone: bool) -> list[list[int]]:
    """Return this process's share of the episodes in batches, sorted so that images come together."""
    order = sorted(range(len(episodes)), key=lambda n: (episodes[n].class_id, episodes[n].query))
    share = order if alone else np.array_split(np.array(order), processes())[rank()].tolist()
    return [share[start : start + size] for start in range(0, len(share), size)]


class ImageDataset(Dataset[dict[int, Any]]):
    """Item n holds the samples of the images that step n of a plan is missing, by line."""

    def __init__(
        self, read: Callable[[np.ndarray, np.ndarray], Any], index: ClassIndex, steps: Sequence[list[int]], square: int
    ) -> None:
        self.read, self.index, self.steps, self.square = read, index, steps, square

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> dict[int, Any]:
        return {
            line: self.read(*squash(*read_image_and_ids(self.index, line), self.square)) for line in self.steps[index]
        }


def load_images(method: Method, index: ClassIndex, steps: Sequence[Step], config: Config) -> Generator[dict[int, Any]]:
    """Yield the samples of every step that misses images, in order."""
    missing = [[line for line, part in step.missing if part == IMAGE] for step in steps]
    dataset = ImageDataset(method.read, index, [lines for lines in missing if lines], config.eval.square)
    workers = config.workers if len(dataset) else 0
    # dict collates as it is: numpy arrays are sent by value, so nothing is kept in shared memory
    return load(dataset, workers, batch_size=None, collate_fn=dict)


def show_miou(bar: tqdm, rows: Mapping[int, Tensor], episodes: Sequence[EpisodeFiles]) -> None:
    """Show the mIoU of the episodes so far, over the classes that occur in them."""
    class_ids = np.array([episodes[n].class_id for n in rows])
    counts = torch.stack(list(rows.values())).cpu().numpy()
    miou = scores(counts, class_ids, {c: str(c) for c in np.unique(class_ids).tolist()}).miou
    bar.set_postfix(mIoU=f"{100 * miou:.1f}", refresh=False)


def ordered(rows: Mapping[int, Tensor], count: int, alone: bool) -> np.ndarray:
    """Collect the rows of all processes, in the order of the episodes: (count, ...)."""
    found = dict(zip(rows, torch.stack(list(rows.values())).cpu().numpy(), strict=True))
    if processes() > 1 and not alone:
        parts: list[Any] = [None] * processes()
        dist.all_gather_object(parts, found)
        found = {n: row for part in parts for n, row in part.items()}
    return np.stack([found[n] for n in range(count)])
