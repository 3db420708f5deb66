"""The configs in configs/, and how strictly a config is read."""

import importlib
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from model.torchvision_compat import import_models
from tests.harness import ROOT
from util.config import MACHINE, RUN, TASK, Kind, departures, flatten, keys_with, load_config
from util.data.synthetic import CLASS_NAMES
from util.engine.checkpoint import require_same
from util.errors import UserError

SHIPPED = sorted(
    path
    for folder in ("pascal", "coco", "synthetic", "synthetic_small")
    for path in (ROOT / "configs" / folder).iterdir()
)

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
"""class mIoU of folds 0 to 3 that the paper prints for NTRENet, by data set, backbone and shots"""

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


def test_each_row_of_the_paper_and_fold_has_a_config_with_its_name_command_and_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    paths = {f"configs/{folder}/{name}_fold{fold}_{k}shot.yaml" for folder, name, k in PAPER for fold in range(4)}
    assert {str(path.relative_to(ROOT)) for path in SHIPPED if "synthetic" not in path.parent.name} == paths
    titles = {
        "pascal": "PASCAL-5i",
        "coco": "COCO-20i",
        "synthetic": "Synthetic-5i",
        "synthetic_small": "Synthetic-5i-small",
    }
    for path in SHIPPED:
        folder, lines = path.parent.name, path.read_text().splitlines()
        config = load_config(path.relative_to(ROOT))
        backbone, fold, shots = config.model.backbone, config.data.fold, config.data.shots
        assert path.name == f"{backbone}_fold{fold}_{shots}shot.yaml"
        assert (config.data.dataset, config.run_dir) == (titles[folder], f"runs/{folder}/{path.stem}")
        assert yaml.safe_load(path.read_text())["base"] == f"../base/{folder}.yaml"
        assert lines[0] == f"# python train.py --config {path.relative_to(ROOT)}" and len(lines) <= 8
        if "synthetic" not in folder:
            number = PAPER[folder, backbone, shots][fold]
            assert re.findall(r"table (\d)", lines[1]) == [{"pascal": "1", "coco": "2"}[folder]]
            assert re.findall(r"\d+\.\d+", lines[1]) == [str(number)]


@pytest.mark.parametrize(
    ("name", "epochs", "episodes", "scale", "scheme"),
    [("pascal", 200, 1000, [0.9, 1.1], "contiguous"), ("coco", 50, 4000, [0.8, 1.25], "interleaved")],
)
def test_pascal_and_coco_are_trained_and_evaluated_as_in_section_4_2_of_the_paper(
    name: str, epochs: int, episodes: int, scale: list[float], scheme: str
) -> None:
    config = load_config(ROOT / f"configs/{name}/resnet50_fold0_1shot.yaml")
    train = config.train
    assert (train.epochs, train.batch_size, train.lr) == (epochs, 32, 0.03)
    assert (train.momentum, train.weight_decay, train.power) == (0.9, 0.0001, 0.9)
    assert (config.data.image_size, config.data.rotation, config.data.scale) == (473, 10, scale)
    assert (config.eval.episodes, config.eval.geometry) == (episodes, "lineage")
    assert (config.data.min_area, config.data.novel_in_train, config.data.fold_scheme) == (2048, "keep", scheme)
    loss = config.loss
    assert (loss.alpha, loss.final, loss.bg, loss.pcl, loss.bank_size) == (0.5, 1, 1, 0.01, 2000)
    assert (config.model.bgem, config.model.doem, loss.pcl_negatives) == (True, True, "do")
    assert (config.model.elimination, config.model.prototype_channels, config.model.two_class) == ("authors", 256, True)


def test_class_names_are_in_the_order_of_their_ids() -> None:
    import_models()
    get_weight = importlib.import_module("torchvision.models").get_weight
    coco = get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1").meta["categories"]
    voc = get_weight("DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1").meta["categories"]
    for folder, expected in (("coco", coco), ("pascal", voc)):
        expected = [name for name in expected if name not in ("__background__", "N/A")]
        assert load_config(ROOT / f"configs/{folder}/resnet50_fold0_1shot.yaml").data.classes == expected
    synthetic = load_config(ROOT / "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml")
    assert tuple(synthetic.data.classes) == CLASS_NAMES


