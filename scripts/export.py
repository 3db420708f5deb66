"""Write a trained network as one file that runs without this code: ONNX, or torch.export's pt2.

    pip install -r requirements-export.txt                                    # for ONNX only
    python scripts/export.py --checkpoint runs/.../best.pt --format onnx --out ntrenet.onnx
    python scripts/export.py --checkpoint runs/.../best.pt --format pt2 --out ntrenet.pt2 --shots 5

The file takes one episode of K supports, K = --shots, in squares of S = --size (the checkpoint's by default), and gives

    query          uint8 (1, 3, S, S)       RGB
    supports       uint8 (1, K, 3, S, S)    RGB
    support_masks  uint8 (1, K, S, S)       1 target, 0 other, 255 ignored
    probability    float32 (1, 1, S, S)     of the target in the query

Pixels go in as they are, the normalisation is inside, so that no program has to repeat it. How a picture comes into the
square and the probability out of it is ``fit`` and ``to_original`` in util/data/transforms.py. K, S, one episode a call
and float32 are fixed in the file: a dynamic K or size, several queries a call, and the other maps (prior, background,
distracting objects) are not exported; predict.py and util/segment/segmenter.py have them.

What was written is read back, run, and compared with the network on random episodes; a difference above 1e-3 is an
error, and then no file is left.
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
from util.segment.segmenter import NTRESegmenter

from model import IGNORE
from model.ntrenet import NTRENet, QueryEncoding, SupportEncoding
from model.ops import foreground, masked_average_pool
from util.data.transforms import normalize
from util.errors import UserError
from util.files import naming, require_writable, write_atomically

Episode = tuple[Tensor, Tensor, Tensor]
"""query, supports, support_masks, all uint8"""

NAMES = ["query", "supports", "support_masks"]
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3
EPISODES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--format", choices=["onnx", "pt2"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="the file, ending in .onnx or .pt2")
    parser.add_argument("--shots", type=int, default=1, help="supports an episode, K")
    parser.add_argument("--size", type=int, help="side of the square input, S = 8n + 1; the checkpoint's by default")
    args = parser.parse_args()
    require_writable(args.out, f".{args.format}")
    require_packages(args.format)
    if args.shots < 1:
        raise UserError(f"--shots must be 1 or more, got {args.shots}")
    segmenter = NTRESegmenter.from_checkpoint(args.checkpoint, "cpu", "fp32")
    size = segmenter.config.data.image_size if args.size is None else args.size
    if size < 9 or size % 8 != 1:
        raise UserError(f"--size must be 8n + 1, such as {max(size // 8, 1) * 8 + 1}, got {size}")

    unchecked = args.out.with_stem(f"{args.out.stem}.unchecked")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporters' notes on their own insides
            program = export(FixedShots(segmenter.model), random_episode(size, args.shots, 0))
            run = WRITERS[args.format](program, unchecked)
        difference, low, high = compare(segmenter.model, run, size, args.shots)
        if not difference <= TOLERANCE:  # a NaN neither
            raise UserError(f"the exported network differs by {difference:.1e}, more than {TOLERANCE:.0e}: not kept")
        unchecked.replace(args.out)
    finally:
        unchecked.unlink(missing_ok=True)
    print(f"{args.out}: {args.shots}-shot at {size} x {size}, {args.out.stat().st_size / 1e6:.1f} MB")
    print(
        f"largest difference from the network: {difference:.1e}, {EPISODES} random episodes with probabilities of"
        f" {low:.3f} to {high:.3f}"
    )


class FixedShots(nn.Module):
    """The network for one episode of pixels, in operations whose shapes do not depend on what the masks show.

    ``NTRENet.forward`` keeps only the support positions on the target, whose number differs, and one of the zeros
    beside it (``target_positions`` in model/prior.py). Here all h w positions stay, those beside the target as zeros:
    the same largest similarity, for the price of a larger matrix product. All pictures go through the backbone at once,
    the query with a mask of ones, so that no weight stands in the file twice.
    """

    def __init__(self, model: NTRENet) -> None:
        super().__init__()
        self.model = model

    def forward(self, query: Tensor, supports: Tensor, support_masks: Tensor) -> Tensor:
        """(1, 3, S, S), (1, K, 3, S, S) and (1, K, S, S), all uint8 -> (1, 1, S, S) in [0, 1]."""
        model = self.model
        features = model.backbone(normalize(torch.cat([query, supports[0]])))
        masks = torch.cat([torch.ones_like(support_masks[0, :1]), support_masks[0]])
        target = foreground(masks, (features.stage3.shape[-2], features.stage3.shape[-1]))
        high = model.backbone.high(features.stage3 * target) * target
        prototype = masked_average_pool(model.reduce_support(features.middle[1:]), target[1:]).mean(0, keepdim=True)
        base = model.read_base(features.middle)
        searched = QueryEncoding(model.reduce_query(features.middle[:1]), high[:1], *(x[:1] for x in base))
        of_target = [masked_average_pool(x[1:], target[1:]).flatten(1).mean(0, keepdim=True) for x in base]
        shown = SupportEncoding(prototype, high[1:].flatten(2).transpose(1, 2).unsqueeze(0), *of_target)
        return model.segment([searched], [shown], (query.shape[-2], query.shape[-1])).logits.sigmoid()


def export(network: nn.Module, example: Episode) -> ExportedProgram:
    """The operations that ``example`` goes through, and the weights they read."""
    program = torch.export.export(network.eval(), example)
    drop_what_is_not_read(program)
    return program


def drop_what_is_not_read(program: ExportedProgram) -> None:
    """torch.export keeps all weights of a module: also FEM's classifier of each scale."""
    signature = program.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    unread = [node for node in program.graph.find_nodes(op="placeholder") if node.name in weights and not node.users]
    names = {node.name for node in unread}
    signature.input_specs = [spec for spec in signature.input_specs if getattr(spec.arg, "name", None) not in names]
    for node in unread:
        program.graph.erase_node(node)
        del program.state_dict[weights[node.name]]
    program.graph_module.recompile()


