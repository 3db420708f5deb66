"""Typed, strict configuration: a YAML file with at most one ``base:``, files that vary it, ``key=value`` overrides.

The value written is the value used. Unknown keys, duplicate keys, wrong types and values out of range are errors
that name the file, the key and the remedy. Every field is documented where it is declared, and so is what it means
elsewhere, see :class:`Meaning`.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from model.backbones import BACKBONES
from util.errors import UserError
from util.files import refuse_pipe

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]


if TYPE_CHECKING:
    BackboneName = str
else:
    BackboneName = Literal[tuple(BACKBONES)]


def _names_of(value: Any) -> Any:
    """What stands in a file of names, one a line, where the file is given instead of the names."""
    if not isinstance(value, str):
        return value
    path = Path(value)
    try:
        refuse_pipe(path)
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"the file of names {value} cannot be read ({error})") from error


Names = Annotated[list[str], BeforeValidator(_names_of)]
"""names, or the path of a file that holds them, one a line; the names are what a run and its checkpoints keep"""

Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: ("off", "on")[value] if isinstance(value, bool) else value),
]
"""YAML reads on and off as true and false"""


class Meaning(Enum):
    """What a key means outside the config. A key without a meaning of its own has that of its section."""

    TASK = auto()
    """what a checkpoint was trained to do: a test must say the same"""
    NETWORK = auto()
    """what the weights fit: a test must say the same"""
    VARIANT = auto()
    """anything but its default makes another network than the paper's: the report never counts the run as NTRENet"""
    COMPARED = auto()
    """the runs of one table should share it: the report warns where they do not"""
    SHOWN = auto()
    """the report shows it beside the figures"""
    MACHINE = auto()
    """it changes no figure: it may change when a run is resumed"""


TASK, NETWORK, VARIANT = Meaning.TASK, Meaning.NETWORK, Meaning.VARIANT
COMPARED, SHOWN, MACHINE = Meaning.COMPARED, Meaning.SHOWN, Meaning.MACHINE


