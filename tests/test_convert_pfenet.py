"""scripts/convert_pfenet.py: what it writes computes what PFENet computes, and nothing else is taken for PFENet.

The input has the names and shapes of PFENet's published code; the oracle is tests/pfenet.py.
"""

import pickle
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pfenet import (
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
from torch import Tensor
from util.engine.run_state import _checkpoint_to_resume

from model.ntrenet import NTRENet
from model.weights import sha256_of
from scripts import convert_pfenet
from tests.harness import ROOT, Result, Trap, call, load, refused, succeeded, test_command
from util.config import config_from_dict, load_config
from util.data.synthetic import generate
from util.engine.build import build_model
from util.errors import UserError

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
    """Parameters of a parallel module, beside the epoch and an optimiser that has made a step."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([{"params": [weight]}], lr=0.0025, momentum=0.9, weight_decay=1e-4)
    weight.sum().backward()
    optimizer.step()
    return {
        "epoch": 199,
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "optimizer": optimizer.state_dict(),
    }


class Converted(NamedTuple):
    kind: str
    backbone: State
    head: State
    pfenet: Path
    out: Path
    result: Result


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    """Each kind is converted once."""
    return cache(partial(convert, folder=tmp_path_factory.mktemp("pfenet")))


@pytest.fixture(params=BACKBONES)
def converted(request: pytest.FixtureRequest, conversions: Callable[[str], Converted]) -> Converted:
    return conversions(request.param)


def convert(kind: str, folder: Path) -> Converted:
    torch.manual_seed(1)
    backbone, head = random_state(BACKBONES[kind][0]), pfenet_head(256, PASCAL_BINS, True, MIDDLE_CHANNELS[kind])
    for name in head:
        if re.fullmatch(r"(inner_cls\.\d|cls)\.3\.weight", name):
            head[name] /= 40  # logits of a few units, as a trained network's
    source, out = folder / f"{kind}.pth", folder / f"{kind}.pt"
    # PFENet's torch 1.4 wrote files that are no zip archives
    torch.save(as_train_saves(published(backbone, head)), source, _use_new_zipfile_serialization=False)
    result = succeeded(call(convert_pfenet, source, out))
    return Converted(kind, backbone, head, source, out, result)


@pytest.fixture
def model(converted: Converted) -> NTRENet:
    """As the checkpoint's own config says."""
    checkpoint = load(converted.out)
    config = config_from_dict(checkpoint["config"], "test")
    model, _ = build_model(config, "random", deep_stem=checkpoint["weights"]["stem"] == "deep")
    model.load_state_dict(checkpoint["model"])
    return model.eval()


@pytest.mark.parametrize(
    ("converted", "shots"),
    [("resnet50", 1), ("resnet50", 5), pytest.param("vgg16_bn", 1, marks=pytest.mark.slow)],
    indirect=["converted"],
)
@torch.no_grad()
def test_the_logit_of_the_converted_model_is_pfenets_difference_of_two(
    converted: Converted, model: NTRENet, shots: int
) -> None:
    torch.manual_seed(shots)
    query, supports, masks = episode(1, shots, (SIDE[converted.kind],) * 2)
    naive = BACKBONES[converted.kind][1](converted.backbone)
    expected, _, _, inner = pfenet(naive, converted.head, query, supports, masks, PASCAL_BINS)
    got = model(query, supports, masks)
    assert difference(expected).std() > 0.1
    assert difference(expected).abs().max() > 1
    assert (got.logits - difference(expected)).abs().max() < 1e-3
    for logits, wanted in zip(got.fem.scale_logits, inner, strict=True):
        assert (logits - difference(wanted)).abs().max() < 1e-3


def test_the_command_says_what_it_took_and_what_to_do_next(converted: Converted) -> None:
    _, out, err = converted.result
    entries = [name for name in published(converted.backbone, converted.head) if "num_batches" not in name]
    stem = "standard" if converted.kind == "vgg16_bn" else "deep"
    assert f"PFENet with {converted.kind}, {stem} stem; {len(entries)} tensors mapped" in out
    assert sha256_of(converted.pfenet) in out
    next_command = (
        f"python test.py --config configs/pascal/{converted.kind}_fold0_1shot.yaml --checkpoint {converted.out}"
        " model.bgem=false model.doem=false loss.pcl=false"
    )
    assert out.splitlines()[-1] == next_command
    assert err == ""


def test_the_checkpoint_is_of_this_project_and_names_what_nobody_knows(converted: Converted) -> None:
    checkpoint = load(converted.out)
    names = {"format", "config", "weights", "list_sha256", "step", "best_miou", "seconds", "model"}
    assert set(checkpoint) == names | {"unknown"}
    assert checkpoint["weights"]["sha256"] == sha256_of(converted.pfenet)
    config = load_config(ROOT / f"configs/pascal/{converted.kind}_fold0_1shot.yaml", convert_pfenet.ALL_OFF)
    assert config_from_dict(checkpoint["config"], "test") == config
    unknown = {
        *("dataset", "classes", "base_classes", "fold_scheme", "folds", "fold", "image_size"),
        *("fem_scales", "prototype_channels", "seed"),
    }
    assert {key.rpartition(".")[2] for key in checkpoint["unknown"]} == unknown


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command line that evaluates two episodes of a small data set at 65 pixels with ResNet-50."""
    root = tmp_path_factory.mktemp("data")
    generate(root, 24, 32)
    lists = [f"data.{name}_list={root}/lists/{name}.txt" for name in ("train", "val")]
    config = ROOT / "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml"
    size = ["data.image_size=65", "data.min_area=256", "eval.episodes=2", "precision=fp32", "device=cpu", "workers=0"]
    return [
        "--config",
        str(config),
        f"data.root={root}",
        *lists,
        *size,
        "model.backbone=resnet50",
        "model.channels=256",
    ]


@pytest.mark.parametrize("converted", ["resnet50"], indirect=True)
def test_test_py_evaluates_a_converted_checkpoint_on_the_fold_it_is_given(
    converted: Converted, tiny: list[str], tmp_path: Path
) -> None:
    results = tmp_path / "results.json"
    command = ["--checkpoint", str(converted.out), *tiny, *convert_pfenet.ALL_OFF]
    ends = {
        0: call(test_command, *command),
        2: call(test_command, *command, "data.fold=2", "data.shots=2", "--out", results),
    }
    for fold, (code, out, err) in ends.items():
        assert code == 0, err
        note = (
            f"note: checkpoint {converted.out} does not say which fold it was trained on; it is tested on fold {fold}"
        )
        assert [line for line in out.splitlines() if line.startswith("note")] == [f"{note} as given"]
        assert f"Synthetic-5i fold {fold} of 4" in out
    assert '"train_seed": null' in results.read_text()


@pytest.mark.parametrize("converted", ["resnet50"], indirect=True)
def test_what_a_converted_checkpoint_does_say_is_still_compared(converted: Converted, tiny: list[str]) -> None:
    refused(call(test_command, "--checkpoint", converted.out, *tiny), "model.bgem is False there and True here")
    other = [*tiny, *convert_pfenet.ALL_OFF, "model.backbone=resnet101"]
    refused(call(test_command, "--checkpoint", converted.out, *other), "model.backbone is resnet50 there")


@pytest.mark.parametrize("converted", ["resnet50"], indirect=True)
def test_training_does_not_resume_from_a_converted_checkpoint(converted: Converted, tmp_path: Path) -> None:
    overrides = [*convert_pfenet.ALL_OFF, f"resume={converted.out}", f"run_dir={tmp_path}"]
    config = load_config(ROOT / "configs/pascal/resnet50_fold0_1shot.yaml", overrides)
    with pytest.raises(UserError, match="holds a model only"):
        _checkpoint_to_resume(config, {})


@pytest.mark.parametrize("converted", ["resnet50"], indirect=True)
def test_a_file_is_not_converted_onto_itself(converted: Converted, tmp_path: Path) -> None:
    link = tmp_path / "link.pt"
    link.symlink_to(converted.pfenet)
    before = sha256_of(converted.pfenet)
    refused(call(convert_pfenet, converted.pfenet, converted.pfenet), "is the file to be converted")
    refused(call(convert_pfenet, converted.pfenet, link), "is the file to be converted")
    assert sha256_of(converted.pfenet) == before


# Files that take no room: names and shapes alone


def hollow(**options: Any) -> State:
    shapes = {name: tuple(value.shape) for name, value in pfenet_head(256, PASCAL_BINS, True, 1536).items()}
    return published(hollow_state(resnet_shapes(**options)), hollow_state(shapes))


@pytest.mark.parametrize(
    ("backbone", "blocks"),
    [pytest.param("resnet50", (3, 4, 6, 3), marks=pytest.mark.slow), ("resnet101", (3, 4, 23, 3))],
)
def test_a_bare_state_dict_with_a_standard_stem_and_without_counters_is_converted(
    backbone: str, blocks: tuple[int, ...], tmp_path: Path
) -> None:
    whole = hollow(deep=False, blocks=blocks)
    state = {name: value for name, value in whole.items() if "num_batches" not in name}
    torch.save(state, tmp_path / "pfenet.pth")
    code, out, err = call(convert_pfenet, tmp_path / "pfenet.pth", tmp_path / "out.pt")
    assert code == 0, err
    assert f"{backbone}, standard stem; {len(state)} tensors mapped" in out
    assert load(tmp_path / "out.pt")["weights"]["stem"] == "standard"
    (tmp_path / "out.pt").unlink()


def _extra(state: State) -> None:
    state.update({f"aux.{n}.weight": torch.zeros(1) for n in range(4)})


def _missing(state: State) -> None:
    del state["layer3.5.conv2.weight"], state["alpha_conv.2.0.weight"]


def _three_classes(state: State) -> None:
    state["cls.3.weight"] = torch.zeros(3, 256, 1, 1)


def _deeper(state: State) -> None:
    state["layer3.35.conv1.weight"] = torch.zeros(1)


def _torchvision(state: State) -> None:
    state.clear()
    state.update(hollow_state(resnet_shapes(deep=True)))


def _empty(state: State) -> None:
    state.clear()


@pytest.mark.parametrize(
    ("damage", "pieces"),
    [
        (_extra, ["4 unknown (aux.0.weight, aux.1.weight, aux.2.weight, ...)"]),
        (_missing, ["2 missing (", "layer3.5.conv2.weight", "alpha_conv.2.0.weight"]),
        (_three_classes, ["1 of another shape (cls.3.weight (3, 256, 1, 1) for (2, 256, 1, 1))"]),
        (_deeper, ["layer3 ends at index 35"]),
        (_torchvision, ["missing (", "unknown (conv1.weight, "]),
        (_empty, ["no entry is named layer3"]),
    ],
)
def test_a_state_dict_that_is_not_pfenets_is_refused(
    damage: Callable[[State], None], pieces: list[str], tmp_path: Path
) -> None:
    state, path, out = hollow(deep=True), tmp_path / "pfenet.pth", tmp_path / "out.pt"
    damage(state)
    torch.save(as_train_saves(state), path)
    refused(call(convert_pfenet, path, out), path, *pieces)
    assert not out.exists()


@pytest.mark.parametrize("form", ["torch file", "bare pickle"])
def test_code_in_a_file_is_not_run_and_the_remedy_is_named(form: str, tmp_path: Path) -> None:
    path, target = tmp_path / "pfenet.pth", tmp_path / "exploded"
    content = {"state_dict": {}, "args": Trap(target)}
    if form == "torch file":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    refused(call(convert_pfenet, path, tmp_path / "out.pt"), path, "state dict alone", "where you trust its source")
    assert not target.exists()


def test_text_and_an_absent_file_and_a_checkpoint_of_this_project_are_refused(tmp_path: Path) -> None:
    text, ours, out = tmp_path / "text.pth", tmp_path / "ours.pt", tmp_path / "out.pt"
    text.write_text("not a checkpoint\n")
    torch.save({"format": 3, "config": {}, "model": {"fem.fuse.0.weight": torch.zeros(1)}}, ours)
    refused(call(convert_pfenet, text, out), text, "cannot be read")
    refused(call(convert_pfenet, ours, out), ours, "does not hold a state dict")
    refused(call(convert_pfenet, tmp_path / "none.pth", out), "none.pth does not exist")
    refused(call(convert_pfenet, text, tmp_path / "out.pth"), "must end in .pt")


def test_every_module_of_the_all_off_model_has_one_name_in_pfenet() -> None:
    theirs = list(convert_pfenet.MODULES.values())
    assert len(set(theirs)) == len(theirs)
    tops = {name.split(".")[0] for name in hollow(deep=True)}
    assert {name.split(".")[0] for name in theirs} == tops
