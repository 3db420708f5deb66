"""Pictures of episodes: what goes in, what the network thinks, what comes out."""

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
from util.data.dataset import Episode
from util.data.images import encoded
from util.engine.build import Hardware
from util.engine.loops import forward
from util.engine.metrics import mask_iou
from util.files import write_bytes

TARGET, DISTRACTOR, BACKGROUND = (230, 60, 60), (70, 120, 235), (60, 180, 90)
TILE, GAP, CAPTION = 220, 6, 26


def overlay(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Tint the pixels of a boolean mask (H, W) in an RGB image (H, W, 3) and draw their outline."""
    tints = (0.45 * np.arange(256)[:, None] + 0.55 * np.array(colour)).astype(np.uint8)
    picture = np.where(mask[..., None], cv2.LUT(image, tints[None]), image)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(picture, contours, -1, colour, 1)


def heat(values: np.ndarray) -> np.ndarray:
    """Colour a map (H, W) of [0, 1], dark blue to yellow: RGB (H, W, 3)."""
    return cv2.cvtColor(
        cv2.applyColorMap((255 * values.clip(0, 1)).astype(np.uint8), cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB
    )


Tile = tuple[str, np.ndarray]
"""a caption and an RGB picture (S, S, 3)"""


def episode_tiles(batch: Episode, output: NTRENetOutput, place: int, baseline: Tensor | None = None) -> list[Tile]:
    """Draw one episode of a batch, left to right: what goes in, what the network thinks, what comes out.

    Maps that an ablation lacks are left out; ``baseline`` are another network's logits, (B, 1, S, S).
    """
    query = _image(batch.query[place])
    support = _image(batch.supports[place, 0])
    ground_truth = batch.query_mask[place].cpu().numpy()
    tiles = [
        ("support", overlay(support, batch.support_masks[place, 0].cpu().numpy() == 1, TARGET)),
        ("query, truth", overlay(query, ground_truth == 1, TARGET)),
        ("prior", heat(_upsampled(output.prior[place], query))),
    ]
    if output.query_bg_logits is not None:
        tiles.append(("background", heat(_upsampled(output.query_bg_logits[place].float().sigmoid(), query))))
    if output.eliminated:
        do_mask = output.eliminated[0].do_mask[place]
        tiles.append(("distracting", overlay(query, _upsampled(do_mask, query) > 0.5, DISTRACTOR)))
    if baseline is not None:
        tiles.append(_prediction("baseline", baseline[place, 0], query, ground_truth))
    tiles.append(_prediction("prediction", output.logits[place, 0], query, ground_truth))
    return tiles


def _prediction(title: str, logits: Tensor, query: np.ndarray, ground_truth: np.ndarray) -> Tile:
    predicted = (logits > 0).cpu().numpy() & (ground_truth != IGNORE)
    return f"{title}, IoU {100 * mask_iou(predicted, ground_truth):.0f}", overlay(query, predicted, TARGET)


def episode_rows(
    model: NTRENet, loader: Iterable[Episode], *, hardware: Hardware, baseline: NTRENet | None = None
) -> list[list[Tile]]:
    """Run every episode of a loader through the model, and draw it."""
    model.eval()
    rows: list[list[Tile]] = []
    for batch in loader:
        on_device = batch.to(hardware.device)
        with torch.inference_mode():
            output = forward(model, on_device, hardware)
            other = None if baseline is None else forward(baseline.eval(), on_device, hardware).logits
        rows += [episode_tiles(on_device, output, place, other) for place in range(len(batch.names))]
    return rows


def draw_rows(rows: list[list[Tile]]) -> np.ndarray:
    """Draw one picture of episodes, a row each: RGB (H, W, 3)."""
    width = max(len(row) for row in rows) * (TILE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (TILE + CAPTION + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for y, row in enumerate(rows):
        top = GAP + y * (TILE + CAPTION + GAP)
        for x, (caption, tile) in enumerate(row):
            left = GAP + x * (TILE + GAP)
            sheet.paste(Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.BILINEAR), (left, top))
            draw.text((left + 2, top + TILE + 4), caption, fill="black", font=font)
    return np.asarray(sheet)


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture (H, W, 3), uint8 RGB, as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, encoded(Image.fromarray(picture), "PNG"))


def _image(tensor: Tensor) -> np.ndarray:
    return tensor.permute(1, 2, 0).cpu().numpy()


def _upsampled(values: Tensor, like: np.ndarray) -> np.ndarray:
    size = (like.shape[0], like.shape[1])
    return resize(values[None].float(), size)[0, 0].cpu().numpy()
