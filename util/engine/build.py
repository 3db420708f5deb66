"""Config to model, loss and loaders: the only file that builds the network."""

import re
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from model.backbone import build_backbone
from model.losses import NTRELoss
from model.ntrenet import NTRENet, NTRENetOutput, build_ntrenet
from model.parallel import processes, rank
from model.prototype_bank import PrototypeBank
from model.weights import WeightsInfo
from util.config import WHICH_GPU, Config
from util.data.class_index import ClassIndex, load_class_index
from util.data.dataset import Episode, EpisodeDataset, collate
from util.data.episodes import Episodes, EpisodeSampler
from util.data.folds import base_classes, novel_classes
from util.data.loading import load
from util.data.published import is_benchmark, overlap
from util.data.readers import reader_of
from util.data.transforms import augment, fit, normalize, squash
from util.engine.distributed import first_process_first
from util.engine.feature_cache import FeatureCache
from util.errors import UserError

PRECISION = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Hardware(NamedTuple):
    """Device and precision of a run."""

    device: torch.device
    precision: torch.dtype

    def autocast(self) -> torch.autocast:
        """Return the context in which the network runs."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)


def select_hardware(config: Config) -> Hardware:
    """Return the hardware of a config, see :func:`find_hardware`, and set CUDA up for a command."""
    hardware = find_hardware(config.device, config.precision)
    if hardware.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the sizes of inputs are few
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
    return hardware


def find_hardware(device: str, precision: str) -> Hardware:
    """Choose device and precision; no setting of torch is changed.

    Device 'auto' is CUDA if there is one, else the CPU; precision 'auto' is bfloat16 if the device computes it
    natively, else float32.
    """
    names = {"device": ("auto", "cpu", "cuda"), "precision": ("auto", *PRECISION)}
    for (key, known), value in zip(names.items(), (device, precision), strict=True):
        if value not in known:
            hint = f"; {WHICH_GPU}" if key == "device" else ""
            raise UserError(f"{key} must be one of {', '.join(known)}, got {value!r}{hint}")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("device=cuda, but torch sees no CUDA device; set device=cpu or install a CUDA build of torch")
    place = torch.device("cuda", torch.cuda.current_device()) if available and device != "cpu" else torch.device("cpu")
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if place.type == "cuda" else _cpu_has_bf16()
        return Hardware(place, torch.bfloat16 if native else torch.float32)
    if precision in ("fp16", "tf32") and place.type == "cpu":
        raise UserError(f"precision={precision} needs CUDA; set precision=bf16 or fp32")
    return Hardware(place, PRECISION[precision])


def _cpu_has_bf16() -> bool:
    """Without these instructions bf16 convolutions are many times slower than fp32 ones."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and bool(re.search(r"\b(amx_bf16|avx512_bf16)\b", flags.read_text(encoding="utf-8")))


def build_model(
    config: Config, weights: str | None = None, deep_stem: bool = False, *, fuse: bool = True
) -> tuple[NTRENet, WeightsInfo]:
    """Build the network of a config.

    Args:
        weights: instead of the config's; 'random' if a checkpoint fills them in.
        deep_stem: stem of a ResNet with random weights.
        fuse: fuse the backbone's batch norms; not if published names are still to be loaded.
    """
    backbone, info = build_backbone(
        config.model.backbone, weights=weights or config.model.weights, deep_stem=deep_stem, fuse=fuse
    )
    try:
        backbone.check_image_size(config.data.image_size)
    except ValueError as error:
        raise UserError(f"data.image_size: {error}") from None
    model = build_ntrenet(
        backbone,
        base_classes=len(base_classes(config.data)) if config.model.base_learner else 0,
        **config.model.model_dump(exclude={"backbone", "weights", "base_learner", "two_class"}),
    )
    return model.to(memory_format=torch.channels_last), info  # type: ignore[call-overload]


