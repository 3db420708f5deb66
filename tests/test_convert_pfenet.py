"""scripts/convert_pfenet.py: its checkpoints predict what PFENet predicts, and other files are refused.

The input has the names and shapes of PFENet's published code; the oracle is tests/pfenet.py.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from model.weights import sha256_of
from scripts import convert_pfenet
from tests.harness import ROOT, Result, call, load, refused, succeeded, test_command
from tests.networks import trained_without_dropout
from tests.pfenet import (
    NaiveResNet,
    NaiveVGG,
    difference,
    episode,
    hollow_state,
    pfenet,
    pfenet_head,
    random_state,
    resnet_shapes,
    vgg_shapes,
)
from util.config import config_from_dict, load_config
from util.engine.build import build_saved_model

State = dict[str, Tensor]
PASCAL_BINS = (60, 30, 15, 8)
BACKBONES: dict[str, tuple[dict[str, Any], type]] = {
    "resnet50": (resnet_shapes(deep=True), NaiveResNet),
    "vgg16_bn": (vgg_shapes(), NaiveVGG),
}
MIDDLE_CHANNELS = {"resnet50": 1536, "vgg16_bn": 768}
SIDE = {"resnet50": 73, "vgg16_bn": 97}
RESNET_STEM = ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3")
VGG_STARTS = (0, 7, 14, 24, 34)
"""indices in VGG's features at which PFENet's layer0 to layer4 begin"""


def published(backbone: State, head: State) -> State:
    """A weights file's backbone and PFENet's head as one state dict of PFENet's code."""
    state: State = {}
    for name, value in backbone.items():
        module, _, rest = name.partition(".")
        if module in ("fc", "classifier"):
            continue
        if module == "features":
            index, _, rest = rest.partition(".")
            layer = max(n for n, start in enumerate(VGG_STARTS) if start <= int(index))
            name = f"layer{layer}.{int(index) - VGG_STARTS[layer]}.{rest}"
        elif module in RESNET_STEM:
            name = f"layer0.{RESNET_STEM.index(module)}.{rest}"
        state[name] = value
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(5953 * 50)
    return state | head


def as_train_saves(state: State) -> dict[str, Any]:
    return {"epoch": 199, "state_dict": {f"module.{name}": value for name, value in state.items()}, "optimizer": {}}


class Converted(NamedTuple):
    kind: str
    backbone: State
    head: State
    pfenet: Path
    out: Path
    result: Result


