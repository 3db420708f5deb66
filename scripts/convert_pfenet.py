"""Turn a checkpoint of PFENet's published code into one of ours: python scripts/convert_pfenet.py pfenet.pth out.pt

PFENet (github.com/dvlab-research/PFENet) with ResNet-50, ResNet-101 or VGG-16-bn; 1 and 5 shots share their weights.
The result is our model with everything off, and its logit PFENet's class-1 logit minus class-0 logit: softmax over two
classes is the sigmoid of their difference. Every entry must fit, by name and shape.

The file does not say which data set and fold it was trained on; test.py takes them from its --config. PFENet's models
for COCO-20i were trained at 641 pixels: for VGG-16-bn, --config configs/coco/resnet101_fold0_1shot.yaml
model.backbone=vgg16_bn data.image_size=641.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

from torch import Tensor

from model.backbone import fuse_batch_norm
from model.weights import read_weights
from util.config import TASK, keys_with, load_config
from util.engine.build import build_model
from util.engine.checkpoint import save_checkpoint
from util.engine.record import ROOT
from util.errors import UserError, first_of
from util.files import require_writable

ALL_OFF = ["model.bgem=false", "model.doem=false", "loss.pcl=0"]
LAST_IN_LAYER3 = {5: "resnet50", 22: "resnet101", 7: "vgg16_bn"}
"""last index with parameters in layer3: of 6 blocks, of 23 blocks, of VGG's last batch norm there"""
UNUSED = ("num_batches_tracked", "middle_scale")
"""endings of the entries without counterpart: nothing reads the first, and PFENet does not scale its features (1)"""
SCALES = range(4)
MODULES = {
    "backbone.stem": "layer0",
    **{f"backbone.stage{n}": f"layer{n}" for n in (1, 2, 3, 4)},
    "reduce_query": "down_query",
    "reduce_support": "down_supp",
    **{f"fem.scales.{n}.merge": f"init_merge.{n}.0" for n in SCALES},
    **{f"fem.scales.{n}.inter_scale": f"alpha_conv.{n - 1}" for n in SCALES[1:]},
    **{f"fem.scales.{n}.refine": f"beta_conv.{n}" for n in SCALES},
    **{f"fem.scales.{n}.classifier": f"inner_cls.{n}" for n in SCALES},
    "fem.fuse": "res1",
    "fem.refine": "res2",
    "fem.classifier": "cls",
}
"""our module: PFENet's; the names below them are the same"""
LOGITS = re.compile(r"fem\.(scales\.\d\.)?classifier\.3\.(weight|bias)")
"""our layers with one output where PFENet's have two"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pfenet", type=Path, help="checkpoint as PFENet's train.py saves it, or its state dict alone")
    parser.add_argument("out", type=Path, help="where to write ours, a .pt file")
    args = parser.parse_args()
    require_writable(args.out, ".pt")
    published, sha256 = read_weights(args.pfenet)  # without 'module.'; no code in the file is run
    backbone, deep_stem = recognise(published, args.pfenet)

    config_file = f"configs/pascal/{backbone}_fold0_1shot.yaml"
    config = load_config(ROOT / config_file, ALL_OFF)
    model, weights = build_model(config, "random", deep_stem=deep_stem, fuse=False)
    converted = convert(published, model.state_dict(), f"{args.pfenet} looks like PFENet with {backbone}, but")
    model.load_state_dict(model.state_dict() | converted)
    fuse_batch_norm(model.backbone)
    unrecorded = [key for key in sorted(keys_with(TASK)) if key.startswith("data.")]
    state = {
        "config": config.model_dump(),
        "unknown": [*unrecorded, "model.fem_scales", "model.prototype_channels", "seed"],  # test.py ignores these
        "weights": weights._replace(source=str(args.pfenet), sha256=sha256)._asdict(),
        "list_sha256": {},
        "step": 0,
        "best_miou": -1.0,
        "seconds": 0.0,
        "model": model.state_dict(),
    }
    save_checkpoint(args.out, state)

    print(f"recognised: PFENet with {backbone}, {weights.stem} stem; {len(converted)} tensors mapped, none left over")
    print(f"{args.pfenet}, SHA-256 {sha256}, is now {args.out}; give its data set and fold as --config, such as")
    print(f"python test.py --config {config_file} --checkpoint {shlex.quote(str(args.out))} {' '.join(ALL_OFF)}")


def recognise(published: dict[str, Tensor], path: Path) -> tuple[str, bool]:
    """Return the name of the backbone, and whether its stem is deep."""
    last = max((int(name.split(".")[1]) for name in published if name.startswith("layer3.")), default=None)
    if last not in LAST_IN_LAYER3:
        found = "no entry is named layer3.*" if last is None else f"its layer3 ends at index {last}"
        raise UserError(f"{path} is not PFENet with {', '.join(LAST_IN_LAYER3.values())}: {found}")
    # the third convolution of a deep stem; a standard stem ends before it, and VGG has a pool there
    return LAST_IN_LAYER3[last], any(name.startswith("layer0.6.") for name in published)


def convert(published: dict[str, Tensor], ours: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return PFENet's entries under our names, all but the ``UNUSED`` ones; every other one must fit."""
    wanted = {pfenet_name(name): name for name in ours if not name.endswith(UNUSED)}
    given = {name: value for name, value in published.items() if not name.endswith(UNUSED)}
    wrong = []
    for theirs, name in wanted.items():
        shape = (2, *ours[name].shape[1:]) if LOGITS.fullmatch(name) else tuple(ours[name].shape)
        if theirs in given and given[theirs].shape != shape:
            wrong.append(f"{theirs} {tuple(given[theirs].shape)} for {shape}")
    problems = {
        "missing": [name for name in wanted if name not in given],
        "unknown": [name for name in given if name not in wanted],
        "of another shape": wrong,
    }
    if found := [f"{len(names)} {kind} ({first_of(names, 3, ', ')})" for kind, names in problems.items() if names]:
        raise UserError(f"{source} has entries that do not fit: {', '.join(found)}; give an unchanged file of PFENet")
    converted = {name: given[theirs] for theirs, name in wanted.items()}
    for name in filter(LOGITS.fullmatch, converted):
        converted[name] = converted[name][1:] - converted[name][:1]  # target minus the rest
    return converted


def pfenet_name(name: str) -> str:
    """Return PFENet's name of one of our parameters."""
    module = next(module for module in MODULES if name.startswith(f"{module}."))
    return MODULES[module] + name.removeprefix(module)


if __name__ == "__main__":
    run_command(main)
