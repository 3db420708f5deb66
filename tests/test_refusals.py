"""What the real commands refuse: one line that says what, where and the remedy, and nothing left behind.

Each kind of file in each kind of damage is in test_bad_input.py; here every command meets some of it.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train
from scripts import check_data
from tests.harness import NOVEL, ROOT, Trap, call, copied, load, process, refused, test_command
from tests.scenes import SMALL, scene
from util.config import load_config
from util.engine.build import build_index, build_model, build_train_sampler
from util.engine.checkpoint import save_checkpoint

MIN_AREA, BATCH = 256, 2
"""of the tests' config"""
LOSSES = ("total", "final", "initial", "fem_aux", "bg", "pcl", "base")
IMAGE, MASK = "JPEGImages/{}_00003.jpg", "SegmentationClassAug/{}_00003.png"


# ---------------------------------------------------------------- configs and the command line


def test_the_command_itself_ends_in_one_line(config: Path, tmp_path: Path) -> None:
    """As a process: a typo in a config, and a checkpoint that is code."""
    broken, code = tmp_path / "typo.yaml", tmp_path / "code.pt"
    broken.write_text(f"base: {ROOT}/configs/base/synthetic.yaml\ntrain: {{batchsize: 2}}\n")
    torch.save({"format": 3, "extra": Trap(tmp_path / "exploded")}, code)
    refused(process("train.py", "--config", broken), broken, "train.batchsize", "did you mean 'train.batch_size'?")
    line = refused(process("test.py", "--config", config, "--checkpoint", code), code, "damaged or not a checkpoint")
    assert "weights_only" not in line and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("module", [train, test_command], ids=["train", "test"])