class Section(BaseModel):
    """A part of the config: strict about types, and closed to unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class DataConfig(Section):
    """Which data, which classes are novel, and how a picture reaches the network."""

    dataset: Annotated[str, TASK, COMPARED]
    """name in tables and results"""
    root: Annotated[str, MACHINE]
    """folder to which the lists' paths are relative"""
    train_list: Annotated[str, MACHINE]
    """file of 'image mask' lines: the base classes are trained on it"""
    val_list: Annotated[str, MACHINE]
    """the same kind of file: the novel classes are evaluated on it"""
    reader: str = "class_ids"
    """how masks are read: 'class_ids' or 'class_folders', see util/data/readers.py"""
    classes: Annotated[Names, TASK, COMPARED]
    """names of the classes, or a file of them; their mask values are 1, 2, ... in this order (0 background, 255
    ignored), at most 254 where masks hold class ids"""
    fold_scheme: Annotated[Literal["contiguous", "interleaved"], TASK, COMPARED] = "contiguous"
    """novel classes of fold i of 4: a run of neighbours (PASCAL-5i), or every fourth (COCO-20i)"""
    folds: Annotated[list[Names] | None, TASK, COMPARED] = None
    """class names of each fold, or a file of them for each, instead of a scheme"""
    base_classes: Annotated[Names | None, TASK, COMPARED] = None
    """class names that every fold trains on, or a file of them, where classes are split once into training, validation
    and test (FSS-1000); the folds are then the splits to evaluate on. By default a fold trains on all that are not
    its own."""
    fold: Annotated[int, Field(ge=0), TASK] = 0
    shots: Annotated[Count, SHOWN] = 1
    """supports an episode"""
    min_area: Count = 2048
    """pixels a class needs in an image to qualify it as a support, and for the fold"""
    novel_in_train: Literal["keep", "drop"] = "keep"
    """training images that also hold novel classes: keep them with those pixels as background, or drop them"""
    image_size: Annotated[int, Field(ge=9, le=10_001), TASK, COMPARED] = 473
    """side of the network's square input; 8n + 1"""
    scale: Annotated[list[Annotated[float, Field(ge=0.01, le=100)]], Field(min_length=2, max_length=2)] = [0.9, 1.1]
    """random scaling in training, from and to"""
    rotation: Annotated[float, Field(ge=0, le=180)] = 10.0
    """random rotation in training, degrees either way, in half of the images"""
    blur: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of the images that are blurred in training, with a Gaussian of 5x5 pixels (the authors' code: 0.5)"""

    @model_validator(mode="after")
    def _check_geometry(self) -> "DataConfig":
        if self.image_size % 8 != 1:
            lower = max(self.image_size // 8, 1) * 8 + 1
            raise ValueError(f"image_size must be 8n + 1, such as {lower} or {lower + 8}")
        if self.scale[0] > self.scale[1]:
            raise ValueError("scale must be [from, to] with from <= to")
        return self

    @model_validator(mode="after")
    def _check_classes(self) -> "DataConfig":
        most = 254 if self.reader == "class_ids" else 10**6
        if len(set(self.classes)) != len(self.classes) or not 2 <= len(self.classes) <= most:
            raise ValueError(f"classes must be 2 to {most} different names")
        for key, names in [*(("folds", fold) for fold in self.folds or []), ("base_classes", self.base_classes or [])]:
            if foreign := [name for name in names if name not in self.classes]:
                raise ValueError(f"{key} names '{foreign[0]}', which is not among classes")
        if any(not 0 < len(set(fold)) < len(self.classes) or len(set(fold)) < len(fold) for fold in self.folds or []):
            raise ValueError("each fold must hold some, and not all, of the classes, and none twice")
        if self.base_classes == []:
            raise ValueError("base_classes must name a class")
        if self.folds is None and len(self.classes) % 4:
            raise ValueError(f"{len(self.classes)} classes do not make 4 equal folds; list them under data.folds")
        if self.fold >= self.num_folds:
            raise ValueError(f"fold must be 0 to {self.num_folds - 1}")
        return self

    @property
    def num_folds(self) -> int:
        """Return how many folds the classes make."""
        return 4 if self.folds is None else len(self.folds)


class ModelConfig(Section):
    """The network; its defaults are NTRENet."""

    backbone: Annotated[BackboneName, NETWORK, SHOWN] = "resnet50"
    weights: Annotated[str, COMPARED] = "imagenet"
    """'imagenet' (fetched by name), a file such as initmodel/resnet50_v2.pth, or 'random'"""
    bgem: bool = True
    """mine and eliminate the background (eq. 1-4); with everything off the model is PFENet"""
    doem: bool = True
    """match, mine and eliminate distracting objects (eq. 5-9); needs bgem"""
    elimination: Literal["single", "per_scale", "authors"] = "single"
    """eq. 4-8 once (the paper), anew at each of FEM's scales, or that with the authors' deeper BGMM and FM"""
    do_average: Literal["image", "region"] = "image"
    """P_DO is the mean of X^q * Y_DO over the image (the authors' code), or over Y_DO alone (eq. 8 as printed)"""
    fem_prior: bool = True
    """FEM takes C_p beside P_DO where eq. 4-8 run once (at each scale FM has just taken it)"""
    do_similarity: bool = True
    """S_DO, the cosine similarity of each position with P_DO, is subtracted from that C_p; needs fem_prior"""
    detach_initial: bool = True
    """y_ini learns from X_act without shaping it: its loss makes X_act tell base classes, which FEM cannot use on novel
    ones; never with elimination=authors"""
    base_learner: bool = False
    """beyond the paper: learn to tell base classes apart, and with it novel ones (model/base_learner.py); needs doem"""
    channels: Count = 256
    """C, the channels of X^q and X^s and of all that follows; fewer train faster, 64 on a CPU"""
    prototype_channels: Count = 640
    """D of the background prototype (Fig. 6)"""
    fem_scales: Annotated[list[Positive], Field(min_length=1), NETWORK, COMPARED] = [60, 30, 15, 8]
    """FEM's scales, fine to coarse: sides above 1, or shares of the feature's side up to 1"""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.doem and not self.bgem:
            raise ValueError("doem needs bgem; set model.bgem=true or model.doem=false")
        if self.elimination != "single" and not self.doem:
            raise ValueError(f"elimination {self.elimination} needs doem; set model.elimination=single")
        if self.base_learner and not self.doem:
            raise ValueError("base_learner needs doem; set model.base_learner=false")
        return self


class LossConfig(Section):
    """The terms of the loss (eq. 11), their weights and the prototype bank."""

    alpha: NonNegative = 0.5
    """weight of the second term of L_BG (eq. 3)"""
    beta: NonNegative = 1.0
    """weight of L_T (eq. 11)"""
    lambda_bg: NonNegative = 1.0
    """weight of L_BG (eq. 11)"""
    gamma: NonNegative = 0.01
    """weight of L_PCL (eq. 11)"""
    initial: NonNegative = 1.0
    """weight of y_ini's term of L_T (eq. 12; 0.6 in the authors' code)"""
    fem_aux: NonNegative = 0.4
    """weight of FEM's per-scale predictions"""
    bg_ignored: bool = False
    """ignored pixels count in the second term of L_BG, as in the authors' code"""
    pcl: bool = True
    """the contrastive loss (eq. 10); needs model.doem"""
    pcl_negatives: Literal["do", "bg", "non_target"] = "do"
    """what the bank stores (Table 4)"""
    pcl_regions: Literal["predicted", "ground_truth"] = "predicted"
    """where eq. 10 looks for the target in a query: in the prediction, or in its mask (the authors' code)"""
    pcl_temperature: Positive = 1.0
    """what the cosines of eq. 10 are divided by (1 as printed)"""
    pcl_drawn: Annotated[int, Field(ge=0, le=10**9)] = 0
    """prototypes of the bank, drawn at random, that eq. 10 sums over (the authors' code: 1000); 0 for all"""
    base: NonNegative = 3.0
    """weight of the base learner's cross-entropy (model.base_learner)"""
    bank_size: Count = 2000
    """prototypes kept a class"""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term of model.losses.NTRELoss in the total."""
        return {
            "final": self.beta,
            "initial": self.beta * self.initial,
            "fem_aux": self.beta * self.fem_aux,
            "bg": self.lambda_bg,
            "pcl": self.gamma,
            "base": self.base,
        }


class TrainConfig(Section):
    """The schedule of the optimiser, SGD."""

    epochs: Count = 200
    batch_size: Count = 32
    lr: Positive = 0.03
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 1e-4
    power: NonNegative = 0.9
    """exponent of the polynomial decay of the learning rate, a step at a time"""
    warmup: Annotated[int, Field(ge=0, le=10**9)] = 100
    """steps over which the learning rate rises to lr; 0 for none"""
    checkpoint_minutes: Annotated[NonNegative, MACHINE] = 10.0
    """longest time between checkpoints; one is written at the end of each epoch in any case"""
    compile: Annotated[bool, MACHINE] = False
    """whether torch.compile makes the training step; auto is on for long runs on CUDA (util/engine/compilation.py)"""


class EvalConfig(Section):
    """How a checkpoint is evaluated, in training and by test.py."""

    episodes: Count = 1000
    batch_size: Annotated[Count, MACHINE] = 1
    """images encoded, and episodes segmented, at a time"""
    cache_gib: Annotated[Positive, MACHINE] = 4.0
    """memory for what episodes share: features of the images they have in common, and what else fits in of the
    backbone's features from one validation in training to the next"""
    geometry: Annotated[Literal["lineage", "exact"], COMPARED] = "exact"
    """how logits return to the original size: as PFENet's code does ('lineage', 3 px off at 500x375), or exactly"""
    every: Annotated[Count, MACHINE] = 1
    """epochs between evaluations in training"""
    select: Annotated[Literal["miou", "last"], COMPARED] = "miou"
    """what best.pt is: the highest novel-fold mIoU, as in the authors' code, or simply the last"""


RETIRED = ("resume_changed_code",)
"""keys that mean nothing any more; records that were written with them are still read"""


class Config(Section):
    """Everything that a command can be told in YAML or as ``key=value``."""

    data: Annotated[DataConfig, COMPARED]
    model: Annotated[ModelConfig, NETWORK, VARIANT] = ModelConfig()
    loss: Annotated[LossConfig, VARIANT] = LossConfig()
    train: Annotated[TrainConfig, COMPARED] = TrainConfig()
    eval: Annotated[EvalConfig, SHOWN] = EvalConfig()
    seed: Annotated[int, Field(ge=0, lt=2**63), SHOWN] = 0
    """settles weights, dropout, training episodes and augmentation"""
    run_dir: Annotated[str, MACHINE] = ""
    """everything a run writes; by default runs/, the config's own path, its variants and a seed other than 0"""
    resume: Annotated[str, MACHINE] = "none"
    """'none', 'auto' (from run_dir's last.pt if there is one), or a checkpoint's path"""
    device: Annotated[Literal["auto", "cpu", "cuda"], MACHINE] = "auto"
    precision: Annotated[Literal["auto", "fp32", "tf32", "bf16", "fp16"], SHOWN] = "auto"
    """numbers of the forward and backward pass; auto is bf16 where the device computes it natively, else fp32. tf32 is
    float32 that CUDA rounds in convolutions and matrix products; fp32 is never rounded"""
    workers: Annotated[int, Field(ge=0), MACHINE] = 4
    """loader processes, at most one a core; the results do not depend on it"""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.loss.pcl and not self.model.doem:
            raise ValueError("loss.pcl needs model.doem; set loss.pcl=false")
        if self.model.base_learner and len(self.data.classes) > 254:
            raise ValueError("model.base_learner takes at most 254 classes; set model.base_learner=false")
        return self


def load_config(paths: Path | Sequence[Path], overrides: Sequence[str] = ()) -> Config:
    """Read a config file, its base, files that vary it (such as configs/ablation/*.yaml), and ``key=value`` overrides.

    Raises:
        UserError: naming the file (or the command line), the key and the remedy.
    """
    path, *variants = [paths] if isinstance(paths, Path) else paths
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, layer in _layers(path, variants, overrides):
        try:
            _merge(values, layer, source, origin)
        except RecursionError as error:
            raise UserError(
                f"{source}: nested too deep; an alias such as *name may lie inside its own value"
            ) from error
    if values.get("run_dir") is None:
        values.pop("run_dir", None)
    config = _validate(values, origin, str(path), contradiction="command line" if overrides else str(path))
    if config.run_dir:
        return config
    of_seed = [f"seed{config.seed}"] if config.seed else []
    name = "_".join([path.stem, *(variant.stem for variant in variants), *of_seed])
    return config.model_copy(update={"run_dir": str(Path("runs") / path.resolve().parent.name / name)})


def _layers(path: Path, variants: Sequence[Path], overrides: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give what each source says, with its name; a later one wins."""
    leaf = read_yaml(path)
    base = leaf.pop("base", None)
    if isinstance(base, str):
        yield str(path.parent / base), _read_flat(path.parent / base, f"name it in {path}")
    elif base is not None:
        raise UserError(f"{path}: 'base' must be the path of one YAML file")
    yield str(path), leaf
    for variant in variants:
        if variant.suffix not in (".yaml", ".yml"):
            raise UserError(f"command line: '{variant}' is not key=value, such as train.lr=0.01, nor a YAML file")
        yield str(variant), _read_flat(variant, "a file that has one is a config of its own; give it first, or alone")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"command line: '{override}' is not key=value, such as train.lr=0.01")
        try:
            value = yaml.load(text, _Loader)  # noqa: S506 (it is a safe one)
        except Exception as error:  # see read_yaml
            raise UserError(f"command line: {key}: cannot read the value '{text:.100}'") from error
        for part in reversed(key.split(".", 3)):  # no key has more parts
            value = {part: value}
        yield "command line", value


def _read_flat(path: Path, remedy: str) -> dict[str, Any]:
    """Read a YAML file that must not have a base."""
    values = read_yaml(path)
    if "base" in values:
        raise UserError(f"{path}: cannot have a 'base' of its own; {remedy}")
    return values


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """``--config``, the same for every command."""
    what = "a fold's config, and any files that vary it, such as configs/ablation/pfenet.yaml"
    parser.add_argument("--config", type=Path, nargs="+", required=True, metavar="YAML", help=what)


def parse_arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Options of the command line, and its ``key=value`` overrides, which may stand anywhere among them."""
    parser.usage = f"%(prog)s {parser.format_usage().split(maxsplit=2)[2].strip()} [key=value ...]"
    overrides = [word for word in sys.argv[1:] if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
    args, others = parser.parse_known_args([word for word in sys.argv[1:] if word not in overrides])
    if options := [word for word in others if word.startswith("-")]:
        parser.error(f"unknown option {options[0]}")
    return args, overrides + others


def config_from_dict(values: dict[str, Any], source: str) -> Config:
    """Validate a whole config that stands in a checkpoint or a record; ``source`` is named in errors."""
    values = {key: value for key, value in values.items() if key not in RETIRED}
    return _validate(values, {}, source, contradiction=source)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('train.lr', 0.03) and so on."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key that stands twice, and reads 1e-4 as a number (YAML 1.1 wants 1.0e-4)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[str] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                problem = f"key '{key}' " + ("stands twice" if isinstance(key, str) else "is not text")
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
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
        refuse_pipe(path)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1, 0.5)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"config {path} does not exist{hint}") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no system takes
        raise UserError(f"config {path} cannot be read: {error}") from error
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 (it is a safe one)
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {error.problem}") from error
    except Exception as error:  # PyYAML also lets through what Python raises for '!!int x', month 13, deep nesting ...
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not valid YAML: {reason}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold keys and values, such as 'data:' with 'fold: 0' under it")
    return values


def _merge(into: dict[str, Any], new: dict[str, Any], source: str, origin: dict[str, str], prefix: str = "") -> None:
    for key, value in new.items():
        origin[prefix + key] = source
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, source, origin, f"{prefix}{key}.")
        elif isinstance(value, dict):
            into[key] = {}
            _merge(into[key], value, source, origin, f"{prefix}{key}.")
        else:
            into[key] = value


def _validate(values: dict[str, Any], origin: dict[str, str], file: str, contradiction: str) -> Config:
    """``origin``: where each key was set; ``file`` lacks what is missing; ``contradiction`` set keys at odds."""
    try:
        return Config.model_validate(values)
    except ValidationError as validation:
        error = validation.errors()[0]
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    named = [".".join(location[:n]) for n in range(len(location), 0, -1)]
    source = next((origin[k] for k in named if k in origin), contradiction)
    if error["type"] == "extra_forbidden":
        known = {k.rsplit(".", 1)[-1]: k for k in known_keys()} | {k: k for k in known_keys()}
        near = [known[k] for word in (key, location[-1]) for k in difflib.get_close_matches(word, known, 1, 0.6)]
        hint = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(sorted(known_keys()))}"
        raise UserError(f"{source}: unknown key '{key}'; {hint}")
    if error["type"] == "missing":
        raise UserError(f"{file}: key '{key}' is missing")
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    try:
        shown = "" if isinstance(given, dict | BaseModel) else f", got {given!r:.80}"
    except ValueError:  # Python writes no whole number of more than 4300 digits
        shown = ""
    raise UserError(f"{source}: {key + ': ' if key else ''}{message[0].lower()}{message[1:]}{shown}")


