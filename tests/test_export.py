"""Exported files against the network's own forward, on pictures that the exporter has not seen."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import SIDE, scene, spread, write_checkpoint
from util.segment.segmenter import NTRESegmenter

from scripts import export
from tests.harness import call
from util.data.transforms import fit, normalize
from util.errors import UserError

LARGER = SIDE + 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = write_checkpoint(tmp_path_factory.mktemp("export") / "small.pt")
    yield path
    path.unlink()


def run(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, out: Path, *options: object) -> None:
    command = ["export.py", "--checkpoint", checkpoint, "--format", out.suffix[1:], "--out", out, *options]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    export.main()


def episode(size: int, *seeds: int) -> export.Episode:
    """A scene to search, and one support a seed: 0 shows nothing, 1 is all target, the others show their disc."""
    pictures, masks = [fit(*scene(99), size)[0]], []
    for seed in seeds:
        picture, disc = scene(seed)
        mask = np.full_like(disc, seed == 1) if seed < 2 else disc
        fitted, labels = fit(picture, mask.astype(np.uint8), size)
        pictures.append(fitted)
        masks.append(np.ones_like(labels) if seed == 1 else labels)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return pixels[:1], pixels[None, 1:], torch.from_numpy(np.stack(masks))[None]


def expected(checkpoint: Path, given: export.Episode) -> np.ndarray:
    """Probability of the network itself, with its varying number of positions."""
    model = NTRESegmenter.from_checkpoint(checkpoint, "cpu", "fp32").model
    query, supports, masks = given
    with torch.inference_mode():
        return model(normalize(query), normalize(supports), masks).logits.sigmoid().numpy()


PAIRS = [(2, 3), (4, 0), (1, 5), (1, 1), (0, 0)]
"""supports of one small and one large target, of none, of nothing but target"""


def test_a_pt2_file_gives_the_networks_probability_at_its_shots_and_size(checkpoint, tmp_path, monkeypatch) -> None:
    out = tmp_path / "deep/er/small.pt2"
    run(monkeypatch, checkpoint, out, "--shots", 2, "--size", LARGER)
    loaded = torch.export.load(out).module()
    for seeds in PAIRS:
        given = episode(LARGER, *seeds)
        truth = expected(checkpoint, given)
        assert spread(truth) > 0.01
        assert np.abs(loaded(*given).detach().numpy() - truth).max() < 1e-4, seeds
    with pytest.raises(AssertionError, match="Guard failed"):
        loaded(*episode(LARGER, 2))  # another number of shots
    assert [path.name for path in out.parent.iterdir()] == ["small.pt2"]
    held = sum(tensor.numel() for tensor in torch.load(checkpoint, weights_only=True)["model"].values()) * 4
    assert out.stat().st_size < 1.5 * held  # no weight twice


def test_an_onnx_file_gives_the_networks_probability(checkpoint, tmp_path, monkeypatch) -> None:
    reason = "onnxruntime is an extra: pip install -r requirements-export.txt"
    onnxruntime = pytest.importorskip("onnxruntime", reason=reason)
    pytest.importorskip("onnxscript", reason=reason)
    out = tmp_path / "small.onnx"
    run(monkeypatch, checkpoint, out, "--shots", 2)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    shapes = {one.name: (one.type, one.shape) for one in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {
        "query": ("tensor(uint8)", [1, 3, SIDE, SIDE]),
        "supports": ("tensor(uint8)", [1, 2, 3, SIDE, SIDE]),
        "support_masks": ("tensor(uint8)", [1, 2, SIDE, SIDE]),
        "probability": ("tensor(float)", [1, 1, SIDE, SIDE]),
    }
    for seeds in PAIRS:
        given = episode(SIDE, *seeds)
        named = dict(zip(("query", "supports", "support_masks"), (tensor.numpy() for tensor in given), strict=True))
        assert np.abs(session.run(None, named)[0] - expected(checkpoint, given)).max() < 1e-4, seeds


@pytest.mark.parametrize(
    "variant",
    [
        ["model.bgem=false", "model.doem=false", "loss.pcl=false"],
        ["model.doem=false", "loss.pcl=false"],
        ["model.elimination=per_scale"],
        ["model.base_learner=true"],
    ],
)
def test_keeping_all_positions_changes_no_ablation(variant: list[str], tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "variant.pt", *variant)
    network = export.FixedShots(NTRESegmenter.from_checkpoint(checkpoint, "cpu", "fp32").model)
    for seeds in ((2,), (3, 0, 1)):
        given = episode(SIDE, *seeds)
        with torch.inference_mode():
            assert np.abs(network(*given).numpy() - expected(checkpoint, given)).max() < 1e-5


def test_a_file_that_differs_from_the_network_is_not_kept(checkpoint, tmp_path, monkeypatch) -> None:
    def write(program: object, path: Path) -> export.Run:
        path.write_bytes(b"wrong")
        return lambda given: torch.full((1, 1, SIDE, SIDE), torch.nan)

    monkeypatch.setattr(export, "export", lambda network, example: None)
    monkeypatch.setitem(export.WRITERS, "pt2", write)
    with pytest.raises(UserError, match="differs by nan"):
        run(monkeypatch, checkpoint, tmp_path / "small.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "model.onnx"], "model.onnx must end in .pt2"),
        (["--shots", "0"], "--shots must be 1 or more, got 0"),
        (["--size", "64"], "--size must be 8n + 1, such as 65, got 64"),
    ],
)
def test_wrong_options_are_refused(checkpoint, tmp_path, monkeypatch, options: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words.replace("+", r"\+")):
        run(monkeypatch, checkpoint, tmp_path / "small.pt2", *options)


def test_missing_packages_are_named_with_the_remedy(checkpoint, tmp_path, monkeypatch) -> None:
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    with pytest.raises(UserError, match=r"needs onnx, onnxscript, onnxruntime: pip install -r requirements"):
        run(monkeypatch, checkpoint, tmp_path / "small.onnx")


def test_a_missing_checkpoint_ends_the_command_with_one_line(tmp_path: Path) -> None:
    out = tmp_path / "a.pt2"
    done = call(export, "--checkpoint", "none.pt", "--format", "pt2", "--out", out)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: checkpoint none.pt does not exist") and done.err.count("\n") == 1