@pytest.mark.parametrize(
    ("override", "pieces"),
    [
        ("train.lrr=0.1", ["command line", "'train.lrr'", "did you mean 'train.lr'?"]),
        ("train.lr", ["command line", "'train.lr' is not key=value"]),
        ("train.lr=-1", ["command line", "train.lr", "greater than 0", "-1"]),
        ("model.doem=false", ["loss.pcl needs model.doem", "loss.pcl=false"]),
        ("precision=fp16", ["precision=fp16", "precision=bf16 or fp32"]),
        ("device=cuda", ["device=cuda", "device=cpu"]),
    ],
)
def test_a_wrong_override_is_refused_by_name(
    module: ModuleType,
    config: Path,
    short: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    pieces: list[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint = ["--checkpoint", short / "best.pt"] if module is test_command else []
    refused(call(module, "--config", config, *checkpoint, f"run_dir={tmp_path / 'run'}", override), *pieces)
    assert not (tmp_path / "run").exists()


def test_a_missing_config_is_refused_with_the_nearest_one(config: Path) -> None:
    missing = config.with_name("tinny.yaml")
    refused(call(train, "--config", missing), missing, "does not exist", f"did you mean {config}?")


@pytest.mark.parametrize("module", [train, test_command], ids=["train", "test"])
def test_without_a_config_the_command_prints_its_usage(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command.py"])
    with pytest.raises(SystemExit) as end:
        module.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("usage: command.py") and "--config" in err.splitlines()[-1]


def test_a_run_dir_with_a_file_in_its_way_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / "run"
    refused(call(train, "--config", config, f"run_dir={folder}"), folder)


# ---------------------------------------------------------------- data


def _remove(path: Path) -> None:
    path.unlink()


def _halve_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _halve_picture(path: Path) -> None:
    picture = Image.open(path)
    picture.resize((picture.width // 2, picture.height // 2)).save(path)


def _write_text(path: Path) -> None:
    path.write_text("This is not a picture.\n")


def _to_rgb(path: Path) -> None:
    Image.open(path).convert("RGB").save(path)


def _class_77(path: Path) -> None:
    mask = np.array(Image.open(path))
    mask[:10, :10] = 77
    Image.fromarray(mask).save(path)


@pytest.mark.parametrize(
    ("split", "file", "damage", "pieces"),
    [
        ("train", IMAGE, _remove, ["image", "does not exist", "data.root"]),
        ("val", MASK, _remove, ["mask", "does not exist", "data.root"]),
        ("train", IMAGE, _halve_picture, ["image", "mask", MASK, "must be the same size"]),
        ("val", IMAGE, _write_text, ["image", "cannot be read", "replace it or take it off the list"]),
        ("train", MASK, _halve_file, ["mask", "cannot be read", "replace it or take it off the list"]),
        ("val", MASK, _to_rgb, ["mask", "mode RGB", "palette or greyscale"]),
        ("train", MASK, _class_77, ["mask", "value 77", "data.classes"]),
        ("val", "lists/{}.txt", _remove, ["list", "does not exist", "README"]),
        ("train", "lists/{}.txt", _write_text, ["list", "line 1", "'image mask'"]),
    ],
)
def test_damaged_data_is_refused_by_file_and_remedy_before_training(
    tiny: Path, config: Path, tmp_path: Path, split: str, file: str, damage: Callable[[Path], None], pieces: list[str]
) -> None:
    root, overrides = copied(tiny, tmp_path)
    path = root / file.format(split)
    damage(path)
    refused(call(train, "--config", config, *overrides), path, *(piece.format(split) for piece in pieces))
    assert not (tmp_path / "run").exists()
    report = tmp_path / "report.json"
    assert call(check_data, "--config", config, "--json", report, *overrides).code == 1
    (problem,) = json.loads(report.read_text())["problems"][split]
    assert str(path) in problem and "\n" not in problem


def test_a_class_without_enough_images_is_refused_by_name(tiny: Path, config: Path, tmp_path: Path) -> None:
    result = call(train, "--config", config, f"run_dir={tmp_path / 'run'}", "data.shots=3")
    line = refused(result, tiny / "lists/train.txt", "3-shot episodes need 4", "data.shots", "data.min_area")
    name = line.split("class '")[1].split("'")[0]
    classes = load_config(config).data.classes
    masks = [np.array(Image.open(path)) for path in sorted((tiny / "SegmentationClassAug").glob("train_*"))]
    qualifying = sum(int((mask == classes.index(name) + 1).sum()) >= MIN_AREA for mask in masks)
    assert name not in NOVEL and qualifying < 4
    assert f"has {qualifying} images with at least {MIN_AREA} pixels" in line


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_picture_met_on_the_way_is_refused(
    tiny: Path, config: Path, short: Path, tmp_path: Path, workers: int, split: str
) -> None:
    """Its header says the right size, so only decoding meets it."""
    root, overrides = copied(tiny, tmp_path)
    for path in (root / "JPEGImages").glob(f"{split}_*.jpg"):
        _halve_file(path)
    command = ["--config", config, *overrides, f"workers={workers}"]
    module, checkpoint = (train, []) if split == "train" else (test_command, ["--checkpoint", short / "best.pt"])
    line = refused(call(module, *command, *checkpoint), "replace it or take it off the list")
    assert re.match(rf"error: image {root}/JPEGImages/{split}_\d+\.jpg cannot be read", line)


def test_a_picture_that_changed_its_size_after_the_index_was_built_is_refused(
    tiny: Path, config: Path, tmp_path: Path, short: Path
) -> None:
    root, overrides = copied(tiny, tmp_path, keep_index=True)
    assert (root / "lists/train.txt.index.npz").exists()
    for path in (root / "JPEGImages").glob("train_*.jpg"):
        _halve_picture(path)
    line = refused(call(train, "--config", config, *overrides), "must be the same size")
    assert re.search(rf"{root}/JPEGImages/(train_\d+)\.jpg .*{root}/SegmentationClassAug/\1\.png", line)


def test_lists_that_share_photos_are_refused_on_a_benchmark_and_warned_of_elsewhere(
    tiny: Path, config: Path, tmp_path: Path
) -> None:
    root, overrides = copied(tiny, tmp_path)
    first = (root / "lists/train.txt").read_text().splitlines()[0]
    with (root / "lists/val.txt").open("a") as file:
        file.write(f"{first}\n")
    words = f"1 photos stand in the training and in the validation list ({root}/{first.split()[0]})"
    refused(call(train, "--config", config, *overrides, "data.dataset=COCO-20i"), words)
    elsewhere = call(train, "--config", config, *overrides, "train.lr=1e30")
    assert f"warning: {words}" in elsewhere.out and "not finite" in elsewhere.err


def test_a_loss_that_is_not_finite_stops_the_run_with_step_terms_and_files(config: Path, tmp_path: Path) -> None:
    result = call(train, "--config", config, f"run_dir={tmp_path / 'run'}", "train.lr=1e30")
    line = refused(result, "loss", "not finite", "train.lr", *LOSSES)
    step = int(line.split("loss of step ")[1].split()[0])
    settings = load_config(config)
    sampler = build_train_sampler(settings, build_index(settings, "train"))
    for number in range(step * BATCH, (step + 1) * BATCH):
        files = sampler(number)
        query, support = (sampler.index.items[n].image for n in (files.query, *files.supports))
        assert f"query {query}, supports {support}" in line
    assert not (tmp_path / "run/last.pt").exists()
    weights = load(tmp_path / "run/not_finite.pt")["model"].values()
    assert all(weight.isfinite().all() for weight in weights), "the step has changed no weight"


# ---------------------------------------------------------------- checkpoints and weights


@pytest.mark.parametrize(
    ("overrides", "difference"),
    [
        (["data.fold=1"], "data.fold is 0 there and 1 here"),
        (["model.backbone=resnet50"], "model.backbone is efficientnet_lite0 there and resnet50 here"),
        (["model.doem=false", "loss.pcl=false"], "model.doem is True there and False here"),
        (["model.fem_scales=[1]"], "model.fem_scales is [1.0, 0.5] there and [1.0] here"),
        (["data.image_size=97"], "data.image_size is 65 there and 97 here"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    short: Path, config: Path, overrides: list[str], difference: str
) -> None:
    result = call(test_command, "--config", config, "--checkpoint", short / "best.pt", *overrides)
    refused(result, short / "best.pt", difference, "use the config it was trained with")


def test_checkpoints_that_are_none_are_refused_with_the_reason(short: Path, config: Path, tmp_path: Path) -> None:
    state, path = load(short / "best.pt"), tmp_path / "best.pt"

    def test(*pieces: object) -> None:
        refused(call(test_command, "--config", config, "--checkpoint", path), path, *pieces)

    test("does not exist")
    _write_text(path)
    test("not a checkpoint", "use another one")
    path.write_bytes((short / "best.pt").read_bytes()[:5000])
    test("damaged", "use another one")
    torch.save({"fem.fuse.0.weight": torch.zeros(3)}, path)
    test("not a checkpoint of this project")
    torch.save(state | {"format": 1}, path)
    test("is of format 1", "check out")
    del state["model"]["fem.fuse.0.weight"]
    torch.save(state, path)
    test("fem.fuse.0.weight")


def test_code_in_a_file_is_not_run_by_training(config: Path, short: Path, tmp_path: Path) -> None:
    path = tmp_path / "trap.pt"
    torch.save({**load(short / "last.pt"), "extra": Trap(tmp_path / "exploded")}, path)
    command = ["--config", config, f"run_dir={tmp_path / 'run'}"]
    refused(call(train, *command, f"resume={path}"), path, "damaged or not a checkpoint")
    refused(call(train, *command, f"model.weights={path}"), path, "cannot be read")
    assert not (tmp_path / "exploded").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "exploded").exists(), "the trap is a working one"


def test_weights_that_are_missing_of_another_backbone_or_out_of_reach_are_refused(
    config: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(url: str, *_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.chdir(tmp_path)  # where no initmodel/ is filled
    command, none = ["--config", config, f"run_dir={tmp_path / 'run'}"], tmp_path / "initmodel/resnet50.pth"
    source = json.loads((short / "run.json").read_text())["weights"]["source"]
    refused(call(train, *command, f"model.weights={none}"), none, "does not exist", "model.weights")
    other = call(train, *command, "model.backbone=vgg16_bn", f"model.weights={source}")
    refused(other, source, "missing", "another architecture")
    refused(
        call(train, *command, "model.backbone=resnet50"),
        *("resnet50", "https://download.pytorch.org/", "initmodel/resnet50-", "no route to host"),
    )
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- predict.py


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the real network with random weights."""
    path = tmp_path_factory.mktemp("network") / "small.pt"
    config = load_config(ROOT / "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml", SMALL)
    model, weights = build_model(config, "random")
    state = {"format": 3, "config": config.model_dump(), "weights": weights._asdict(), "model": model.state_dict()}
    save_checkpoint(path, state | {"list_sha256": {}, "step": 3, "best_miou": 0.5, "seconds": 1.5})
    return path


@pytest.mark.parametrize("file", ["small.pt", "s.png", "m.png", "q.png"])
def test_predict_refuses_a_damaged_file(file: str, network: Path, tmp_path: Path) -> None:
    shutil.copy(network, tmp_path)
    for n, name in enumerate(("s.png", "m.png", "q.png")):
        Image.fromarray(scene(1)[n % 2]).save(tmp_path / name)
    _halve_file(tmp_path / file)
    files = ["--support", tmp_path / "s.png", "--mask", tmp_path / "m.png", "--query", tmp_path / "q.png"]
    options = ["--checkpoint", tmp_path / "small.pt", "--out", tmp_path / "out", "--device", "cpu"]
    refused(call(predict, *options, *files), tmp_path / file)
