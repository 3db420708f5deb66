"""Count the GPU memory that a training step of a config needs, on any machine.

    python scripts/memory.py --config configs/pascal/resnet50_fold0_5shot.yaml [precision=fp32 train.batch_size=16 ...]

The step runs as on a GPU, on tensors that have a size and no contents, so it takes seconds. It counts all tensors that
live at a time: weights, momentum, bank, batch, activations and gradients. CUDA itself, cuDNN's workspaces and what the
allocator rounds up come on top. precision=auto counts as bf16. An evaluation takes eval.cache_gib beside the weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import argparse
import itertools
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from util.engine.loops import forward, loss_terms

from util.config import Config, add_config_argument, load_config, parse_arguments
from util.data.transforms import normalize
from util.engine.build import (
    PRECISION,
    Hardware,
    black_batch,
    build_loss,
    build_model,
    build_optimizer,
    prepare_precision,
)

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    args, overrides = parse_arguments(parser)
    config = load_config(args.config, overrides)
    held, peak = (size / 2**30 for size in step_memory(config))
    print(
        f"{config.data.dataset}, {config.model.backbone}, {config.data.image_size} px, {config.data.shots}-shot,"
        f" {config.train.batch_size} episodes, {precision_of(config)}: {peak:.1f} GiB in a training step,"
        f" {held:.1f} GiB between two"
    )


def precision_of(config: Config) -> str:
    return "bf16" if config.precision == "auto" else config.precision


def step_memory(config: Config, *, empty: bool = True) -> tuple[int, int]:
    """Count bytes of tensors between two training steps, and the most in one.

    Args:
        empty: tensors have no contents; else the step is computed, on this CPU.
    """
    hardware = Hardware(CPU, PRECISION[precision_of(config)])
    model, criterion = build_model(config, "random")[0].train(), build_loss(config)
    prepare_precision(model, hardware)
    normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))  # keeps its constants, which must not be empty
    with _OnCuda(), FakeTensorMode(allow_non_fake_inputs=True) if empty else nullcontext(), Alive() as alive:
        for module in (model, criterion, *itertools.chain(*model.backbone._lower.values())):
            _copy_tensors(module)
        optimizer = build_optimizer(config, model)
        for _ in range(2):  # momentum is made in the first
            batch = black_batch(config, config.train.batch_size)
            output = forward(model, batch, hardware)
            losses = loss_terms(criterion, output, batch)
            del output
            losses["total"].backward()
            optimizer.step()
            optimizer.zero_grad()
            del losses, batch
        return alive.bytes, alive.most


def _copy_tensors(module: nn.Module) -> None:
    """Make a module's tensors anew, where they are counted."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.clone()


class Alive(TorchDispatchMode):
    """Counts the memory of the tensors that operations give, for as long as it is held."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._held: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._held:
                    self._held.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.bytes)
        return found

    def _freed(self, storage: int, size: int) -> None:
        self._held.discard(storage)
        self.bytes -= size


class _OnCuda(TorchFunctionMode):
    """Has the network take its ways for CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ == "is_cuda":
            return True
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    run_command(main)
