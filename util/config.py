"""Typed, strict configuration: a YAML file with at most one ``base:``, files that vary it, ``key=value`` overrides.

The value written is the value used. Unknown keys, duplicate keys, wrong types and values out of range are errors that
name the file, the key and the remedy. Every key is documented where it is declared, with its default.
"""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from model.backbones import require_known
from util.errors import UserError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

WHICH_GPU = "CUDA_VISIBLE_DEVICES=1 before the command chooses one of several GPUs; a Mac computes on its CPU"


def _names_of(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return [line.strip() for line in Path(value).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"the file of names {value} cannot be read ({error}); make_lists.py writes it") from error


Names = Annotated[list[str], Field(min_length=1), BeforeValidator(_names_of)]
"""names, or the path of a file of one name a line, which the config then holds"""


class Kind(Enum):
    """Which configs must agree on a key. A key without a tag has the kind of its section, by default RUN."""

    TASK = "a checkpoint can only be tested or resumed with the value it was trained with"
    RUN = "a run can only be resumed with the same value; a test may have another"
    MACHINE = "changes no figure, so it may change when a run is resumed"


TASK, RUN, MACHINE = Kind


class Section(BaseModel):
    """A part of the config: strict about types, and closed to unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class DataConfig(Section):
    """Which data, which classes are novel, and how an image reaches the network."""

    dataset: Annotated[str, TASK]
    """name in tables and results"""
    root: Annotated[str, MACHINE]
    """folder to which the paths in the lists are relative"""
    train_list: Annotated[str, MACHINE]
    """file of 'image mask' lines; the base classes are trained on it"""
    val_list: Annotated[str, MACHINE]
    """file of 'image mask' lines; the novel classes are evaluated on it"""
    reader: str = "class_ids"
    """how masks are read: 'class_ids', 'class_folders', 'deepglobe' or 'one_class', see util/data/readers.py"""
    classes: Annotated[Names, TASK]
    """names of the classes, or a file of them; their mask values are 1, 2, ... in this order (0 background, 255
    ignored), at most 254 if masks hold class ids"""
    fold_scheme: Annotated[Literal["contiguous", "interleaved"], TASK] = "contiguous"
    """novel classes of fold i of 4: neighbours (PASCAL-5i), or every fourth (COCO-20i)"""
    folds: Annotated[list[Names] | None, TASK] = None
    """class names of each fold, or a file of them for each, instead of a scheme; all in one is only tested"""
    base_classes: Annotated[Names | None, TASK] = None
    """class names that every fold trains on, or a file of them, if classes are split into training, validation and test
    (FSS-1000); the folds are then the splits to evaluate on. By default a fold trains on all classes but its own"""
    left_out: Annotated[list[str], TASK] = []
    """class names that no fold trains on or evaluates, such as those with too few images; they count as background"""
    fold: Annotated[int, Field(ge=0), TASK] = 0
    shots: Count = 1
    """supports of an episode"""
    min_area: Count = 2048
    """pixels of a class that make an image a possible support for it, and part of the class's fold"""
    novel_in_train: Annotated[Literal["keep", "drop"], TASK] = "keep"
    """training images that also show novel classes: keep them, with those pixels as background, or drop them"""
    image_size: Annotated[int, Field(ge=16), TASK] = 473
    """side of the network's square input; the backbone says which sides it takes (the CNNs: 8n + 1)"""
    scale: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [0.9, 1.1]
    """random scaling in training, from and to"""
    rotation: Annotated[float, Field(ge=0, le=180)] = 10.0
    """random rotation in training, degrees either way, in half of the images"""
    blur: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of the training images that are blurred, with a 5x5 Gaussian (the authors' code: 0.5)"""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.scale[0] > self.scale[1]:
            raise ValueError("scale must be [from, to] with from <= to")
        most = 254 if self.reader == "class_ids" else 10**6
        if len(set(self.classes)) != len(self.classes) or not 1 <= len(self.classes) <= most:
            raise ValueError(f"classes must be 1 to {most} different names")
        named = [("left_out", self.left_out), ("base_classes", self.base_classes or [])]
        for key, names in [*(("folds", fold) for fold in self.folds or []), *named]:
            if foreign := [name for name in names if name not in self.classes]:
                raise ValueError(f"{key} names '{foreign[0]}', which is not among classes")
        if any(len(set(fold)) < len(fold) for fold in self.folds or []):
            raise ValueError("a fold must not hold a class twice")
        if self.folds is None and len(self.classes) % 4:
            raise ValueError(f"{len(self.classes)} classes do not make 4 equal folds; list them under data.folds")
        if self.fold >= self.num_folds:
            raise ValueError(f"fold must be 0 to {self.num_folds - 1}")
        return self

    @property
    def num_folds(self) -> int:
        """Folds the classes are divided into."""
        return len(self.folds) if self.folds is not None else 4


class ModelConfig(Section):
    """The network. The defaults are NTRENet as its authors' code has it; every departure is another network in reports.

    configs/ablation/printed.yaml is the paper's equations to the letter, ours.yaml our variant.
    """

    backbone: Annotated[str, AfterValidator(require_known)] = "resnet50"
    """a name of model/backbones/, or 'timm:NAME' for any of timm's (pip install timm)"""
    weights: Annotated[str, RUN] = "imagenet"
    """'imagenet' (fetched by name), a file such as initmodel/resnet50_v2.pth, or 'random'"""
    bgem: bool = True
    """mine and eliminate the background (eq. 1-4); with everything off the model is PFENet"""
    doem: bool = True
    """match, mine and eliminate distracting objects (eq. 5-9); needs bgem"""
    elimination: Literal["authors", "single"] = "authors"
    """eq. 4-8 at each of FEM's scales, with a deeper BGMM and FM (the authors' code), or once (the paper's figure 3)"""
    do_average: Literal["image", "region"] = "image"
    """P_DO is the mean of X^q * Y_DO over the image (the authors' code), or over Y_DO alone (eq. 8 as printed)"""
    fem_prior: bool = False
    """ours: FEM takes C_p in addition to P_DO"""
    do_similarity: bool = False
    """ours: S_DO, the cosine similarity of each position with P_DO, is subtracted from that C_p; needs fem_prior"""
    detach_initial: bool = False
    """ours: y_ini's loss does not shape X_act, which would learn base classes and not help FEM on novel ones"""
    relative_target: bool = False
    """ours: for Y_DO, y_ini is cut at 0.3 of its largest value in the image, so that a small target is left out"""
    training_free: bool = False
    """ours: in evaluation, half the training-free score of the middle features is added to FEM's logits"""
    base_learner: bool = False
    """beyond the paper: learn to tell base classes apart, and with it novel ones (model/base_learner.py); needs doem"""
    channels: Count = 256
    """C, the channels of X^q and X^s and of all that follows; fewer train faster, 64 on a CPU"""
    prototype_channels: Count = 256
    """D of the background prototype: 256 in the authors' code, 640 in the paper (Fig. 6)"""
    fem_scales: Annotated[list[Positive], Field(min_length=1)] = [60, 30, 15, 8]
    """FEM's scales, fine to coarse: sides above 1, or shares of the feature's side up to 1"""
    two_class: Annotated[bool, RUN] = True
    """each prediction's last layer trains as the difference of two classes does (PFENet's and the authors' code), which
    is twice as fast as one logit (eq. 12 is of one map)"""
    initialisation: Annotated[Literal["he", "torch"], RUN] = "he"
    """how the head starts: He's, with middle features scaled to a mean square of 1 on the first batch, or torch's
    default without scaling (the authors' code), from which hundreds of steps go by before anything is learned"""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.doem and not self.bgem:
            raise ValueError("doem needs bgem; set model.bgem=true or model.doem=false")
        if self.do_similarity and not self.fem_prior:
            raise ValueError("do_similarity needs fem_prior; set model.do_similarity=false")
        if self.base_learner and not self.doem:
            raise ValueError("base_learner needs doem; set model.base_learner=false")
        return self


class LossWeights(Section):
    """Weight of each term of the loss, by the names in model/losses.py; 0 switches a term off."""

    final: NonNegative = 1.0
    """the final prediction against the mask (eq. 12; beta in eq. 11)"""
    initial: NonNegative = 0.6
    """y_ini against the mask (the authors' code; 1 in eq. 12)"""
    fem_aux: NonNegative = 0.4
    """FEM's per-scale predictions against the mask (the authors' code; the paper does not give a weight)"""
    bg: NonNegative = 1.0
    """L_BG (eq. 3; lambda in eq. 11)"""
    pcl: NonNegative = 0.01
    """L_PCL (eq. 10; gamma in eq. 11, its value from the authors' code); needs model.doem"""
    base: NonNegative = 3.0
    """the base learner's cross-entropy; without model.base_learner there is none"""
    dice: NonNegative = 0.0
    """beyond the paper: Dice loss of the final prediction, for small targets, which eq. 12 leaves below 0.5"""


class LossConfig(LossWeights):
    """The loss (eq. 11) and its prototype bank."""

    alpha: NonNegative = 0.5
    """weight of the second term of L_BG (eq. 3)"""
    bg_ignored: bool = True
    """ignored pixels count in the second term of L_BG, as in the authors' code"""
    pcl_negatives: Literal["do", "bg", "non_target"] = "do"
    """prototypes that the bank stores (Table 4)"""
    pcl_regions: Literal["ground_truth", "predicted"] = "ground_truth"
    """where a query's target is when its distracting objects are stored: its mask (the authors' code), or y_ini (the
    paper, eq. 7)"""
    pcl_drawn: Annotated[int, Field(ge=0)] = 1000
    """prototypes of the bank, drawn at random, that eq. 10 sums over (the authors' code); 0 for all (the paper)"""
    bank_size: Count = 2000
    """prototypes kept of each class"""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term, by name."""
        return {name: getattr(self, name) for name in LossWeights.model_fields}


class TrainConfig(Section):
    """The schedule of the optimiser, SGD."""

    epochs: Count = 200
    """passes over the training images, if ``steps`` is 0"""
    steps: Annotated[int, Field(ge=0)] = 0
    """steps of the run, whose last epoch may end early; of ``epochs`` and ``steps``, the one given last counts"""
    batch_size: Count = 32
    """episodes of a step, over all processes"""
    lr: Positive = 0.03
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 1e-4
    power: NonNegative = 0.9
    """exponent of the polynomial decay of the learning rate, which is set at each step"""
    warmup: Annotated[int, Field(ge=0)] = 100
    """steps over which the learning rate rises to lr; 0 for none"""
    checkpoint_minutes: Annotated[NonNegative, MACHINE] = 10.0
    """longest time between checkpoints; one is also written at the end of each epoch"""
    compile: Annotated[bool, MACHINE] = False
    """compile the training step with torch.compile; worth its minutes for long runs on a GPU"""

    def schedule(self, images: int) -> tuple[int, int, int]:
        """Return the steps of an epoch over so many images, the epochs of a run, and its steps."""
        of_epoch = max(1, images // self.batch_size)
        steps = self.steps or of_epoch * self.epochs
        return of_epoch, math.ceil(steps / of_epoch), steps


class EvalConfig(Section):
    """How a checkpoint is evaluated, in training and by test.py."""

    episodes: Count = 1000
    batch_size: Annotated[Count, MACHINE] = 1
    """images encoded, and episodes segmented, at a time"""
    cache_gib: Annotated[Positive, MACHINE] = 4.0
    """memory for backbone features of images that episodes share; kept from one validation to the next"""
    queries: Literal["image", "pair", "class"] = "image"
    """what takes turns: images (the class is drawn), pairs of image and class, or classes (the image is drawn)"""
    square: Annotated[int, Field(ge=0)] = 0
    """side to which images and masks are squashed before anything else; 0: they keep their sizes"""
    geometry: Literal["lineage", "exact"] = "exact"
    """how logits return to the original size: as in PFENet's code ('lineage', 3 px off at 500x375), or exactly"""
    every: Annotated[Count, MACHINE] = 1
    """epochs between evaluations in training; the end of the run is always evaluated"""
    select: Literal["miou", "last"] = "miou"
    """the checkpoint that becomes best.pt: the one with the highest novel-fold mIoU at 0.5, as in the authors' code (of
    equals the later one), or the last"""


class Config(Section):
    """All settings of a command, from YAML or given as ``key=value``."""

    data: DataConfig
    model: Annotated[ModelConfig, TASK] = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """seed of weights, dropout, training episodes and augmentation"""
    run_dir: Annotated[str, MACHINE] = ""
    """folder for everything a run writes; by default runs/, the config's own path, its variants and a seed other than
    0"""
    resume: Annotated[str, MACHINE] = "none"
    """'none', 'auto' (from run_dir's last.pt if there is one), or a checkpoint's path"""
    device: Annotated[Literal["auto", "cpu", "cuda"], MACHINE] = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """number format of the forward and backward pass; auto is bf16 if the device computes it natively, else fp32. tf32
    is float32 that CUDA rounds in convolutions and matrix products; fp32 is never rounded"""
    workers: Annotated[int, Field(ge=0), MACHINE] = 4
    """loader processes, at most one a core; the results do not depend on it"""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.loss.pcl and not self.model.doem:
            raise ValueError("loss.pcl needs model.doem; set loss.pcl=0")
        if self.model.base_learner and len(self.data.classes) > 254:
            raise ValueError("model.base_learner takes at most 254 classes; set model.base_learner=false")
        return self


def load_config(paths: Path | Sequence[Path], overrides: Sequence[str] = ()) -> Config:
    """Read a config file, its base, files that vary it (configs/ablation/*.yaml), and ``key=value`` overrides.

    Raises:
        UserError: naming the file (or the command line), the key and the remedy.
    """
    path, *variants = [paths] if isinstance(paths, Path) else paths
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    layers = [layer for file in (path, *variants) for layer in _layers(file)]
    for source, layer in [*layers, *map(_override, overrides)]:
        _merge(values, layer, source, origin)
        origin[""] = source  # keys that contradict each other: the last source is to blame
    config = config_from_dict(values, str(path), origin)
    if config.run_dir:
        return config
    of_seed = [f"seed{config.seed}"] if config.seed else []
    name = "_".join([path.stem, *(variant.stem for variant in variants), *of_seed])
    return config.model_copy(update={"run_dir": str(Path("runs") / path.resolve().parent.name / name)})


def _layers(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the values of a file's base, if it has one, and of the file."""
    values = read_yaml(path)
    if (base := values.pop("base", None)) is not None:
        yield from _layers(path.parent / str(base))
    yield str(path), values


def _override(text: str) -> tuple[str, dict[str, Any]]:
    key, equals, written = text.partition("=")
    if not equals:
        raise UserError(f"command line: '{text}' is not key=value, such as train.lr=0.01")
    try:
        value = yaml.load(written, _Loader)  # noqa: S506 (a subclass of SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"command line: {key}: cannot read the value '{written:.100}'") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return "command line", value


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, the same for every command."""
    what = "a fold's config, and any files that vary it, such as configs/ablation/pfenet.yaml"
    parser.add_argument("--config", type=Path, nargs="+", required=True, metavar="YAML", help=what)


def parse_arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Return the command line's options, and its ``key=value`` overrides, which may be anywhere among them."""
    parser.usage = f"%(prog)s {parser.format_usage().split(maxsplit=2)[2].strip()} [key=value ...]"
    overrides = [word for word in sys.argv[1:] if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
    args, others = parser.parse_known_args([word for word in sys.argv[1:] if word not in overrides])
    if options := [word for word in others if word.startswith("-")]:
        parser.error(f"unknown option {options[0]}")
    return args, overrides + others


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys, and reads 1e-4 as a number (YAML 1.1 wants 1.0e-4)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Raises:
        UserError: it cannot be read, is no valid YAML, or holds something else.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a subclass of SafeLoader)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1, 0.5)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"config {path} does not exist{hint}") from error
    except yaml.MarkedYAMLError as error:
        place = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {error.problem}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date such as 2024-13-01
        raise UserError(f"config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold keys and values, such as 'data:' with 'fold: 0' under it")
    return values


def _merge(into: dict[str, Any], new: dict[str, Any], source: str, origin: dict[str, str], prefix: str = "") -> None:
    """Put the values of a source into ``into``, and note in ``origin`` which source each key comes from."""
    for key, value in new.items():
        origin[f"{prefix}{key}"] = source
        if f"{prefix}{key}" == "train.epochs":
            into.pop("steps", None)  # of the two ways to say how long a run is, the one that is given last counts
        if isinstance(value, dict):
            section = into.get(key)
            into[key] = section if isinstance(section, dict) else {}
            _merge(into[key], value, source, origin, f"{prefix}{key}.")
        else:
            into[key] = os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111 (~/x in YAML)


def config_from_dict(values: dict[str, Any], file: str, origin: Mapping[str, str] | None = None) -> Config:
    """Validate a whole config; an error names the key and its source in ``origin``, by default ``file``."""
    try:
        return Config.model_validate(values)
    except ValidationError as validation:
        error = validation.errors()[0]
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "missing":
        raise UserError(f"{file}: key '{key}' is missing")
    parents = [".".join(location[:n]) for n in range(len(location), -1, -1)]
    source = next((origin[parent] for parent in parents if parent in origin), file) if origin else file
    if error["type"] == "extra_forbidden":
        keys = sorted(keys_with(*Kind))
        known = {k: k for k in keys}
        for name, k in ((k.rsplit(".", 1)[1], k) for k in keys if "." in k):
            known[name] = f"{known[name]}' or '{k}" if name in known else k
        near = [known[k] for word in (key, location[-1]) for k in difflib.get_close_matches(word, known, 1, 0.6)]
        hint = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(keys)}"
        raise UserError(f"{source}: unknown key '{key}'; {hint}")
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = "" if isinstance(given, dict | BaseModel) else f", got {given!r:.80}"
    hint = f"; {WHICH_GPU}" if key == "device" else ""
    raise UserError(f"{source}: {key + ': ' if key else ''}{message[0].lower()}{message[1:]}{shown}{hint}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ('train.lr', 0.03) and so on."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def keys_with(*kinds: Kind) -> frozenset[str]:
    """Return the keys of these kinds: 'data.fold', 'train.lr', 'seed' ..."""

    def tag(field: FieldInfo, default: Kind) -> Kind:
        return next((kind for kind in field.metadata if isinstance(kind, Kind)), default)

    keys: dict[str, Kind] = {}
    for name, field in Config.model_fields.items():
        kind = tag(field, RUN)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= {f"{name}.{key}": tag(own, kind) for key, own in field.annotation.model_fields.items()}
        else:
            keys[name] = kind
    return frozenset(key for key, kind in keys.items() if kind in kinds)


@cache
def _protocols() -> dict[str, dict[str, Any]]:
    folder = Path(__file__).resolve().parent.parent / "configs/protocol"
    return {path.stem: dict(flatten(read_yaml(path))) for path in sorted(folder.glob("*.yaml"))}


def protocol_of(values: Mapping[str, Any]) -> str | None:
    """Return the file of configs/protocol that says what these values of :func:`flatten` say, by name, if one does."""
    return next((name for name, settings in _protocols().items() if settings.items() <= values.items()), None)


NOT_A_DEPARTURE = ("model.backbone", "model.weights", "model.fem_scales")
"""model keys that a benchmark sets: a change of them is not another network"""


def departures(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of ``model`` and ``loss`` in which a run departs from the default network, with their values.

    A key that this version does not know, such as a fork's, counts as well. ``values`` are those of :func:`flatten`.
    """
    default = dict(flatten({"model": ModelConfig().model_dump(), "loss": LossConfig().model_dump()}))
    given = {k: value for k, value in values.items() if k.startswith(("model.", "loss.")) and k not in NOT_A_DEPARTURE}
    return {k: value for k, value in given.items() if k not in default or value != default[k]}
