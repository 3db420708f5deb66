"""Config to model, loss, loaders: the only file that knows both the configuration and the network."""

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from model.backbone import build_backbone
from model.losses import NTRELoss
from model.ntrenet import NTRENet, build_ntrenet
from model.parallel import processes, rank
from model.prototype_bank import PrototypeBank
from model.weights import WeightsInfo
from util.config import Config
from util.data.class_index import ClassIndex, load_class_index
from util.data.dataset import Episode, EpisodeDataset, ImageBatch, ImageDataset, collate, collate_images
from util.data.episodes import Episodes, EpisodeSampler
from util.data.folds import base_classes, novel_classes
from util.data.loading import LOOK, fits_shared_memory, start_worker
from util.data.readers import reader_of
from util.data.transforms import augment, fit
from util.engine.rounds import Round, batched
from util.errors import UserError

B = TypeVar("B")
PRECISION = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Hardware(NamedTuple):
    """What a run computes on, and how."""

    device: torch.device
    precision: torch.dtype

    def autocast(self) -> torch.autocast:
        """The precision, for a ``with`` statement."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)


def select_hardware(config: Config) -> Hardware:
    """What a config asks for; see :func:`find_hardware`."""
    return find_hardware(config.device, config.precision)


def find_hardware(device: str, precision: str) -> Hardware:
    """Device 'auto' is CUDA if there is one, else the CPU; precision 'auto' bfloat16 where it is native, else float32.

    On CUDA float32 is rounded to TF32 in convolutions and products only where the precision is 'tf32', and cuDNN tries
    its algorithms for each size once: the sizes of inputs are few.

    Raises:
        UserError: what is asked for is not there, or is no device or precision.
    """
    for key, value, known in (
        ("device", device, ("auto", "cpu", "cuda")),
        ("precision", precision, ("auto", *PRECISION)),
    ):
        if value not in known:
            raise UserError(f"{key} must be one of {', '.join(known)}, got {value!r}")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("device=cuda, but torch sees no CUDA device; set device=cpu or install a CUDA build of torch")
    place = torch.device("cuda", torch.cuda.current_device()) if available and device != "cpu" else torch.device("cpu")
    if place.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if place.type == "cuda" else _cpu_has_bf16()
        return Hardware(place, torch.bfloat16 if native else torch.float32)
    if precision in ("fp16", "tf32") and place.type == "cpu":
        raise UserError(f"precision={precision} needs CUDA; set precision=bf16 or fp32")
    return Hardware(place, PRECISION[precision])


def _cpu_has_bf16() -> bool:
    """Without these instructions bf16 convolutions are many times slower than fp32."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and bool(re.search(r"\b(amx_bf16|avx512_bf16)\b", flags.read_text(encoding="utf-8")))


def build_model(
    config: Config, weights: str | None = None, deep_stem: bool = False, *, fold: bool = True
) -> tuple[NTRENet, WeightsInfo]:
    """The network of a config.

    Args:
        weights: instead of the config's; 'random' where a checkpoint fills them in.
        deep_stem: stem of a ResNet with random weights.
        fold: the backbone's batch norms into its convolutions; not where published names are still to be loaded.
    """
    backbone, info = build_backbone(config.model.backbone, weights=weights or config.model.weights, deep_stem=deep_stem)
    if fold:
        backbone.fold_batch_norm()
    model = build_ntrenet(
        backbone,
        base_classes=len(base_classes(config.data)) if config.model.base_learner else 0,
        **config.model.model_dump(exclude={"backbone", "weights", "base_learner"}),
    )
    return model.to(memory_format=torch.channels_last), info  # type: ignore[call-overload]


def build_saved_model(config: Config, checkpoint: dict[str, Any], path: Path) -> NTRENet:
    """The network of a config with a checkpoint's weights.

    Raises:
        UserError: they do not fit; ``path`` is named.
    """
    model, _ = build_model(config, "random", deep_stem=checkpoint["weights"]["stem"] == "deep")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"checkpoint {path} does not fit its own config: {reason}") from error
    return model


def prepare_precision(model: NTRENet, hardware: Hardware) -> None:
    """Have the frozen backbone make its weights in the precision of ``hardware``; its first batch does so otherwise."""
    with hardware.autocast():
        model.backbone(torch.zeros(1, 3, 65, 65, device=hardware.device))


def build_loss(config: Config) -> NTRELoss:
    """Build the loss with its terms' weights, and the bank of the fold's base classes."""
    options = config.loss
    bank = PrototypeBank(
        class_ids=base_classes(config.data),
        channels=config.model.channels,
        capacity=options.bank_size,
        keep_empty=options.pcl_regions == "ground_truth",
    )
    return NTRELoss(
        bank=bank if options.pcl else None,
        weights=options.weights,
        alpha=options.alpha,
        bg_ignored=options.bg_ignored,
        pcl_negatives=options.pcl_negatives,
        pcl_regions=options.pcl_regions,
        pcl_drawn=options.pcl_drawn,
        pcl_temperature=options.pcl_temperature,
        base_ids=base_classes(config.data) if config.model.base_learner else (),
    )


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.SGD:
    """SGD over everything but the frozen backbone."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    options = config.train
    return torch.optim.SGD(
        trainable, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=True
    )


def build_index(config: Config, split: str) -> ClassIndex:
    """Class index of the 'train' or 'val' list."""
    path = config.data.train_list if split == "train" else config.data.val_list
    data = config.data
    return load_class_index(Path(path), Path(data.root), len(data.classes), make_item=reader_of(data))


def planes_of(config: Config) -> int:
    """Return how many planes an episode's picture has: red, green, blue, mask, and classes for a base learner."""
    return 5 if config.model.base_learner else 4