Run = Callable[[Episode], Tensor]


def write_pt2(program: ExportedProgram, path: Path) -> Run:
    """What is returned runs the file."""
    buffer = io.BytesIO()  # on a full disk, torch's own writer ends the process
    torch.export.save(program, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))
    loaded = torch.export.load(path).module()
    return lambda episode: loaded(*episode)


def write_onnx(program: ExportedProgram, path: Path) -> Run:
    """What is returned runs the file, in onnxruntime."""
    with naming(path):
        torch.onnx.export(
            program,
            f=path,
            input_names=NAMES,
            output_names=["probability"],
            external_data=False,  # one file
            verbose=False,
        )
    session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(episode: Episode) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in zip(NAMES, episode, strict=True)}
        return torch.from_numpy(session.run(["probability"], given)[0])

    return run


WRITERS: dict[str, Callable[[ExportedProgram, Path], Run]] = {"pt2": write_pt2, "onnx": write_onnx}


def require_packages(kind: str) -> None:
    """Raises UserError where what ONNX needs is not installed."""
    missing = [name for name in ONNX_PACKAGES if kind == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install -r requirements-export.txt")


@torch.inference_mode()
def compare(model: NTRENet, run: Run, size: int, shots: int) -> tuple[float, float, float]:
    """Largest difference between a file and the network on random episodes; the network's least and greatest output."""
    differences, outputs = [], []
    for seed in range(EPISODES):
        query, supports, masks = random_episode(size, shots, seed)
        expected = model(normalize(query), normalize(supports), masks).logits.sigmoid()
        differences.append((run((query, supports, masks)) - expected).abs().max())
        outputs.append(expected)
    probability = torch.stack(outputs)
    return float(torch.stack(differences).max()), float(probability.min()), float(probability.max())


def random_episode(size: int, shots: int, seed: int) -> Episode:
    """Smooth coloured noise, each support with a rectangle of random place and size as target and an ignored edge.

    The query is the first support in the mirror, so that there is something to find.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(shots, 3, 8, 8, generator=generator)
    pictures = F.interpolate(coarse, (size, size), mode="bilinear").to(torch.uint8)
    masks = torch.zeros(1, shots, size, size, dtype=torch.uint8)
    for mask in masks[0]:
        top, left = (int(n) for n in torch.randint(0, size // 2, (2,), generator=generator))
        height, width = (int(n) for n in torch.randint(size // 4, size // 2, (2,), generator=generator))
        mask[top : top + height, left : left + width] = 1
        mask[:, -1] = IGNORE
    return pictures[:1].flip(-1), pictures[None], masks


if __name__ == "__main__":
    run_command(main)
