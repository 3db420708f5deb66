"""The log of a training run: progress bar, TensorBoard, metrics.jsonl, config.yaml, run.json."""

import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from model.losses import NTRELoss
from model.parallel import log_mean, processes, rank
from util.engine.metrics import SCORE_TITLES, Scores
from util.engine.record import append_json_line, environment, keep_json_lines
from util.errors import UserError
from util.files import read_json, write_json, write_text
from util.progress import progress

if TYPE_CHECKING:
    from util.engine.training import Training

LOG_EVERY = 10
"""steps between two readings of the losses"""
LOADER_IS_THE_LIMIT = 0.25
"""share of an epoch's time spent waiting for images above which a line says so"""
BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}{postfix}]"


class TrainingLog:
    """The log of a run; in a job of several processes only the first one shows and writes.

    At the start, what an interrupted run wrote after its last checkpoint is dropped.
    """

    def __init__(self, training: "Training", total_steps: int) -> None:
        config, step = training.config, training.step
        self.config, self.folder, self.first = config, Path(config.run_dir), rank() == 0
        self.bar = progress(total=total_steps, initial=step, unit="step", bar_format=BAR, disable=not self.first)
        self.events = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1) if self.first else None
        if self.first:
            self._write_record(training)
        self._unread: list[tuple[int, float, list[str], Tensor]] = []
        self._saved = time.monotonic()

    def close(self) -> None:
        """Finish the bar and the events."""
        self.bar.close()
        if self.events is not None:
            self.events.close()

    def finish(self, step: int, seconds: float, device: torch.device) -> None:
        """Write the steps, time and memory of the whole run to run.json."""
        path = self.folder / "run.json"
        took = {"steps": step, "seconds": seconds, "peak_memory_mib": peak_memory_mib(device)}
        write_json(path, read_json(path) | {"finished": took})

    def _write_record(self, training: "Training") -> None:
        """Write config.yaml and run.json; lines of metrics.jsonl after the last checkpoint are dropped."""
        write_text(self.folder / "config.yaml", yaml.safe_dump(self.config.model_dump(), sort_keys=False))
        data = self.config.data
        path, now = self.folder / "run.json", datetime.now(UTC).isoformat(timespec="seconds")
        machine = environment(training.hardware.device)
        starts = read_json(path).get("starts", []) if training.step else []
        record = {
            **machine,
            "seed": self.config.seed,
            "weights": training.weights._asdict(),
            "list_sha256": {getattr(data, f"{split}_list"): sha256 for split, sha256 in training.list_sha256.items()},
            "resumed_at_step": training.step,
            "starts": [*starts, {"time": now, "step": training.step, **machine, "processes": processes()}],
        }
        write_json(path, record)
        keep_json_lines(self.folder / "metrics.jsonl", lambda line: line["step"] <= training.finished_step)

    def timed(self, batches: Iterable[Any], epoch: str) -> Iterator[Any]:
        """Yield the batches of an epoch, and say at its end if the loader was the limit."""
        self.bar.set_description(epoch, refresh=False)
        ready, began, waited, steps = iter(batches), time.perf_counter(), 0.0, 0
        while True:
            asked = time.perf_counter()
            batch = next(ready, None)
            if batch is None:
                break
            if steps:  # the first batch includes the start of the workers
                waited += time.perf_counter() - asked
            steps += 1
            yield batch
        seconds = time.perf_counter() - began
        if self.events is not None and steps:
            speed = steps * self.config.train.batch_size / seconds
            self.events.add_scalar("episodes_per_second", speed, self.bar.n)
            if waited > LOADER_IS_THE_LIMIT * seconds:
                self.bar.write(
                    f"{epoch}: {waited / seconds:.0%} of the time was spent waiting for images: the loader"
                    f" is the limit, raise workers (now {self.config.workers})"
                )

    def note(self, step: int, lr: float, names: list[str], losses: dict[str, Tensor]) -> None:
        """Keep the losses of a step on the device until they are read."""
        self._unread.append((step, lr, names, torch.stack([loss.detach() for loss in losses.values()])))
        self.bar.update()

    def read(self, sums: dict[str, float]) -> None:
        """Read the losses since the last reading, add them to ``sums``, and write them; the bar shows their mean.

        Raises:
            UserError: a loss is not finite; names the step, every term and the episodes.
        """
        if not self._unread:
            return
        steps, lrs, names, values = zip(*self._unread, strict=True)
        self._unread = []
        rows = log_mean(torch.stack(values)).tolist()
        for step, files, row in zip(steps, names, rows, strict=True):
            if not math.isfinite(row[0]):
                shown = ", ".join(f"{name} {value:g}" for name, value in zip(NTRELoss.NAMES, row, strict=True))
                raise UserError(
                    f"the loss of step {step} is not finite ({shown}); its episodes: {' | '.join(files)}; checkpoints"
                    " are of steps before it; lower train.lr, set precision=fp32, or look at these files"
                )
        for step, lr, row in zip(steps, lrs, rows, strict=True):
            for name, value in zip(NTRELoss.NAMES, row, strict=True):
                sums[name] += value
                if self.events is not None:
                    self.events.add_scalar(f"loss/{name}", value, step)
            if self.events is not None:
                self.events.add_scalar("lr", lr, step)
        if self.events is not None:
            self.events.flush()  # events are on the disk before a checkpoint that counts on them
        self.bar.set_postfix(loss=f"{np.mean(rows, 0)[0]:.3f}", lr=f"{lrs[-1]:.4f}", refresh=False)

    def checkpoint_is_due(self) -> bool:
        """Tell whether ``train.checkpoint_minutes`` have passed, and count from now if they have."""
        due = time.monotonic() - self._saved >= 60 * self.config.train.checkpoint_minutes
        if due:
            self._saved = time.monotonic()
        return due

    def evaluation(self, step: int, found: Scores, losses: dict[str, float], image: np.ndarray) -> None:
        """Write the scores of a validation, the epoch's mean losses, and an image (H, W, 3) of some episodes."""
        if self.events is None:
            return
        append_json_line(self.folder / "metrics.jsonl", {"step": step, **found._asdict(), "loss": losses})
        for name, value in found.per_class.items():
            self.events.add_scalar(f"val_iou/{name}", value, step)
        for name in SCORE_TITLES:
            self.events.add_scalar(f"val/{name}", getattr(found, name), step)
        self.events.add_image("episodes", image, step, dataformats="HWC")
        self.events.flush()


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory so far: of the GPU's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
