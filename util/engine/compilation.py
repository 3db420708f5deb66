"""A training step as torch.compile makes it: fewer and larger kernels on a GPU, and the same results up to rounding."""

import copy
import sys
from typing import Any

import torch
from tqdm import tqdm

from model.parallel import processes, rank
from util.engine.build import black_batch, prepare_precision
from util.engine.loops import forward, loss_terms
from util.engine.run_state import Training

WORTH = 5000
"""training steps from which on compiling is expected to save more time on a GPU than it takes; an estimate"""


def compile_where_it_pays(training: Training, steps: int) -> None:
    """Have torch compile the network and the loss, one graph each, where ``train.compile`` says so.

    Modules, their parameters and their names stay what they are, so a checkpoint does not tell. Evaluation is not
    compiled: supports have different numbers of target positions, which would make almost every episode another graph.
    Where a step cannot be compiled, or does not run, a line says why, and training goes on without.

    Args:
        steps: still to come.
    """
    asked = training.config.train.compile
    if asked == "off" or (asked == "auto" and (training.hardware.device.type != "cuda" or steps < WORTH)):
        return
    if rank() == 0:
        print("compiling the training step, which takes minutes; train.compile=off leaves it out", flush=True)
    before = training.network, training.loss
    try:
        training.network, training.loss = (compiled(part) for part in before)
        _try_a_step(training)
    except Exception as error:  # no C compiler, no Triton, or a fault in what was made: nothing that should end a run
        training.network, training.loss = before
        if rank() == 0:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            tqdm.write(f"note: torch cannot compile here ({reason:.200}): training goes on without", file=sys.stderr)


def compiled(part: Any) -> Any:
    """Have torch compile a module or function at its first call, for the sizes of its inputs.

    Dropout draws from torch's own generator, as it does without: the same noise, and a run resumes exactly.
    """
    return torch.compile(part, dynamic=False, options={"fallback_random": True})


def _try_a_step(training: Training) -> None:
    """Take a step on black pictures up to its gradients, and leave no trace of it."""
    device, model, criterion = training.hardware.device, training.model.train(), training.criterion
    bank = copy.deepcopy(criterion.state_dict())
    batch = black_batch(training.config, training.config.train.batch_size // processes()).to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        prepare_precision(model, training.hardware)  # outside the graph
        output = forward(training.network, batch, training.hardware)
        loss_terms(training.loss, output, batch)["total"].backward()
    model.zero_grad()
    criterion.load_state_dict(bank)