def build_saved_model(config: Config, checkpoint: dict[str, Any], path: Path) -> NTRENet:
    """Build the network of a config with the weights of the checkpoint that was read from ``path``."""
    model, _ = build_model(config, "random", deep_stem=checkpoint["weights"]["stem"] == "deep")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"checkpoint {path} does not fit its own config: {reason}") from error
    return model


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
        weights=options.weights,
        bank=bank if options.pcl else None,
        alpha=options.alpha,
        bg_ignored=options.bg_ignored,
        pcl_negatives=options.pcl_negatives,
        pcl_regions=options.pcl_regions,
        pcl_drawn=options.pcl_drawn,
        base_ids=base_classes(config.data) if config.model.base_learner else (),
    )


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.SGD:
    """Build SGD over everything but the frozen backbone.

    With ``model.two_class`` the layers that give one logit, w, train as two classes do, w = w1 - w0: w moves by twice
    the gradient, at the same weight decay. Such a group of parameters has twice the learning rate and half the decay.
    """
    options = config.train
    logits = {p for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 1 for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    factor = 2 if config.model.two_class else 1
    groups = [
        {"params": [p for p in trainable if p not in logits], "factor": 1},
        {
            "params": [p for p in trainable if p in logits],
            "factor": factor,
            "weight_decay": options.weight_decay / factor,
        },
    ]
    optimizer = torch.optim.SGD(
        groups, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=True
    )
    for parameter in trainable:  # a fused step that GradScaler skips, as it does the first ones, leaves them undefined
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(config: Config, step: int, total: int) -> float:
    """Polynomial decay lr * (1 - step / total) ** power, after a linear rise over the first ``warmup`` steps."""
    options = config.train
    return options.lr * (1 - step / total) ** options.power * min(1.0, (step + 1) / max(options.warmup, 1))


def forward(model: Callable[..., NTRENetOutput], batch: Episode, hardware: Hardware) -> NTRENetOutput:
    """Run the model on a batch that is on its device."""
    with hardware.autocast():
        return model(normalize(batch.query), normalize(batch.supports), batch.support_masks)


def build_index(config: Config, split: str) -> ClassIndex:
    """Build the class index of the 'train' or 'val' list."""
    data = config.data
    path = data.train_list if split == "train" else data.val_list
    return load_class_index(Path(path), Path(data.root), len(data.classes), make_item=reader_of(data))


def build_train_sampler(config: Config, index: ClassIndex) -> EpisodeSampler:
    """Build the sampler of training episodes of the fold's base classes."""
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
    """Build the sampler of evaluation episodes of the fold's novel classes, or of the ``classes`` given."""
    data = config.data
    return EpisodeSampler(
        index,
        classes=classes or novel_classes(data),
        shots=data.shots,
        min_area=data.min_area,
        seed=seed,
        class_names=data.classes,
        queries=config.eval.queries,
    )


def training_batches(config: Config, sampler: EpisodeSampler, *, start: int, stop: int) -> Generator[Episode]:
    """Yield the batches of steps ``start`` to ``stop``; step s begins with episode s * batch_size.

    One loader, iterated once, serves all epochs, so that its workers start once. Each process of a job loads its part
    of every batch, in the order of ranks.
    """
    data, batch = config.data, config.train.batch_size
    if batch % processes():
        raise UserError(f"train.batch_size {batch} is shared by {processes()} processes; make it a multiple of that")
    share = batch // processes()
    scale = (data.scale[0], data.scale[1])
    transform = partial(_augment, size=data.image_size, scale=scale, rotation=data.rotation, blur=data.blur)
    firsts = (step * batch + rank() * share for step in range(start, stop))  # no list: a run has millions of episodes
    batches = (list(range(first, first + share)) for first in firsts)
    return _load(config, EpisodeDataset(sampler, transform=transform), batches, share)


def build_eval_loader(config: Config, sampler: Episodes, numbers: Sequence[int]) -> Generator[Episode]:
    """Load whole episodes by number, as an evaluation sees them."""
    size = config.eval.batch_size
    batches = (numbers[start : start + size] for start in range(0, len(numbers), size))
    dataset = EpisodeDataset(sampler, transform=partial(_fit, size=config.data.image_size, square=config.eval.square))
    return _load(config, dataset, batches, size)


def _augment(
    image: np.ndarray, ids: np.ndarray, target: int, rng: np.random.Generator, size: int, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    return augment(image, ids, target, size, rng, **options)


def _fit(
    image: np.ndarray, ids: np.ndarray, target: int, rng: np.random.Generator, size: int, square: int
) -> tuple[np.ndarray, np.ndarray]:
    return fit(*squash(image, ids, square), size)


def _load(config: Config, dataset: EpisodeDataset, batches: Any, episodes: int) -> Generator[Episode]:
    """Load ``batches`` of at most so many ``episodes`` each."""
    return load(
        dataset,
        config.workers,
        batch_bytes=episodes * (1 + config.data.shots) * 4 * config.data.image_size**2,
        batch_sampler=batches,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available() and config.device != "cpu",
    )


class Data(NamedTuple):
    """Data of a training run."""

    train: ClassIndex
    val: ClassIndex
    train_sampler: EpisodeSampler
    val_sampler: EpisodeSampler
    shared: str | None
    """images that are in both lists, as a sentence"""
    cache: FeatureCache
    """features that the validations share"""

    @property
    def list_sha256(self) -> dict[str, str]:
        """Return the hashes of both lists, by which a checkpoint knows them."""
        return {"train": self.train.list_sha256, "val": self.val.list_sha256}


def open_data(config: Config) -> Data:
    """Read the lists of a training run; those of a benchmark must have no image in common."""
    with first_process_first():
        train_index, val_index = build_index(config, "train"), build_index(config, "val")
    shared = overlap(train_index.items, val_index.items)
    if shared and is_benchmark(config.data.dataset):
        raise UserError(shared)
    val_sampler = build_eval_sampler(config, val_index, seed=0)  # the same for every run, so that runs compare
    cache = FeatureCache(config.eval.cache_gib)
    return Data(train_index, val_index, build_train_sampler(config, train_index), val_sampler, shared, cache)
