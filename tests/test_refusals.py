"""Bad inputs that a lab meets end in exit code 2 and one line that says what is wrong, where, and the remedy."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train
from scripts import check_data
from tests.harness import NOVEL, ROOT, Trap, call, copied, load, process, refused, sha256, test_command
from tests.scenes import scene

IMAGE, MASK = "JPEGImages/{}_00003.jpg", "SegmentationClassAug/{}_00003.png"


# ---------------------------------------------------------------- configs and the command line


def test_windows_is_refused() -> None:
    refused(process("-c", "import sys; sys.modules['fcntl'] = None; import util.command"), "Windows is not supported")


def test_the_command_itself_ends_in_one_line(config: Path, tmp_path: Path) -> None:
    """As a process: a typo in a config, and a checkpoint that is code."""
    broken, code = tmp_path / "typo.yaml", tmp_path / "code.pt"
    broken.write_text(f"base: {ROOT}/configs/base/synthetic.yaml\ntrain: {{batchsize: 2}}\n")
    torch.save({"extra": Trap(tmp_path / "exploded")}, code)
    refused(process("train.py", "--config", broken), broken, "train.batchsize", "did you mean 'train.batch_size'?")
    refused(process("test.py", "--config", config, "--checkpoint", code), code, "damaged or not a checkpoint")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("override", "pieces"),
    [
        ("data.image_size=66", ["66", "65"]),
        ("precision=fp16", ["precision=fp16", "precision=bf16 or fp32"]),
        ("device=cuda:1", ["got 'cuda:1'", "CUDA_VISIBLE_DEVICES=1"]),
        ("device=cuda", ["device=cuda", "device=cpu"]),
    ],
)
def test_a_wrong_override_is_refused_by_name(
    config: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, pieces: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module, checkpoint in ((train, []), (test_command, ["--checkpoint", short / "best.pt"])):
        refused(call(module, "--config", config, *checkpoint, f"run_dir={tmp_path / 'run'}", override), *pieces)
    assert not (tmp_path / "run").exists()


def test_a_home_that_no_shell_has_expanded_is_found(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(f"base: {config}\ndata: {{val_list: ~/none.txt}}\n")
    for given, expected in (("workers=0", "none.txt"), ("data.val_list=~/other.txt", "other.txt")):
        result = call(test_command, "--config", "~/mine.yaml", "--baselines", "--out=~/results.json", given)
        refused(result, f"list {tmp_path / expected} does not exist", "relative paths")


def test_a_run_dir_that_cannot_be_made_is_refused(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.write_text("not a folder")
    refused(call(train, "--config", config, f"run_dir={folder / 'run'}"), folder, "set run_dir=")


# ---------------------------------------------------------------- data


def _halve_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _halve_image(path: Path) -> None:
    image = Image.open(path)
    image.resize((image.width // 2, image.height // 2)).save(path)


def _write_text(path: Path) -> None:
    path.write_text("This is not an image.\n")


def _paint_red(path: Path) -> None:
    Image.new("RGB", (9, 9), "red").save(path)


def _class_77(path: Path) -> None:
    mask = np.array(Image.open(path))
    mask[:10, :10] = 77
    Image.fromarray(mask).save(path)


@pytest.mark.parametrize(
    ("split", "file", "damage", "pieces"),
    [
        ("val", MASK, Path.unlink, ["mask", "does not exist", "data.root"]),
        ("train", IMAGE, _halve_image, ["image", "mask", MASK, "must be the same size"]),
        ("val", IMAGE, _write_text, ["image", "cannot be read", "replace it or take it off the list"]),
        ("val", MASK, _paint_red, ["mask", "is coloured", "--colours FILE"]),
        ("train", MASK, _class_77, ["mask", "value 77", "data.classes"]),
        ("val", "lists/{}.txt", Path.unlink, ["list", "does not exist", "README"]),
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
    checked = call(check_data, "--config", config, *overrides)
    (problem,) = re.findall("^PROBLEM (.*)", checked.out, re.MULTILINE)
    assert checked.code == 1 and str(path) in problem


def test_a_class_without_enough_images_is_refused_by_name(tiny: Path, config: Path, tmp_path: Path) -> None:
    result = call(train, "--config", config, f"run_dir={tmp_path / 'run'}", "data.shots=3")
    line = refused(result, tiny / "lists/train.txt", "3-shot episodes need 4", "data.shots", "data.min_area")
    assert line.split("class '")[1].split("'")[0] not in NOVEL


def test_a_truncated_jpeg_met_in_an_evaluation_is_refused(
    tiny: Path, config: Path, short: Path, tmp_path: Path
) -> None:
    """Its header says the right size, so only decoding meets it."""
    root, overrides = copied(tiny, tmp_path)
    for path in (root / "JPEGImages").glob("val_*.jpg"):
        _halve_file(path)
    command = ["--config", config, *overrides, "workers=1", "--checkpoint", short / "best.pt"]
    line = refused(call(test_command, *command), "replace it or take it off the list")
    assert re.match(rf"error: image {root}/JPEGImages/val_\d+\.jpg cannot be read", line)


def test_lists_that_share_images_are_refused_on_a_benchmark(tiny: Path, config: Path, tmp_path: Path) -> None:
    root, overrides = copied(tiny, tmp_path)
    first = (root / "lists/train.txt").read_text().splitlines()[0]
    with (root / "lists/val.txt").open("a") as file:
        file.write(f"{first}\n")
    result = call(train, "--config", config, *overrides, "data.dataset=COCO-20i")
    refused(result, "in both the training and the validation list", f"{root}/{first.split()[0]}")


# ---------------------------------------------------------------- checkpoints and weights


def test_a_checkpoint_of_something_else_is_refused(short: Path, config: Path) -> None:
    overrides = ["data.fold=1", "model.fem_scales=[1]"]
    result = call(test_command, "--config", config, "--checkpoint", short / "best.pt", *overrides)
    fold, scales = "data.fold is 0 there and 1 here", "model.fem_scales is [1.0, 0.5] there and [1.0] here"
    refused(result, short / "best.pt", fold, scales, "use the config it was trained with")


def test_a_damaged_checkpoint_is_refused(short: Path, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    refused(call(test_command, "--config", config, "--checkpoint", path), path, "does not exist")
    for content in ((short / "best.pt").read_bytes()[:5000], b"not a checkpoint\n"):
        path.write_bytes(content)
        refused(call(test_command, "--config", config, "--checkpoint", path), path, "damaged", "use another one")


def test_a_file_that_is_no_whole_checkpoint_is_refused(short: Path, config: Path, tmp_path: Path) -> None:
    state, path, name = load(short / "best.pt"), tmp_path / "best.pt", "fem.fuse.0.weight"
    without = {key: value for key, value in state["model"].items() if key != name}
    not_a_number = {**state["model"], name: torch.full_like(state["model"][name], torch.nan)}
    for content, piece in (
        (state["model"], "not a checkpoint of this project"),
        (state | {"model": without}, name),
        (state | {"model": not_a_number}, name),
    ):
        torch.save(content, path)
        refused(call(test_command, "--config", config, "--checkpoint", path), path, piece)


def test_weights_that_are_missing_of_another_backbone_or_out_of_reach_are_refused(
    config: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(url: str, *_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.chdir(tmp_path)  # without an initmodel/ that is filled
    command, none = ["--config", config, f"run_dir={tmp_path / 'run'}"], tmp_path / "initmodel/resnet50.pth"
    source = json.loads((short / "run.json").read_text())["weights"]["source"]
    refused(call(train, *command, f"model.weights={none}"), none, "does not exist", "model.weights")
    other = call(train, *command, "model.backbone=vgg16_bn", f"model.weights={source}")
    refused(other, source, "missing", "another architecture")
    refused(
        call(train, *command, "model.backbone=resnet50"),
        *("resnet50", "https://download.pytorch.org/", "initmodel/resnet50-", "no route to host"),
    )
    wrong = shutil.copy(source, tmp_path / "lite-0123abcd.pth")
    refused(call(train, *command, f"model.weights={wrong}"), wrong, f"begins with {sha256(Path(source))[:8]}")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- predict.py


@pytest.mark.parametrize("file", ["best.pt", "s.png", "m.png", "q.png"])
def test_predict_refuses_a_damaged_or_missing_file(file: str, short: Path, tmp_path: Path) -> None:
    shutil.copy(short / "best.pt", tmp_path)
    for n, name in enumerate(("s.png", "m.png", "q.png")):
        Image.fromarray(scene(1)[n % 2]).save(tmp_path / name)
    files = ["--support", tmp_path / "s.png", "--mask", tmp_path / "m.png", "--query", tmp_path / "q.png"]
    options = ["--checkpoint", tmp_path / "best.pt", "--out", tmp_path / "out", "--device", "cpu"]
    for damage in (_halve_file, Path.unlink):
        damage(tmp_path / file)
        refused(call(predict, *options, *files), tmp_path / file)
