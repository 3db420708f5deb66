"""Export a checkpoint to deploy its network without this repository: ONNX, or PyTorch's own .pt2.

    pip install -r requirements-export.txt    # for --format onnx alone
    python scripts/export.py --checkpoint runs/.../best.pt --format onnx --out ntrenet.onnx [--shots 5] [--size 473]

Inputs, all uint8: query (1, 3, S, S) and supports (1, K, 3, S, S), RGB; support_masks (1, K, S, S): 1 target, 0 other,
255 ignored. Output: probability (1, 1, S, S). Normalisation is part of the file; K and S are fixed.

The file is read back, run, and compared with the network on random episodes; if they differ by more than 1e-3, it is an
error, and no file is kept.
"""

import argparse
import importlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from model import IGNORE
from model.ntrenet import NTRENet
from util.data.transforms import normalize
from util.engine.build import build_saved_model
from util.engine.checkpoint import load_checkpoint, saved_config
from util.errors import UserError
from util.files import require_writable, write_atomically

NAMES = ["query", "supports", "support_masks"]
TOLERANCE = 1e-3
EPISODES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--format", choices=["onnx", "pt2"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="the file, ending in .onnx or .pt2")
    parser.add_argument("--shots", type=int, default=1, help="supports of an episode, K")
    parser.add_argument("--size", type=int, help="side of the square input, S; by default the checkpoint's")
    args = parser.parse_args()
    require_writable(args.out, f".{args.format}")
    if args.format == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        raise UserError("--format onnx needs more packages: pip install -r requirements-export.txt")
    checkpoint = load_checkpoint(args.checkpoint)
    config = saved_config(checkpoint, args.checkpoint)
    model = build_saved_model(config, checkpoint, args.checkpoint).eval()
    size = config.data.image_size if args.size is None else args.size
    try:
        model.backbone.check_image_size(size)
    except ValueError as error:
        raise UserError(f"--size: {error}") from None

    deployed = Deployed(model).eval()
    episodes = [random_episode(size, args.shots, seed) for seed in range(EPISODES)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporters' notes on their own code
        program = torch.export.export(deployed, episodes[0])
        data, run = (to_pt2 if args.format == "pt2" else to_onnx)(program)
        # torch's maximum, unlike Python's, is NaN if a value is
        difference = float(torch.stack([(run(*given) - deployed(*given)).abs().max() for given in episodes]).max())
    if not difference <= TOLERANCE:  # a NaN neither
        raise UserError(f"the exported network differs by {difference:.1e}, more than {TOLERANCE:.0e}: nothing written")
    write_atomically(args.out, lambda file: file.write(data))
    print(f"{args.out}: {args.shots}-shot at {size} x {size}, {len(data) / 1e6:.1f} MB")
    print(f"largest difference from the network: {difference:.1e} in {EPISODES} random episodes")


class Deployed(nn.Module):
    """The network from pixels to the probability."""

    def __init__(self, model: NTRENet) -> None:
        super().__init__()
        self.model = model

    def forward(self, query: Tensor, supports: Tensor, support_masks: Tensor) -> Tensor:
        """(1, 3, S, S), (1, K, 3, S, S) and (1, K, S, S), all uint8 -> (1, 1, S, S) in [0, 1]."""
        logits: Tensor = self.model(normalize(query), normalize(supports), support_masks).logits
        return logits.sigmoid()


def to_pt2(program: ExportedProgram) -> tuple[bytes, Callable[..., Tensor]]:
    """Return the file's bytes, and a function that runs them."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def to_onnx(program: ExportedProgram) -> tuple[bytes, Callable[..., Tensor]]:
    """Return the file's bytes, and a function that runs them in onnxruntime."""
    exported = torch.onnx.export(program, input_names=NAMES, output_names=["probability"], verbose=False)
    assert exported is not None
    data: bytes = exported.model_proto.SerializeToString()
    session = importlib.import_module("onnxruntime").InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(*episode: Tensor) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in zip(NAMES, episode, strict=True)}
        return torch.from_numpy(session.run(["probability"], given)[0])

    return data, run


def random_episode(size: int, shots: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw smooth coloured noise, each support with a rectangle as target and an ignored edge.

    The query is the first support mirrored, so that there is something to find.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(shots, 3, 8, 8, generator=generator)
    images = F.interpolate(coarse, (size, size), mode="bilinear").to(torch.uint8)
    masks = torch.zeros(1, shots, size, size, dtype=torch.uint8)
    masks[..., -1] = IGNORE
    for mask in masks[0]:
        top, left = torch.randint(0, size // 2, (2,), generator=generator)
        mask[top : top + size // 3, left : left + size // 3] = 1
    return images[:1].flip(-1), images[None], masks


if __name__ == "__main__":
    run_command(main)
