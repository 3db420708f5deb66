"""Pictures of the best, the worst and random episodes of an evaluation: the paper's figures 4 and 5."""

from pathlib import Path

import numpy as np

from model.ntrenet import NTRENet
from util.config import Config
from util.data.episodes import EpisodeList
from util.engine.build import Hardware, build_eval_loader
from util.engine.metrics import iou
from util.segment.visualize import Tile, draw_rows, episode_rows, save_picture


def save_panels(
    folder: Path,
    number: int,
    model: NTRENet,
    baseline: NTRENet | None,
    source: EpisodeList,
    counts: np.ndarray,
    config: Config,
    hardware: Hardware,
) -> None:
    """Draw ``number`` episodes of each kind: one picture an episode, and all of them on contact_sheet.png.

    Pictures of an earlier evaluation are replaced once all are drawn.

    Args:
        baseline: another network whose prediction is shown beside.
        counts: (N, 4), of the model on the episodes of ``source``
    """
    pictures: dict[str, list[Tile]] = {}
    for kind, chosen in choose(iou(counts), number).items():
        loader = build_eval_loader(config, source, chosen)
        for rank, (episode, row) in enumerate(
            zip(chosen, episode_rows(model, loader, hardware=hardware, baseline=baseline), strict=True), 1
        ):
            name = config.data.classes[source(episode).class_id - 1]
            (_, picture), *rest = row
            row = [(f"{kind} {rank}: {name}", picture), *rest]
            pictures[f"{kind}_{rank}_{name.replace(' ', '_')}_episode{episode}.png"] = row
    for old in folder.glob("*.png"):
        old.unlink()
    for name, row in pictures.items():
        save_picture(folder / name, draw_rows([row]))
    save_picture(folder / "contact_sheet.png", draw_rows(list(pictures.values())))


def choose(ious: np.ndarray, number: int) -> dict[str, list[int]]:
    """Choose episodes by their IoUs (N,): the highest, the lowest, and some of the others, the same on every call."""
    order = np.argsort(-ious, kind="stable").tolist()
    best, rest = order[:number], order[number:]
    worst, rest = rest[::-1][:number], rest[: max(len(rest) - number, 0)]
    drawn = np.random.default_rng(0).permutation(len(rest))[:number].tolist()
    return {"best": best, "worst": worst, "random": sorted(rest[i] for i in drawn)}
