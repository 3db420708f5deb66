"""A run's TensorBoard events."""

import time
from pathlib import Path

import numpy as np
import yaml
from torch.utils.tensorboard import SummaryWriter

from util.config import Config
from util.engine.metrics import Scores
from util.files import naming


class Events:
    """What a run shows.

    Everything stands at the number of steps done, so that nothing stands twice after a resume: what was written behind
    the checkpoint is purged by the next start.

    Raises:
        OSError: the disk is full; names the folder.
    """

    def __init__(self, folder: Path, config: Config, step: int) -> None:
        self.folder = folder
        _wait_for_the_next_second(folder)
        with naming(folder):
            self._writer = SummaryWriter(folder, purge_step=step + 1)
            text = yaml.safe_dump(config.model_dump(), sort_keys=False)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write a value for each name at a step."""
        with naming(self.folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def evaluation(self, step: int, found: Scores, picture: np.ndarray) -> None:
        """Scores, also of each class, and a picture (H, W, 3) of some episodes."""
        per_class = {f"val_iou/{name}": iou for name, iou in found.per_class.items()}
        totals = {"val/miou": found.miou, "val/fb_iou": found.fb_iou, "val/precision": found.precision}
        self.scalars(step, totals | per_class)
        with naming(self.folder):
            self._writer.add_image("episodes", picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Put on the disk what was written so far."""
        with naming(self.folder):
            self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        with naming(self.folder):
            self._writer.close()


def _wait_for_the_next_second(folder: Path) -> None:
    """Wait, at most a second, where another start has made its file within this second.

    TensorBoard reads files in the order of their names, which begin with that second. Of two of one second the earlier
    could be read last, and purge what the other start wrote.
    """
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    if int(time.time()) in seconds:
        time.sleep(1 - time.time() % 1)