@pytest.fixture(scope="module", params=BACKBONES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    kind, folder = request.param, tmp_path_factory.mktemp("pfenet")
    torch.manual_seed(1)
    backbone, head = random_state(BACKBONES[kind][0]), pfenet_head(256, PASCAL_BINS, True, MIDDLE_CHANNELS[kind])
    for name in head:
        if re.fullmatch(r"(inner_cls\.\d|cls)\.3\.weight", name):
            head[name] /= 40  # logits of a few units, as a trained network's
    source, out = folder / f"{kind}.pth", folder / f"{kind}.pt"
    # PFENet's torch 1.4 wrote files that are no zip archives
    torch.save(as_train_saves(published(backbone, head)), source, _use_new_zipfile_serialization=False)
    return Converted(kind, backbone, head, source, out, succeeded(call(convert_pfenet, source, out)))


@pytest.mark.parametrize(
    ("converted", "shots"),
    [("resnet50", 1), ("resnet50", 5), pytest.param("vgg16_bn", 1, marks=pytest.mark.slow)],
    indirect=["converted"],
)
@torch.no_grad()
def test_the_logit_of_the_converted_model_is_pfenets_difference_of_two(converted: Converted, shots: int) -> None:
    checkpoint = load(converted.out)
    model = build_saved_model(config_from_dict(checkpoint["config"], "test"), checkpoint, converted.out)
    torch.manual_seed(shots)
    query, supports, masks = episode(1, shots, (SIDE[converted.kind],) * 2)
    naive = BACKBONES[converted.kind][1](converted.backbone)
    expected, _, _, inner = pfenet(naive, converted.head, query, supports, masks, PASCAL_BINS)
    got = trained_without_dropout(model)(query, supports, masks)
    assert difference(expected).std() > 0.1 and difference(expected).abs().max() > 1
    for logits, wanted in zip((got.logits, *got.fem.scale_logits), (expected, *inner), strict=True):
        assert (logits - difference(wanted)).abs().max() < 1e-3


def test_the_command_names_what_it_found_and_how_to_test_it(converted: Converted) -> None:
    out, checkpoint = converted.result.out, load(converted.out)
    assert checkpoint["weights"]["stem"] == ("standard" if converted.kind == "vgg16_bn" else "deep")
    assert checkpoint["weights"]["sha256"] == sha256_of(converted.pfenet)
    config = f"configs/pascal/{converted.kind}_fold0_1shot.yaml"
    command = f"python test.py --config {config} --checkpoint {converted.out} {' '.join(convert_pfenet.ALL_OFF)}"
    assert out.splitlines()[-1] == command
    assert config_from_dict(checkpoint["config"], "test") == load_config(ROOT / config, convert_pfenet.ALL_OFF)


@pytest.mark.parametrize("converted", ["resnet50"], indirect=True)
def test_test_py_evaluates_a_converted_checkpoint_on_the_fold_it_is_given(
    converted: Converted, config: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results.json"
    small = ["model.channels=256", "model.fem_scales=[1, 0.5, 0.25, 0.125]", "eval.episodes=2"]
    network = ["--checkpoint", converted.out, "--config", config, "model.backbone=resnet50", *small]
    data = "data.fold=2", "data.shots=2", "--out", results
    out = succeeded(call(test_command, *network, *convert_pfenet.ALL_OFF, *data)).out
    (note,) = [line for line in out.splitlines() if line.startswith("note")]
    assert str(converted.out) in note and "fold 2" in note and "Synthetic-5i fold 2 of 4" in out
    assert '"train_seed": null' in results.read_text()
    refused(call(test_command, *network), "model.bgem is False there and True here")
    other = [*network, *convert_pfenet.ALL_OFF, "model.backbone=resnet101"]
    refused(call(test_command, *other), "model.backbone is resnet50 there")


def hollow(**options: Any) -> State:
    """Names and shapes of a file, as tensors that take no room."""
    shapes = {name: tuple(value.shape) for name, value in pfenet_head(256, PASCAL_BINS, True, 1536).items()}
    return published(hollow_state(resnet_shapes(**options)), hollow_state(shapes))


def test_a_bare_state_dict_with_a_standard_stem_and_without_counters_is_converted(tmp_path: Path) -> None:
    whole = hollow(deep=False, blocks=(3, 4, 23, 3))
    state = {name: value for name, value in whole.items() if "num_batches" not in name}
    torch.save(state, tmp_path / "pfenet.pth")
    out = succeeded(call(convert_pfenet, tmp_path / "pfenet.pth", tmp_path / "out.pt")).out
    assert f"resnet101, standard stem; {len(state)} tensors mapped" in out
    (tmp_path / "out.pt").unlink()


CHANGES: list[tuple[Iterable[str], dict[str, Any], list[str]]] = [  # entries removed and added -> pieces of the message
    ([], {"aux.0.weight": torch.zeros(1)}, ["1 unknown (aux.0.weight)"]),
    (["layer3.5.conv2.weight", "alpha_conv.2.0.weight"], {}, ["2 missing (", "layer3.5.conv2", "alpha_conv.2.0"]),
    ([], {"cls.3.weight": torch.zeros(3, 256, 1, 1)}, ["1 of another shape (cls.3.weight"]),
    (hollow(deep=True), hollow_state(resnet_shapes(deep=True)), ["missing (", "unknown (conv1.weight, "]),
]


@pytest.mark.parametrize(("removed", "added", "pieces"), CHANGES)
def test_a_state_dict_that_is_not_pfenets_is_refused(
    removed: Iterable[str], added: dict[str, Any], pieces: list[str], tmp_path: Path
) -> None:
    path, out = tmp_path / "pfenet.pth", tmp_path / "out.pt"
    state = {name: value for name, value in hollow(deep=True).items() if name not in removed}
    torch.save(as_train_saves(state | added), path)
    refused(call(convert_pfenet, path, out), path, *pieces)
    assert not out.exists()