OTHER_VALUES = {
    "data.folds": [["a"], ["b", "d"]],
    "data.shots": 5,
    "data.rotation": 3.5,
    "model.backbone": "resnet101",
    "train.compile": True,
    "train.steps": 7,
    "data.left_out": ["b"],
    "run_dir": "somewhere",
}
"""a key of each type"""


def test_every_key_has_one_kind(tmp_path: Path) -> None:
    keys = [key for key, _ in flatten(load_config(write(tmp_path / "c.yaml", MINIMAL)).model_dump())]
    assert keys_with(*Kind) == set(keys) and sum(len(keys_with(kind)) for kind in Kind) == len(keys)
    assert {"data.fold", "data.image_size", "model.channels", "model.backbone"} < keys_with(TASK)
    assert {"workers", "device", "run_dir", "data.root", "train.compile"} < keys_with(MACHINE)
    assert {"model.weights", "data.shots", "loss.pcl", "train.lr", "seed"} < keys_with(RUN)


def test_a_checkpoint_may_differ_from_a_config_in_keys_that_its_use_does_not_need(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    saved = load_config(path)
    for override, free_in_test, free_in_resume in [
        ("model.channels=8", False, False),
        ("loss.pcl=0.5", True, False),
        ("workers=0", True, True),
    ]:
        key, given = override.partition("=")[0], load_config(path, [override])
        for resume, free in ((False, free_in_test), (True, free_in_resume)):
            with nullcontext() if free else pytest.raises(UserError, match=key):
                require_same(saved, given, tmp_path / "best.pt", resume=resume)


def test_departures_are_what_makes_another_network(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    changed = ["model.backbone=vgg16_bn", "model.weights=random", "model.fem_scales=[1]", "train.lr=1", "data.shots=5"]
    assert departures(dict(flatten(load_config(path, changed).model_dump()))) == {}
    given = dict(flatten(load_config(path, ["model.channels=64", "loss.pcl=0"]).model_dump()))
    assert departures(given | {"model.own": True}) == {"model.channels": 64, "loss.pcl": 0, "model.own": True}


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_the_value_written_is_the_value_used(key: str, tmp_path: Path) -> None:
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


def test_a_variant_goes_before_a_file_a_file_before_its_base_and_the_command_line_before_all(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", MINIMAL + "  fold: 1\n  shots: 2\n  min_area: 3\ntrain: {lr: 0.1, epochs: 11}\n")
    path = write(tmp_path / "leaf.yaml", "base: base.yaml\ndata:\n  shots: 4\n  min_area: 5\ntrain: {lr: 0.2}\n")
    config = load_config(path, ["data.min_area=6", "train.lr=0.3", "train.lr=4e-1"])
    assert (config.data.fold, config.data.shots, config.data.min_area) == (1, 4, 6)
    assert (config.train.lr, config.train.epochs) == (0.4, 11)  # YAML 1.1 reads 4e-1 as a string
    variants = [write(tmp_path / f"{lr}.yaml", f"train: {{lr: {lr}, power: 2}}\n") for lr in (0.25, 0.5)]
    config = load_config([path, *variants], ["train.power=4"])
    assert (config.train.lr, config.train.epochs, config.train.power) == (0.5, 11, 4)


def test_of_epochs_and_steps_the_one_given_last_is_the_length_of_a_run(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", MINIMAL + "train: {epochs: 3, batch_size: 2}\n")
    path = write(tmp_path / "leaf.yaml", "base: base.yaml\ntrain: {steps: 20}\n")
    for overrides, expected in (
        ([], (8, 3, 20)),
        (["train.epochs=2"], (8, 2, 16)),
        (["train.epochs=2", "train.steps=5"], (8, 1, 5)),
    ):
        assert load_config(path, overrides).train.schedule(images=17) == expected


WRONG = {
    "train.lr: .nan": ["nan"],
    "train.epochs: '20'": ["integer", "'20'"],
    "model.backbone: resnet18": ["resnet50", "vgg16_bn", "timm:NAME", "'resnet18'"],
}
"""words of the message about a wrong value"""


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_value_is_refused_by_key_value_and_place(wrong: str, tmp_path: Path) -> None:
    key, _, value = wrong.partition(": ")
    section, _, name = key.rpartition(".")
    text = MINIMAL + ("" if section == "data" else f"{section}:\n") + f"  {name}: {value}\n"
    plain, path = write(tmp_path / "plain.yaml", MINIMAL), write(tmp_path / "c.yaml", text)
    leaf = write(tmp_path / "leaf.yaml", "base: c.yaml\nworkers: 1\n")
    for source, message in (
        (path, refusal(path)),
        (path, refusal(leaf)),
        ("command line", refusal(plain, f"{key}={value}")),
    ):
        assert message.startswith(f"{source}: {key}") and "\n" not in message
        assert all(word in message for word in WRONG[wrong]), message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  fold: 4\n", ": data: fold must be 0 to 3"),
        ("  folds: [[a], [z]]\n", ": data: folds names 'z', which is not among classes"),
        ("model: {doem: false}\n", ": loss.pcl needs model.doem; set loss.pcl=0"),
        ("model: {bgem: false}\nloss: {pcl: 0}\n", ": model: doem needs bgem; set model.bgem=true or"),
        ("train:\n  batchsize: 1\n", ": unknown key 'train.batchsize'; did you mean 'train.batch_size'?"),
        ("epoch: 1\n", ": unknown key 'epoch'; did you mean 'train.epochs'?"),
        ("seed: 1\nseed: 2\n", " line 8: not valid YAML: key 'seed' is given twice"),
        ("\tseed: 1\n", " line 7: not valid YAML"),
    ],
)
def test_contradictions_unknown_and_duplicate_keys_are_refused(text: str, expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL + text)
    assert refusal(path).startswith(f"{path}{expected}")


@pytest.mark.parametrize("override", ["data.classes=[a, b, c, a]", "data.classes=[a, b, c]", "train.lr=[", "lr=1"])
def test_a_wrong_override_is_laid_at_the_command_line(override: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "c.yaml", MINIMAL), override).startswith("command line: ")


def test_a_missing_key_section_or_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", re.sub(r"  root:.*\n", "", MINIMAL))
    assert refusal(path) == f"{path}: key 'data.root' is missing"
    assert refusal(write(path, "# no keys\n")).startswith(f"{path}: must hold keys and values")
    wrong, right = (ROOT / f"configs/pascal/resnet50_fold0_{shots}.yaml" for shots in ("1shots", "1shot"))
    assert refusal(wrong) == f"config {wrong} does not exist; did you mean {right}?"


def test_a_base_is_relative_to_its_file_and_run_dir_named_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "base/letters.yaml", MINIMAL)
    path = write(tmp_path / "leaves/leaf.yaml", "base: ../base/letters.yaml\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(path).data.dataset == "Letters"
    config = Path("../leaves/leaf.yaml")
    assert load_config(config).run_dir == "runs/leaves/leaf"
    assert load_config(config, ["run_dir=runs/lr=0.1"]).run_dir == "runs/lr=0.1"
    assert load_config(config, ["seed=1"]).run_dir == "runs/leaves/leaf_seed1"


def test_mistakes_of_a_base_are_laid_at_the_base(tmp_path: Path) -> None:
    path = write(tmp_path / "leaf.yaml", "base: base.yaml\ndata:\n  fold: 1\n")
    base = write(tmp_path / "base.yaml", MINIMAL + "  fold_sceme: contiguous\n")
    assert refusal(path) == f"{base}: unknown key 'data.fold_sceme'; did you mean 'data.fold_scheme'?"
    base.unlink()
    assert refusal(path).startswith(f"config {base} does not exist")


def test_an_ablation_changes_its_own_keys_and_each_of_them() -> None:
    fold, files = ROOT / "configs/pascal/resnet50_fold2_1shot.yaml", sorted((ROOT / "configs/ablation").glob("*.yaml"))
    assert {"pfenet", "bgem", "printed", "ours", "authors"} < {file.stem for file in files}
    plain = dict(flatten(load_config(fold).model_dump()))
    for file in files:
        varied = dict(flatten(load_config([fold, file]).model_dump()))
        assert varied.pop("run_dir") == f"{plain['run_dir']}_{file.stem}"
        changed = {key: value for key, value in varied.items() if value != plain[key]}
        assert changed == dict(flatten(yaml.safe_load(file.read_text())))
