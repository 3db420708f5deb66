"""The configs in configs/, and how strictly a config is read."""

import importlib
import itertools
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from model.torchvision_compat import import_models
from tests.harness import ROOT
from util.config import Meaning, config_from_dict, flatten, keys_with, known_keys, load_config
from util.data.synthetic import CLASS_NAMES
from util.engine.checkpoint import require_same
from util.errors import UserError

BACKBONES = {"pascal": ("vgg16_bn", "resnet50", "resnet101"), "coco": ("resnet50", "resnet101")}
SHIPPED = sorted(path for folder in ("pascal", "coco", "synthetic") for path in (ROOT / "configs" / folder).iterdir())

# The paper's rows of NTRENet: (data set, backbone, shots) -> class mIoU of folds 0, 1, 2, 3.
PAPER = {
    ("pascal", "vgg16_bn", 1): (57.7, 67.6, 57.1, 53.7),
    ("pascal", "vgg16_bn", 5): (60.3, 68.0, 55.2, 57.1),
    ("pascal", "resnet50", 1): (65.4, 72.3, 59.4, 59.8),
    ("pascal", "resnet50", 5): (66.2, 72.8, 61.7, 62.2),
    ("pascal", "resnet101", 1): (65.5, 71.8, 59.1, 58.3),
    ("pascal", "resnet101", 5): (67.9, 73.2, 60.1, 66.8),
    ("coco", "resnet50", 1): (36.8, 42.6, 39.9, 37.9),
    ("coco", "resnet50", 5): (38.2, 44.1, 40.4, 38.4),
    ("coco", "resnet101", 1): (38.3, 40.4, 39.5, 38.1),
    ("coco", "resnet101", 5): (42.3, 44.4, 44.2, 41.7),
}