def black_batch(config: Config, episodes: int) -> Episode:
    """Make black pictures without targets, as a training batch holds them, to take a step that needs no data."""
    side = config.data.image_size
    pixels = torch.zeros(episodes, 1 + config.data.shots, planes_of(config), side, side, dtype=torch.uint8)
    return Episode(pixels, torch.full((episodes,), base_classes(config.data)[0]), [""] * episodes)


def build_train_sampler(config: Config, index: ClassIndex) -> EpisodeSampler:
    """Build the sampler of training episodes, which are about the fold's base classes."""
    data = config.data
    return EpisodeSampler(
        index,
        classes=base_classes(data),
        avoid=novel_classes(data) if data.novel_in_train == "drop" else (),
        shots=data.shots,
        min_area=data.min_area,
        seed=config.seed,
        class_names=data.classes,
    )


def build_eval_sampler(
    config: Config, index: ClassIndex, seed: int, classes: tuple[int, ...] | None = None
) -> EpisodeSampler:
    """Evaluation episodes of the fold's novel classes, or of the ``classes`` given."""
    data = config.data
    return EpisodeSampler(
        index,
        classes=classes or novel_classes(data),
        shots=data.shots,
        min_area=data.min_area,
        seed=seed,
        class_names=data.classes,
    )


def build_train_loader(config: Config, sampler: EpisodeSampler, *, start: int, stop: int) -> DataLoader[Episode]:
    """Batches of steps ``start`` to ``stop``; step s holds the episodes s * batch_size and on.

    One loader, iterated once, serves all epochs, so that its workers start once. Of several processes, each gets a
    run of every batch, in the order of their ranks.

    Raises:
        UserError: the batch cannot be shared out evenly.
    """
    data, batch = config.data, config.train.batch_size
    if batch % processes():
        raise UserError(f"train.batch_size {batch} is shared by {processes()} processes; make it a multiple of that")
    share = batch // processes()
    scale = (data.scale[0], data.scale[1])
    transform = partial(_augment, size=data.image_size, scale=scale, rotation=data.rotation, blur=data.blur)
    dataset = EpisodeDataset(sampler, transform=transform, classes=config.model.base_learner)
    firsts = (step * batch + rank() * share for step in range(start, stop))  # no list: a run has millions of episodes
    batches = (list(range(first, first + share)) for first in firsts)
    return _loader(config, dataset, batches, collate, pictures=share * (1 + data.shots))


def build_image_loader(
    config: Config, index: ClassIndex, rounds: Sequence[Round], without: Collection[int] = ()
) -> DataLoader[ImageBatch]:
    """The images of an evaluation's rounds, one round after the other, without the batches of these numbers."""
    batches = [
        [(place, part.class_id) for place in places]
        for part in rounds
        for places in batched(list(part.images), config.eval.batch_size)
    ]
    wanted = [batch for number, batch in enumerate(batches) if number not in without]
    dataset = ImageDataset(index.items, config.data.image_size)
    return _loader(config, dataset, wanted, collate_images, pictures=config.eval.batch_size)


def build_eval_loader(config: Config, sampler: Episodes, numbers: Sequence[int]) -> DataLoader[Episode]:
    """Whole episodes by number, as an evaluation sees them."""
    transform = partial(_fit, size=config.data.image_size)
    dataset = EpisodeDataset(sampler, transform=transform)
    batches = [list(part) for part in batched(numbers, config.eval.batch_size)]
    pictures = config.eval.batch_size * (1 + config.data.shots)
    return _loader(config, dataset, batches, collate, pictures=pictures)


# the loader's transforms stand at module level so that workers can be started on every platform


def _augment(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float],
    rotation: float,
    blur: float,
) -> tuple[np.ndarray, np.ndarray]:
    return augment(image, mask, size, rng, scale, rotation, blur)


def _fit(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    return fit(image, mask, size)


def _loader(
    config: Config, dataset: Dataset[B], batches: Iterable[list[Any]], collate: Callable[..., B], pictures: int
) -> DataLoader[B]:
    """A loader of ``batches`` with at most ``pictures`` in each."""
    workers = min(config.workers, os.cpu_count() or 1)
    shared = fits_shared_memory(pictures * planes_of(config) * config.data.image_size**2, workers)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(collate, join=default_collate if shared else torch.stack),
        num_workers=workers,
        timeout=LOOK if workers else 0,
        worker_init_fn=partial(start_worker, shared=shared),
        pin_memory=torch.cuda.is_available() and config.device != "cpu",
        generator=torch.Generator(),  # the loader would otherwise draw from the global one, and shift dropout
    )
