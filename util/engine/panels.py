"""Drawings of episodes: support, query, the network's maps, prediction (the paper's figures 4 and 5)."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from model import IGNORE
from model.ntrenet import NTRENet, NTRENetOutput
from model.ops import resize
from util.config import Config
from util.data.dataset import Episode
from util.data.episodes import EpisodeList
from util.data.images import encoded
from util.engine.build import Hardware, build_eval_loader, forward
from util.engine.metrics import iou, mask_iou
from util.files import write_bytes

TARGET, DISTRACTOR = (230, 60, 60), (70, 120, 235)
TILE, GAP, CAPTION = 220, 6, 26

Tile = tuple[str, np.ndarray]
"""a caption and an RGB image (S, S, 3)"""


def overlay(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Tint the pixels of a boolean mask (H, W) in an RGB image (H, W, 3) and draw their outline, with white inside it.

    The white line shows it also on things of the same colour.
    """
    tints = (0.45 * np.arange(256)[:, None] + 0.55 * np.array(colour)).astype(np.uint8)
    tinted = np.where(mask[..., None], cv2.LUT(image, tints[None]), image)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    thickness = 1 + max(mask.shape) // 400
    inside = cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, 2 * thickness + 1)
    tinted[(inside > 0) & mask] = 255
    return cv2.drawContours(tinted, contours, -1, colour, thickness)


def heat(values: np.ndarray) -> np.ndarray:
    """Colour a map (H, W) of [0, 1], dark blue to yellow: RGB (H, W, 3)."""
    coloured = cv2.applyColorMap((255 * values.clip(0, 1)).astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    return cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB)


def episode_tiles(batch: Episode, output: NTRENetOutput, n: int) -> list[Tile]:
    """Draw episode ``n`` of a batch from left to right: inputs, maps (an ablation lacks some), prediction."""
    query, support = (x.permute(1, 2, 0).cpu().numpy() for x in (batch.query[n], batch.supports[n, 0]))
    ground_truth, support_mask = batch.query_mask[n].cpu().numpy(), batch.support_masks[n, 0].cpu().numpy()
    size = (query.shape[0], query.shape[1])

    def full(values: Tensor) -> np.ndarray:
        return resize(values[n : n + 1].float(), size)[0, 0].cpu().numpy()

    tiles = [
        ("support", overlay(support, support_mask == 1, TARGET)),
        ("query, ground truth", overlay(query, ground_truth == 1, TARGET)),
        ("prior", heat(full(output.prior))),
    ]
    if output.query_bg_logits is not None:
        tiles.append(("background", heat(full(output.query_bg_logits.float().sigmoid()))))
    if output.eliminated:
        tiles.append(("distracting", overlay(query, full(output.eliminated[0].do_mask) > 0.5, DISTRACTOR)))
    mask = (output.logits[n, 0] > 0).cpu().numpy() & (ground_truth != IGNORE)
    return [*tiles, (f"prediction, IoU {100 * mask_iou(mask, ground_truth):.0f}", overlay(query, mask, TARGET))]


def episode_rows(model: NTRENet, loader: Iterable[Episode], *, hardware: Hardware) -> list[list[Tile]]:
    """Run every episode of a loader through the model, and draw it."""
    model.eval()
    rows: list[list[Tile]] = []
    for batch in loader:
        on_device = batch.to(hardware.device)
        with torch.inference_mode():
            output = forward(model, on_device, hardware)
        rows += [episode_tiles(on_device, output, n) for n in range(len(batch.names))]
    return rows


def draw_rows(rows: list[list[Tile]]) -> np.ndarray:
    """Draw episodes, one in each row, with captions: RGB (H, W, 3)."""
    width = max(len(row) for row in rows) * (TILE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (TILE + CAPTION + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (caption, tile) in enumerate(row):
            left, top = GAP + x * (TILE + GAP), GAP + y * (TILE + CAPTION + GAP)
            sheet.paste(Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.BILINEAR), (left, top))
            draw.text((left + 2, top + TILE + 4), caption, fill="black", font=ImageFont.load_default(15))
    return np.asarray(sheet)


def save_picture(path: Path, image: np.ndarray) -> None:
    """Write an RGB image (H, W, 3), uint8, as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, encoded(Image.fromarray(image), "PNG"))


def save_panels(
    folder: Path,
    number: int,
    model: NTRENet,
    source: EpisodeList,
    counts: np.ndarray,
    config: Config,
    hardware: Hardware,
) -> None:
    """Draw the best, the worst and random episodes, ``number`` of each: one file an episode, and contact_sheet.png.

    ``counts`` (N, 4) are the model's on the episodes of ``source``.
    """
    for old in folder.glob("*.png"):
        old.unlink()
    sheet = []
    for kind, chosen in choose(iou(counts), number).items():
        drawn = episode_rows(model, build_eval_loader(config, source, chosen), hardware=hardware)
        for rank, (episode, row) in enumerate(zip(chosen, drawn, strict=True), 1):
            name = config.data.classes[source(episode).class_id - 1]
            sheet.append([(f"{kind} {rank}: {name}", row[0][1]), *row[1:]])
            file = f"{kind}_{rank}_{name.replace(' ', '_')}_episode{episode}.png"
            save_picture(folder / file, draw_rows(sheet[-1:]))
    save_picture(folder / "contact_sheet.png", draw_rows(sheet))


def choose(ious: np.ndarray, number: int) -> dict[str, list[int]]:
    """Choose episodes by their IoUs (N,): the highest, the lowest, and some of the others, the same on every call."""
    order = np.argsort(-ious, kind="stable").tolist()
    best, rest = order[:number], order[number:]
    worst, rest = rest[::-1][:number], rest[: max(len(rest) - number, 0)]
    drawn = np.random.default_rng(0).permutation(len(rest))[:number].tolist()
    return {"best": best, "worst": worst, "random": sorted(rest[i] for i in drawn)}
