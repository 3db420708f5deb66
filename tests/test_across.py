"""test.py --across: a network on other data than its own, leaks, and the layouts of the cross-domain sets."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from scripts import make_lists
from tests.harness import NOVEL, ROOT, call, refused, succeeded, test_command
from util.config import load_config
from util.data.folds import base_classes, novel_classes
from util.engine.build import build_eval_sampler, build_index

ACROSS = ROOT / "configs/across"
SAME = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle"}
SAME |= {"pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}
MASKS = {"deepglobe": "../groundtruth/{}.png", "lung": "../masks/{}_mask.png"}
MASKS |= {"isic": "../../ISIC2018_Task1_Training_GroundTruth/{}_segmentation.png"}
IMAGES = {"deepglobe": "{}/test/origin/{}.jpg", "isic": "ISIC2018_Task1-2_Training_Input/{}/{}.jpg"}
IMAGES |= {"lung": "CXR_png/{1}.png"}


def test_the_folds_of_coco_to_pascal_hold_exactly_what_coco_does_not_train_on() -> None:
    pascal = yaml.safe_load((ROOT / "configs/base/pascal.yaml").read_text())["data"]["classes"]
    coco = yaml.safe_load((ROOT / "configs/base/coco.yaml").read_text())["data"]["classes"]
    names = [SAME.get(name, name) for name in pascal]
    for fold in range(4):
        data = load_config(ACROSS / "coco_to_pascal.yaml", [f"data.fold={fold}"]).data
        assert data.classes == names, "mask values keep their meaning"
        assert {data.classes[c - 1] for c in novel_classes(data)} == set(names) & set(coco[fold::4])


def write_layout(root: Path, layout: str, classes: int) -> dict[Path, int]:
    """Six images of each class and one without a mask; returns the target's pixels in each mask, by image."""
    pixels = {}
    for n in range(6 * classes + 1):
        image = root / IMAGES[layout].format(n % classes + 1, f"x_{n}")
        mask = image.parent / MASKS[layout].format(image.stem)
        image.parent.mkdir(parents=True, exist_ok=True)
        mask.resolve().parent.mkdir(parents=True, exist_ok=True)
        values = np.zeros((60, 80), np.uint8)
        values[5 : 20 + n, 5:50] = 255
        Image.fromarray(np.stack([values // 2 + 60] * 3, -1) if image.suffix == ".jpg" else values // 2).save(image)
        if n < 6 * classes:
            Image.fromarray(values if n % 2 else np.stack([values] * 3, -1)).save(mask)
            pixels[image] = int((values > 0).sum())
    return pixels


@pytest.mark.parametrize(("layout", "classes"), [("deepglobe", 6), ("isic", 3), ("lung", 1)])
def test_a_network_is_tested_on_the_published_layout(layout: str, classes: int, short: Path, tmp_path: Path) -> None:
    pixels = write_layout(tmp_path / "data", layout, classes)
    making = ["--layout", layout, "--root", tmp_path / "data", "--out", tmp_path]
    out = succeeded(call(make_lists, *making)).out
    assert f"{len(pixels)} images, 1 without a mask" in out
    at = [f"data.root={tmp_path}/data", f"data.val_list={tmp_path}/val.txt"]
    at += ["device=cpu", "workers=0", "precision=fp32"]
    config = load_config(ACROSS / f"{layout}.yaml", at)
    index = build_index(config, "val")
    assert len(index.items) == len(pixels)
    for item, counted in zip(index.items, index.pixels, strict=True):
        number = 1 if layout == "lung" else int(item.image.relative_to(tmp_path / "data").parts[layout == "isic"])
        assert counted[number] == pixels[item.image] and np.count_nonzero(counted[1:]) == 1
    sampler = build_eval_sampler(config, index, 0)
    assert {sampler(n).class_id for n in range(100)} == set(range(1, classes + 1))

    command = ["--config", ACROSS / f"{layout}.yaml", "--across", "--checkpoint", short / "best.pt", *at]
    done = succeeded(call(test_command, *command, "eval.episodes=6", "--out", tmp_path / "r.json"))
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["trained_on"] == "Synthetic-5i fold 0" and "trained on Synthetic-5i fold 0: 6 episodes" in done.out
    assert (results["config"]["data"]["image_size"], results["backbone"]) == (65, "efficientnet_lite0")
    assert list(results["per_class"]) == config.data.classes
    if layout == "lung":
        (tmp_path / "data/masks").rename(tmp_path / "data/elsewhere")
        refused(call(make_lists, *making), "no images CXR_png")


def test_a_planted_leak_is_refused_and_what_is_left_out_is_no_leak(config: Path, short: Path, tmp_path: Path) -> None:
    learned = load_config(config).data
    names = [learned.classes[c - 1] for c in base_classes(learned)]
    other = tmp_path / "other.yaml"
    text = "data: {{dataset: Other, classes: {0}, folds: [[a, '{1}']]}}"
    others = ["a", names[3].replace("_", " ").title(), *(f"x{n}" for n in range(18))]  # in other letters
    other.write_text(text.format(json.dumps(others), others[1]))
    command = ["--config", config, other, "--across", "--checkpoint", short / "best.pt", "eval.episodes=2"]
    pieces = ["was trained on", others[1], "(Synthetic-5i, fold 0)", f"data.left_out='[{others[1]}]'"]
    refused(call(test_command, *command), *pieces)
    succeeded(call(test_command, *command, f"data.left_out=[{others[1]}]"))
    refused(call(test_command, *command[:3], *command[4:], f"data.left_out=[{others[1]}]"), "does not fit this config")
    other.write_text("data: {dataset: Same, fold: 0}")
    assert NOVEL[0] in succeeded(call(test_command, *command)).out
    other.write_text("data: {dataset: Same, fold: 1}")
    refused(call(test_command, *command), "was trained on")
