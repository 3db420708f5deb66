"""scripts/export.py from the command line: its files give the network's own probability."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from scripts import export
from tests.harness import call, load, process, refused, succeeded
from tests.scenes import SIDE, scene, spread, write_checkpoint
from util.data.transforms import fit, normalize
from util.engine.build import build_saved_model
from util.engine.checkpoint import load_checkpoint, saved_config

Episode = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
LARGER = SIDE + 8
PAIRS = [(2, 3), (4, 0), (1, 5), (0, 0)]
"""supports of one small and one large target, of none, of nothing but target"""


def episode(size: int, *seeds: int) -> Episode:
    """A query, and one support for each seed: 0 shows nothing, 1 is all target, the others show their disc."""
    images, masks = [fit(*scene(99), size)[0]], []
    for seed in seeds:
        image, disc = scene(seed)
        mask = np.full_like(disc, seed == 1) if seed < 2 else disc
        fitted, labels = fit(image, mask.astype(np.uint8), size)
        images.append(fitted)
        masks.append(np.ones_like(labels) if seed == 1 else labels)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels[:1], pixels[None, 1:], torch.from_numpy(np.stack(masks))[None]


def expected(checkpoint: Path, given: Episode) -> np.ndarray:
    """Probability of the network in eager mode, which skips positions off the target."""
    state = load_checkpoint(checkpoint)
    model = build_saved_model(saved_config(state, checkpoint), state, checkpoint).eval()
    query, supports, masks = given
    with torch.inference_mode():
        return model(normalize(query), normalize(supports), masks).logits.sigmoid().numpy()


def test_a_pt2_file_gives_the_networks_probability_at_its_shots_and_size(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep/er/small.pt2"
    options = ["--format", "pt2", "--out", out, "--shots", 2, "--size", LARGER]
    succeeded(process("scripts/export.py", "--checkpoint", checkpoint, *options))
    loaded = torch.export.load(out).module()
    for seeds in PAIRS:
        given = episode(LARGER, *seeds)
        probability = expected(checkpoint, given)
        assert spread(probability) > 0.01
        assert np.abs(loaded(*given).detach().numpy() - probability).max() < 1e-4, seeds
    held = sum(tensor.numel() for tensor in load(checkpoint)["model"].values()) * 4
    assert out.stat().st_size < 1.5 * held  # no weight twice


def test_an_onnx_file_gives_the_networks_probability(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    succeeded(call(export, "--checkpoint", checkpoint, "--format", "onnx", "--out", out, "--shots", 2))
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    for seeds in PAIRS:
        given = episode(SIDE, *seeds)
        named = dict(zip(("query", "supports", "support_masks"), (tensor.numpy() for tensor in given), strict=True))
        assert np.abs(session.run(None, named)[0] - expected(checkpoint, given)).max() < 1e-4, seeds


@pytest.mark.parametrize(
    "variant",
    [
        ["model.bgem=false", "model.doem=false", "loss.pcl=0"],
        [
            "model.elimination=single",
            "model.fem_prior=true",
            "model.do_similarity=true",
            "model.relative_target=true",
            "model.training_free=true",
        ],
        ["model.base_learner=true"],
    ],
    ids=["pfenet", "ours", "base learner"],
)
def test_every_network_exports(variant: list[str], tmp_path: Path) -> None:
    checkpoint, out = write_checkpoint(tmp_path / "variant.pt", *variant), tmp_path / "a.pt2"
    succeeded(call(export, "--checkpoint", checkpoint, "--format", "pt2", "--out", out))
    given = episode(SIDE, 3)
    difference = torch.export.load(out).module()(*given).detach().numpy() - expected(checkpoint, given)
    assert np.abs(difference).max() < 1e-4


def test_a_side_that_the_backbone_does_not_take_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    command = ["--checkpoint", checkpoint, "--format", "pt2", "--out", tmp_path / "a.pt2"]
    refused(call(export, *command, "--size", 64), "--size", "64", "65")
    assert list(tmp_path.iterdir()) == []