MINIMAL = """\
data:
  dataset: Letters
  root: r
  train_list: t.txt
  val_list: v.txt
  classes: [a, b, c, d]
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message with which a config is refused."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ---------------------------------------------------------------- the configs of the repository


@pytest.mark.parametrize(("dataset", "count"), [("pascal", 24), ("coco", 16)])
def test_there_is_one_config_for_each_backbone_fold_and_shot(dataset: str, count: int) -> None:
    names = {path.name for path in (ROOT / "configs" / dataset).iterdir()}
    combinations = itertools.product(BACKBONES[dataset], range(4), (1, 5))
    assert names == {f"{backbone}_fold{fold}_{shots}shot.yaml" for backbone, fold, shots in combinations}
    assert len(names) == count


def test_name_content_command_and_the_papers_number_of_each_config_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    titles = {"pascal": "PASCAL-5i", "coco": "COCO-20i", "synthetic": "Synthetic-5i"}
    for path in SHIPPED:
        folder, lines = path.parent.name, path.read_text().splitlines()
        config = load_config(path.relative_to(ROOT))
        backbone, fold, shots = config.model.backbone, config.data.fold, config.data.shots
        assert path.name == f"{backbone}_fold{fold}_{shots}shot.yaml"
        assert (config.data.dataset, config.run_dir) == (titles[folder], f"runs/{folder}/{path.stem}")
        assert yaml.safe_load(path.read_text())["base"] == f"../base/{folder}.yaml"
        assert lines[0] == f"# python train.py --config {path.relative_to(ROOT)}" and len(lines) <= 8
        if folder != "synthetic":
            number = PAPER[folder, backbone, shots][fold]
            assert re.findall(r"table (\d)", lines[1]) == [{"pascal": "1", "coco": "2"}[folder]]
            assert re.findall(r"\d+\.\d+", lines[1]) == [str(number)]


@pytest.mark.parametrize(
    ("name", "epochs", "episodes", "scale", "scheme"),
    [
        ("pascal/resnet50_fold0_1shot", 200, 1000, [0.9, 1.1], "contiguous"),
        ("coco/resnet50_fold0_1shot", 50, 4000, [0.8, 1.25], "interleaved"),
    ],
)
def test_pascal_and_coco_are_trained_and_evaluated_as_in_section_4_2_of_the_paper(
    name: str, epochs: int, episodes: int, scale: list[float], scheme: str
) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    train = config.train
    assert (train.epochs, train.batch_size, train.lr) == (epochs, 32, 0.03)
    assert (train.momentum, train.weight_decay, train.power) == (0.9, 0.0001, 0.9)
    assert (config.data.image_size, config.data.rotation, config.data.scale) == (473, 10, scale)
    assert (config.eval.episodes, config.eval.geometry) == (episodes, "lineage")
    assert (config.data.min_area, config.data.novel_in_train, config.data.fold_scheme) == (2048, "keep", scheme)
    assert config.model.prototype_channels == 640
    loss = config.loss
    assert (loss.alpha, loss.beta, loss.lambda_bg, loss.gamma, loss.bank_size) == (0.5, 1, 1, 0.01, 2000)
    assert (config.model.bgem, config.model.doem, loss.pcl, loss.pcl_negatives) == (True, True, True, "do")


def test_class_names_of_pascal_and_coco_stand_in_the_order_of_their_ids() -> None:
    import_models()
    get_weight = importlib.import_module("torchvision.models").get_weight
    coco = get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1").meta["categories"]
    voc = get_weight("DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1").meta["categories"]
    for folder, expected in (("coco", coco), ("pascal", voc)):
        expected = [name for name in expected if name not in ("__background__", "N/A")]
        assert load_config(ROOT / f"configs/{folder}/resnet50_fold0_1shot.yaml").data.classes == expected


def test_class_names_of_the_synthetic_config_are_the_generators() -> None:
    config = load_config(ROOT / "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml")
    assert tuple(config.data.classes) == CLASS_NAMES


def test_a_config_survives_the_way_through_a_checkpoint_or_a_yaml_file(tmp_path: Path) -> None:
    for path in SHIPPED[:: len(SHIPPED) // 3]:
        config = load_config(path)
        assert config_from_dict(config.model_dump(), "x") == config
        assert load_config(write(tmp_path / "c.yaml", yaml.safe_dump(config.model_dump()))) == config


# ---------------------------------------------------------------- the value written is the value used

OTHER_VALUES = {
    "data.dataset": "Other",
    "data.root": "elsewhere",
    "data.train_list": "x.txt",
    "data.val_list": "y.txt",
    "data.reader": "class_folders",
    "data.classes": ["p", "q", "r", "s"],
    "data.fold_scheme": "interleaved",
    "data.folds": [["a"], ["b", "d"]],
    "data.base_classes": ["c"],
    "data.fold": 3,
    "data.shots": 5,
    "data.min_area": 7,
    "data.novel_in_train": "drop",
    "data.image_size": 161,
    "data.scale": [0.5, 2.5],
    "data.rotation": 3.5,
    "data.blur": 0.25,
    "model.backbone": "resnet101",
    "model.weights": "initmodel/x.pth",
    "model.bgem": True,
    "model.doem": True,
    "model.elimination": "per_scale",
    "model.do_average": "region",
    "model.fem_prior": False,
    "model.do_similarity": False,
    "model.detach_initial": False,
    "model.base_learner": True,
    "model.channels": 8,
    "model.prototype_channels": 12,
    "model.fem_scales": [1.0, 0.5],
    "loss.alpha": 0.25,
    "loss.beta": 2.0,
    "loss.lambda_bg": 3.0,
    "loss.gamma": 0.5,
    "loss.initial": 0.5,
    "loss.fem_aux": 0.0,
    "loss.bg_ignored": True,
    "loss.pcl": False,
    "loss.pcl_negatives": "non_target",
    "loss.pcl_regions": "ground_truth",
    "loss.pcl_temperature": 0.5,
    "loss.pcl_drawn": 9,
    "loss.base": 0.75,
    "loss.bank_size": 3,
    "train.epochs": 4,
    "train.batch_size": 5,
    "train.lr": 0.125,
    "train.momentum": 0.0,
    "train.weight_decay": 0.5,
    "train.power": 1.5,
    "train.warmup": 3,
    "train.compile": "off",
    "train.checkpoint_minutes": 0.5,
    "eval.episodes": 6,
    "eval.batch_size": 7,
    "eval.cache_gib": 0.5,
    "eval.geometry": "lineage",
    "eval.every": 8,
    "eval.select": "last",
    "seed": 9,
    "run_dir": "somewhere",
    "resume": "auto",
    "device": "cpu",
    "precision": "bf16",
    "workers": 0,
}


def test_known_keys_are_the_keys_of_a_config(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "c.yaml", MINIMAL))
    assert set(known_keys()) == {key for key, _ in flatten(config.model_dump())} == set(OTHER_VALUES)
    assert set(known_keys()) == keys_with(*Meaning)


def test_a_checkpoint_may_differ_from_a_config_in_what_its_use_leaves_open(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    saved = load_config(path)
    for key, free_in_test, free_in_resume in [
        ("model.channels", False, False),
        ("data.image_size", False, False),
        ("data.shots", True, False),
        ("loss.gamma", True, False),
        ("workers", True, True),
    ]:
        given = load_config(path, [f"{key}={OTHER_VALUES[key]}"])
        for resume, free in ((False, free_in_test), (True, free_in_resume)):
            with nullcontext() if free else pytest.raises(UserError, match=key):
                require_same(saved, given, tmp_path / "best.pt", resume=resume)


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_the_value_written_is_the_value_used_wherever_it_stands(key: str, tmp_path: Path) -> None:
    section, _, name = key.rpartition(".")
    plain, value = write(tmp_path / "plain.yaml", MINIMAL), OTHER_VALUES[key]
    tree = yaml.safe_load(MINIMAL)
    (tree.setdefault(section, {}) if section else tree)[name] = value
    path, text = write(tmp_path / "c.yaml", yaml.safe_dump(tree)), yaml.safe_dump(value, default_flow_style=True)
    default = dict(flatten(load_config(plain).model_dump()))
    for config in (
        load_config(path),
        load_config(write(tmp_path / "leaf.yaml", "base: c.yaml\n")),
        load_config(plain, [f"{key}={text.removesuffix(chr(10)).removesuffix('...').strip()}"]),
    ):
        values = dict(flatten(config.model_dump()))
        assert values[key] == value and type(values[key]) is type(value)
        assert {k for k in values if values[k] != default[k]} - {"run_dir"} <= {key}


def test_a_file_goes_before_its_base_and_the_command_line_before_both(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", MINIMAL + "  fold: 1\n  shots: 2\n  min_area: 3\ntrain: {lr: 0.1, epochs: 11}\n")
    path = write(tmp_path / "leaf.yaml", "base: base.yaml\ndata:\n  shots: 4\n  min_area: 5\ntrain: {lr: 0.2}\n")
    config = load_config(path, ["data.min_area=6", "train.lr=0.3", "train.lr=0.4"])
    assert (config.data.fold, config.data.shots, config.data.min_area) == (1, 4, 6)
    assert (config.train.lr, config.train.epochs) == (0.4, 11)


def test_an_override_can_set_several_keys_of_a_section(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "c.yaml", MINIMAL), ["train={lr: 0.5, epochs: 3}", "train.epochs=4"])
    assert (config.train.lr, config.train.epochs, config.train.batch_size) == (0.5, 4, 32)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("5.e+1", 50.0), (".5e0", 0.5), ("2", 2)])
def test_numbers_with_an_exponent_are_numbers(text: str, value: float, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", f"{MINIMAL}train:\n  lr: {text}\n")
    assert load_config(path).train.lr == value
    assert load_config(write(tmp_path / "d.yaml", MINIMAL), [f"train.lr={text}"]).train.lr == value


@pytest.mark.parametrize("text", ["v1e5x", "1e", "'1e5'"])
def test_names_that_resemble_numbers_stay_text(text: str, tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "c.yaml", MINIMAL), [f"data.dataset={text}"])
    assert config.data.dataset == text.strip("'")


# ---------------------------------------------------------------- what is refused, and how

WRONG = {
    # case: (key, value as written, words of the message beside file and key)
    "text for a number": ("train.lr", "fast", ["number", "'fast'"]),
    "quoted number": ("train.epochs", "'20'", ["integer", "'20'"]),
    "yaml 1.1 bool for a whole number": ("data.shots", "yes", ["integer", "True"]),
    "whole number for a bool": ("model.bgem", "1", ["boolean", "1"]),
    "date for text": ("run_dir", "2024-01-31", ["string"]),
    "nothing for a section": ("train", "", ["None"]),
    "no such choice": ("precision", "fp8", ["'fp32'", "'bf16'", "'fp16'", "'fp8'"]),
    "no such backbone": ("model.backbone", "resnet18", ["'resnet50'", "'vgg16_bn'", "'resnet18'"]),
    "learning rate that is no number": ("train.lr", ".nan", ["nan"]),
    "infinite scale": ("data.scale", "[0.9, .inf]", ["inf"]),
    "no shots": ("data.shots", "0", ["greater than or equal to 1", "0"]),
    "momentum of 1": ("train.momentum", "1", ["less than 1"]),
    "negative weight": ("loss.gamma", "-0.01", ["greater than or equal to 0"]),
    "seed beyond 64 bits": ("seed", "18446744073709551616", ["less than", "18446744073709551616"]),
    "image size beyond any memory": ("data.image_size", "80000001", [""]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_refused_by_key_value_and_place(case: str, tmp_path: Path) -> None:
    key, value, words = WRONG[case]
    section, _, name = key.rpartition(".")
    line = f"{name}: {value}\n"
    text = MINIMAL + {"": line, "data": f"  {line}"}.get(section, f"{section}:\n  {line}")
    plain, path = write(tmp_path / "plain.yaml", MINIMAL), write(tmp_path / "c.yaml", text)
    leaf = write(tmp_path / "leaf.yaml", "base: c.yaml\nworkers: 1\n")
    for source, message in (
        (path, refusal(path)),
        (path, refusal(leaf)),
        ("command line", refusal(plain, f"{key}={value}")),
    ):
        assert message.startswith(f"{source}: {key}") and "\n" not in message
        assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  fold: 4\n", ["fold must be 0 to 3"]),
        ("  folds: [[a], [b, c], [d]]\n  fold: 3\n", ["fold must be 0 to 2"]),
        ("  folds: [[a], [z]]\n", ["'z'", "not among classes"]),
        ("  folds: [[a, b, c, d], [a]]\n", ["not all"]),
        ("  folds: [[a], []]\n", ["each fold must hold some"]),
        ("  folds: [[a, a], [b]]\n", ["none twice"]),
        ("  image_size: 472\n", ["8n + 1", "473"]),
        ("  scale: [1.1, 0.9]\n", ["from <= to"]),
    ],
)
def test_data_settings_that_contradict_each_other_are_refused(text: str, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL + text)
    message = refusal(path)
    assert message.startswith(f"{path}: data")
    assert all(word in message for word in words), message


def test_the_image_sizes_that_an_error_suggests_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    message = refusal(path, "data.image_size=470")
    for near in (465, 473):
        assert str(near) in message
        assert load_config(path, [f"data.image_size={near}"]).data.image_size == near


@pytest.mark.parametrize(
    ("classes", "word"),
    [
        ("[a, b, c, a]", "different"),
        ("[a]", "2 to 254"),
        (str([f"c{i}" for i in range(255)]), "2 to 254"),
    ],
)
def test_classes_are_2_to_254_different_names(classes: str, word: str, tmp_path: Path) -> None:
    assert word in refusal(write(tmp_path / "c.yaml", MINIMAL), f"data.classes={classes}")


def test_18_classes_need_folds_of_their_own(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(18)]
    path = write(tmp_path / "c.yaml", MINIMAL)
    message = refusal(path, f"data.classes={names}")
    assert "18 classes" in message
    assert "data.folds" in message
    config = load_config(path, [f"data.classes={names}", "data.folds=[[c0, c17], [c3], [c9]]", "data.fold=2"])
    assert config.data.num_folds == 3


@pytest.mark.parametrize(
    ("switches", "word"),
    [
        (["loss.pcl=true", "model.doem=false"], "loss.pcl"),
        (["model.doem=false"], "loss.pcl"),
        (["loss.pcl=false", "model.bgem=false"], "doem needs bgem"),
    ],
)
def test_a_part_whose_foundation_is_off_is_refused(switches: list[str], word: str, tmp_path: Path) -> None:
    assert word in refusal(write(tmp_path / "c.yaml", MINIMAL), *switches)
    text = "\n".join(f"{s.split('.')[0]}: {{{s.split('.')[1].replace('=', ': ')}}}" for s in switches)
    path = write(tmp_path / "d.yaml", f"{MINIMAL}{text}\n")
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert word in message


@pytest.mark.parametrize("switch", ["model.doem=false", "data.fold=9", "data.scale=[2, 1]"])
def test_a_contradiction_that_an_override_brings_about_is_laid_at_the_command_line(switch: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "c.yaml", MINIMAL), switch).startswith("command line: ")


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("xyzzy: 1\n", "xyzzy", None),
        ("train:\n  batchsize: 1\n", "train.batchsize", "train.batch_size"),
        ("  shot: 1\n", "data.shot", "data.shots"),
        ("worker: 1\n", "worker", "workers"),
    ],
)
def test_an_unknown_key_is_refused_with_file_key_and_nearest_key(
    text: str, unknown: str, nearest: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL + text)
    message = refusal(path)
    assert message.startswith(f"{path}: unknown key '{unknown}'")
    if nearest is None:
        assert "train.lr" in message
        assert "data.fold" in message
    else:
        assert f"did you mean '{nearest}'?" in message


@pytest.mark.parametrize(
    ("key", "nearest"), [("lr", "train.lr"), ("shots", "data.shots"), ("epoch", "train.epochs"), ("Seed", "seed")]
)
def test_a_key_without_its_section_is_answered_with_the_whole_key(key: str, nearest: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "c.yaml", MINIMAL), f"{key}=1")
    assert message == f"command line: unknown key '{key}'; did you mean '{nearest}'?"


def test_an_unknown_key_of_the_base_is_laid_at_the_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", MINIMAL + "  fold_sceme: contiguous\n")
    message = refusal(write(tmp_path / "leaf.yaml", "base: base.yaml\ndata:\n  fold: 1\n"))
    assert message == f"{base}: unknown key 'data.fold_sceme'; did you mean 'data.fold_scheme'?"


def test_a_missing_key_or_section_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", re.sub(r"  root:.*\n", "", MINIMAL))
    assert refusal(path) == f"{path}: key 'data.root' is missing"
    assert refusal(write(path, "seed: 1\n")) == f"{path}: key 'data' is missing"


@pytest.mark.parametrize(
    ("extra", "line", "word"),
    [
        ("seed: 1\nseed: 2\n", 8, "'seed' stands twice"),
        ("train: {lr: 1, lr: 1}\n", 7, "'lr' stands twice"),
        ("? [a, b]\n: 2\n", 7, "not text"),
        ("\tseed: 1\n", 7, "not valid YAML"),
        ("run_dir: 2024-13-01\n", None, "not valid YAML"),
        ("train: &t {lr: *t}\n", None, "nested too deep"),
    ],
)
def test_broken_yaml_is_refused_with_file_and_line(extra: str, line: int | None, word: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL + extra)
    message = refusal(path)
    assert message.startswith(f"{path} line {line}: " if line else str(path)), message
    assert word in message


def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "# only a comment\n")
    assert refusal(path).startswith(f"{path}: must hold keys and values")


def test_a_missing_file_is_refused_with_the_nearest_name() -> None:
    wrong = ROOT / "configs/pascal/resnet50_fold0_1shots.yaml"
    right = ROOT / "configs/pascal/resnet50_fold0_1shot.yaml"
    assert refusal(wrong) == f"config {wrong} does not exist; did you mean {right}?"


def test_a_missing_file_that_resembles_none_gets_no_hint(tmp_path: Path) -> None:
    write(tmp_path / "resnet50.yaml", MINIMAL)
    assert refusal(tmp_path / "zzz.yaml") == f"config {tmp_path / 'zzz.yaml'} does not exist"
    assert "does not exist" in refusal(tmp_path / "no/such/folder.yaml")


# ---------------------------------------------------------------- base


def test_a_base_is_sought_beside_the_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "base/letters.yaml", MINIMAL)
    path = write(tmp_path / "leaves/leaf.yaml", "base: ../base/letters.yaml\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(path).data.dataset == "Letters"
    assert load_config(Path("../leaves/leaf.yaml")).run_dir == "runs/leaves/leaf"


def test_a_base_with_a_base_of_its_own_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "ground.yaml", MINIMAL)
    base = write(tmp_path / "base.yaml", "base: ground.yaml\n")
    path = write(tmp_path / "leaf.yaml", "base: base.yaml\n")
    message = refusal(path)
    assert message.startswith(f"{base}: ")
    assert str(path) in message


def test_a_missing_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "letters.yaml", MINIMAL)
    message = refusal(write(tmp_path / "leaf.yaml", "base: leters.yaml\n"))
    assert message == f"config {tmp_path / 'leters.yaml'} does not exist; did you mean {tmp_path / 'letters.yaml'}?"


def test_a_base_is_the_path_of_one_file_and_not_for_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "leaf.yaml", "base: [a.yaml, b.yaml]\n")
    assert refusal(path).startswith(f"{path}: 'base'")
    plain = write(tmp_path / "c.yaml", MINIMAL)
    assert refusal(plain, "base=other.yaml").startswith("command line: unknown key 'base'")


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr", ["'train.lr'", "key=value"]),
        ("train.lr=[", ["train.lr", "'['"]),
        ("train..lr=1", ["unknown key"]),
        ("=1", ["unknown key ''"]),
        ("run_dir=2024-13-01", ["run_dir", "2024-13-01"]),
        (f"train.epochs={'9' * 5000}", ["train.epochs"]),
        (".".join(["a"] * 2000) + "=1", ["unknown key"]),
    ],
)
def test_an_unreadable_override_is_refused(override: str, words: list[str], tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "c.yaml", MINIMAL), override)
    assert message.startswith("command line: ")
    assert all(word in message for word in words), message


def test_a_value_may_hold_an_equals_sign(tmp_path: Path) -> None:
    assert load_config(write(tmp_path / "c.yaml", MINIMAL), ["run_dir=runs/lr=0.1"]).run_dir == "runs/lr=0.1"


def test_run_dir_is_by_default_runs_and_the_configs_own_path(tmp_path: Path) -> None:
    path = write(tmp_path / "letters/first.yaml", MINIMAL)
    assert load_config(path).run_dir == "runs/letters/first"
    assert load_config(path, ["run_dir="]).run_dir == "runs/letters/first"
    assert load_config(path, ["run_dir=here"]).run_dir == "here"


def test_a_config_from_a_checkpoint_is_checked_as_strictly(tmp_path: Path) -> None:
    values = load_config(write(tmp_path / "c.yaml", MINIMAL)).model_dump()
    values["train"]["lr"] = "fast"
    with pytest.raises(UserError, match=r"^checkpoint x\.pt: train\.lr: .*number"):
        config_from_dict(values, "checkpoint x.pt")
    values["train"] = {"lrr": 1}
    with pytest.raises(UserError, match=r"^checkpoint x\.pt: unknown key 'train\.lrr'; did you mean 'train\.lr'"):
        config_from_dict(values, "checkpoint x.pt")


# ---------------------------------------------------------------- files that vary a config

ABLATIONS = {
    "pfenet": {"model.bgem": False, "model.doem": False, "loss.pcl": False},
    "bgem": {"model.doem": False, "loss.pcl": False},
    "bgem_doem": {"loss.pcl": False},
    "negatives_bg": {"loss.pcl_negatives": "bg"},
    "negatives_non_target": {"loss.pcl_negatives": "non_target"},
    "per_scale": {"model.elimination": "per_scale"},
    "base_learner": {"model.base_learner": True},
    "printed": {
        "model.do_average": "region",
        "model.fem_prior": False,
        "model.do_similarity": False,
        "model.detach_initial": False,
    },
    "authors": {
        "data.blur": 0.5,
        "model.elimination": "authors",
        "model.prototype_channels": 256,
        "loss.initial": 0.6,
        "loss.bg_ignored": True,
        "loss.pcl_regions": "ground_truth",
        "loss.pcl_drawn": 1000,
        "train.lr": 0.025,
        "train.batch_size": 4,
        "train.epochs": 150,
        "train.warmup": 0,
    },
    **{f"channels_{d}": {"model.prototype_channels": d} for d in (128, 256, 384, 512, 768)},
}


def test_every_ablation_of_the_paper_has_a_file() -> None:
    assert {path.stem for path in (ROOT / "configs/ablation").glob("*.yaml")} == set(ABLATIONS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_exactly_what_it_is_named_for(name: str) -> None:
    fold = "pascal/resnet50_fold2_1shot"
    plain = dict(flatten(load_config(ROOT / f"configs/{fold}.yaml").model_dump()))
    varied = dict(
        flatten(load_config([ROOT / f"configs/{fold}.yaml", ROOT / f"configs/ablation/{name}.yaml"]).model_dump())
    )
    assert varied.pop("run_dir") == f"{plain.pop('run_dir')}_{name}"
    assert {key: value for key, value in varied.items() if value != plain[key]} == ABLATIONS[name]


def test_the_command_line_wins_over_a_variant_and_a_later_variant_over_an_earlier_one(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.yaml", "train: {lr: 0.25, epochs: 3}\n"), tmp_path / "b.yaml"
    write(second, "train: {lr: 0.5, power: 2}\n")
    config = load_config([write(tmp_path / "c.yaml", MINIMAL), first, second], ["train.power=4"]).train
    assert (config.lr, config.epochs, config.power) == (0.5, 3, 4)


def test_a_wrong_key_in_a_variant_is_named_with_the_variants_file(tmp_path: Path) -> None:
    variant = write(tmp_path / "v.yaml", "model: {doemm: false}\n")
    with pytest.raises(UserError, match=rf"{re.escape(str(variant))}: unknown key 'model.doemm'.*model.doem"):
        load_config([write(tmp_path / "c.yaml", MINIMAL), variant])


def test_a_whole_config_is_refused_as_a_variant(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    with pytest.raises(UserError, match="a file that has one is a config of its own"):
        load_config([path, ROOT / "configs/pascal/resnet50_fold0_1shot.yaml"])


def test_runs_of_other_seeds_have_folders_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    folders = [load_config(path, [f"seed={seed}"]).run_dir for seed in (0, 1)]
    assert folders[1] == f"{folders[0]}_seed1"
