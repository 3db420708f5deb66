"""Backbones of timm: a small ViT and a small CNN are trained, tested and predict, with weights from a file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import predict
from model.backbone import build_backbone
from model.torchvision_compat import import_models
from tests.harness import call, evaluated, load, refused, short_run, succeeded, test_command
from tests.scenes import scene, spread
from util.photos.segmenter import NTRESegmenter

import_models()
timm: Any = pytest.importorskip("timm")
NETWORKS = {"test_vit": ([2, 3, 5], 80, 16), "test_resnet": ([2, 3, 4], 64, 8)}
"""depths of the features, a side that fits, and the stride"""


def saved(name: str, folder: Path) -> tuple[nn.Module, Path]:
    """A network of timm with random weights, its classifier included, and the file they are in."""
    torch.manual_seed(0)
    options = {"dynamic_img_size": True} if name == "test_vit" else {"output_stride": 8}
    network = timm.create_model(name, **options).eval()
    path = folder / f"{name}.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_timms_at_three_depths(name: str, tmp_path: Path) -> None:
    (network, path), (depths, side, stride) = saved(name, tmp_path), NETWORKS[name]
    backbone, info = build_backbone(f"timm:{name}", weights=str(path))
    images = torch.randn(2, 3, side, 2 * side)
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    ours = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    rescaled = (images * ours[1] + ours[0] - mean) / std
    with torch.no_grad():
        expected = network.forward_intermediates(rescaled, indices=depths, norm=True, intermediates_only=True)
    masks = torch.zeros(2, side, 2 * side, dtype=torch.uint8)
    masks[:, : side // 2] = 1
    query, support = backbone.features(images), backbone.features(images, masks)

    def close(found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)

    close(query.middle, torch.cat(expected[:2], 1))
    close(query.high, expected[2])
    rows = side // stride // 2
    close(support.high[:, :, : rows - 1], expected[2][:, :, : rows - 1])
    assert not support.high[:, :, rows + 1 :].any()
    assert info.sha256 and query.middle.shape[1] == backbone.middle_channels
    assert query.high.shape[-2:] == (backbone.map_side(side), backbone.map_side(2 * side))


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_trained_tested_and_predicts(name: str, config: Path, tmp_path: Path) -> None:
    _, path = saved(name, tmp_path)
    chosen = [f"model.backbone=timm:{name}", f"model.weights={path}", f"data.image_size={NETWORKS[name][1]}"]
    run = short_run(config, tmp_path / "run", *chosen)
    assert load(run / "best.pt")["step"] > 2
    results = evaluated(config, run / "best.pt", tmp_path / "results.json", "--shots", 2, *chosen)
    assert results["episodes"] == 8 and 0 <= results["miou"]["mean"] <= 100
    result = NTRESegmenter.from_checkpoint(run / "best.pt", "cpu").segment(*scene(0), scene(1)[0])
    assert result.mask.shape == (48, 60) and spread(result.probability) > 0

    for file, pixels in (("s.png", scene(0)[0]), ("m.png", scene(0)[1]), ("q.png", scene(1)[0])):
        Image.fromarray(pixels).save(tmp_path / file)
    files = ["--support", tmp_path / "s.png", "--mask", tmp_path / "m.png", "--query", tmp_path / "q.png"]
    free = [*files, "--out", tmp_path, "--device", "cpu", "--backbone", f"timm:{name}", "--weights"]
    assert f"features of timm:{name}" in succeeded(call(predict, *free, path)).out
    assert Image.open(tmp_path / "q_mask.png").size == (60, 48)
    refused(call(predict, *free[:-2], "timm:test_vitt"), "no network 'test_vitt'; near are test_vit")
    checkpoint = ["--checkpoint", run / "best.pt", "--weights", path]
    refused(call(predict, *files, "--out", tmp_path, *checkpoint), "--weights is for training-free")


def test_safetensors_are_read_and_baselines_take_another_backbone(config: Path, tmp_path: Path) -> None:
    network, _ = saved("test_vit", tmp_path)
    path = tmp_path / "vit.safetensors"
    pytest.importorskip("safetensors.torch").save_file(network.state_dict(), path)
    out = tmp_path / "r.json"
    options = ["--baselines", "--backbone", "timm:test_vit", "--weights", path, "eval.episodes=1", "--out", out]
    succeeded(call(test_command, "--config", config, *options))
    assert 0 <= json.loads(out.read_text())["baselines"]["training_free"]["miou"]["mean"] <= 100
    path.write_bytes(path.read_bytes()[:-200])
    refused(call(test_command, "--config", config, *options), path, "fetch it again")
    refused(call(test_command, "--config", config, "--baselines", "--weights", path), "--weights of --backbone")