def known_keys() -> Iterator[str]:
    """Every key a config can hold: 'data.fold', 'train.lr', 'seed' ..."""
    return (key for key, _ in _keys_and_meanings())


def keys_with(*meanings: Meaning) -> frozenset[str]:
    """The keys that have one of these meanings."""
    return frozenset(key for key, its in _keys_and_meanings() if not its.isdisjoint(meanings))


def departures(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a run another network than the paper's, NTRENet as it stands by default: keys and their values.

    A key that this version does not know, as a fork's or a later version's run has it, counts as well.

    Args:
        values: a config's keys, as :func:`flatten` gives them; those of ``model`` and ``loss`` alone play a part
    """
    default = dict(flatten({"model": ModelConfig().model_dump(), "loss": LossConfig().model_dump()}))
    given = {key: value for key, value in values.items() if key.startswith(("model.", "loss."))}
    variant = keys_with(VARIANT)
    return {k: value for k, value in given.items() if k not in default or (k in variant and value != default[k])}


def _keys_and_meanings(
    section: type[BaseModel] = Config, prefix: str = "", meaning: frozenset[Meaning] = frozenset()
) -> Iterator[tuple[str, frozenset[Meaning]]]:
    for name, field in section.model_fields.items():
        own = frozenset(mark for mark in field.metadata if isinstance(mark, Meaning)) or meaning
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys_and_meanings(field.annotation, f"{prefix}{name}.", own)
        else:
            yield prefix + name, own
