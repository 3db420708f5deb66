"""A small synthetic data set for few-shot segmentation, in the layout of PASCAL VOC.

Every image shows objects of different classes on an outdoor background: 2 or 3 large ones, or, in a set of the other
kind, 5 to 8 small ones, many of them attached to each other. A class is one silhouette with one texture; colours are
random for each object, so only shape and texture identify a class. The 20 classes form 4 folds of 5 consecutive ids.
Each image is a pure function of (kind, seed, split, index).
"""

import colorsys
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model import IGNORE
from util.data.images import encoded, encoded_mask
from util.files import write_bytes, write_text

Array = NDArray[Any]
Texture = Callable[[Array, Array, Array], Array]

VERSION = 1  # increase it if the same parameters no longer give the same files
SPLITS = ("train", "val")
JPEG_QUALITY = 92
MIN_VISIBLE = 0.7  # share of each object's pixels that later objects leave visible
SUPERSAMPLING = 3
TURN = np.linspace(0, 2 * np.pi, 160, endpoint=False)
ARC = np.linspace(-1, 1, 60)


class Kind(NamedTuple):
    """The numbers in which two kinds of sets differ."""

    deck: tuple[int, ...]  # objects in so many images that together show each of the 20 classes once
    shorter: tuple[int, int]  # side of the image in pixels: at least, less than
    longer: tuple[int, int]
    diameter: tuple[float, float, float]  # of an object, in shorter sides: at least, at most, less per object
    finest: float  # lower bound of the factor by which small objects have a finer texture
    attached: float  # probability that an object touches or overlaps the one before it
    coarsest: float = 1.2  # upper bound of that factor


LARGE = Kind((2, 2, 2, 2, 3, 3, 3, 3), (112, 129), (144, 161), (0.42, 0.72, 0.05), finest=0.85, attached=0)
EXAMPLE = LARGE._replace(shorter=(448, 449), longer=(592, 593), coarsest=4.0)  # to be looked at
SMALL = Kind((5, 7, 8), (128, 145), (168, 187), (0.17, 0.3, 0), finest=0.6, attached=0.5)


def polar(radius: Array | float, angle: Array) -> Array:
    """Return points (N, 2) at `radius` and clockwise `angle` (radians) from 12 o'clock; y points down."""
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def mirrored(*right: tuple[float, float]) -> Array:
    """Return an outline (2N, 2), symmetric about the vertical axis, of its right half from top to bottom."""
    half = np.array(right)
    return np.concatenate([half, half[::-1] * (-1, 1)])


def normalised(contours: list[Array]) -> list[Array]:
    """Centre contours (an outline and its holes), and scale them to the area of a disc of diameter 1."""

    def area(p: Array) -> float:
        return abs(float(np.sum(p[:, 0] * np.roll(p[:, 1], 1) - p[:, 1] * np.roll(p[:, 0], 1)))) / 2

    outer = contours[0]
    centre = (outer.min(axis=0) + outer.max(axis=0)) / 2
    size = np.sqrt((area(outer) - sum(map(area, contours[1:]))) / (np.pi / 4))
    return [(p - centre) / size for p in contours]


# A texture maps coordinates x, y (unit: one period; origin: the object's centre) and a table (2, 8, 8) of
# random numbers to a field of the coordinates' shape: positive in one tone, negative in the other, with a
# slope of about 1 per period.


def line(t: Array) -> Array:
    """Return the distance of t to the nearest integer, 0..0.5."""
    return np.abs(t - np.round(t))


def stagger(x: Array, y: Array) -> tuple[Array, Array]:
    """Return offsets (dx, dy) from the nearest node of a lattice whose odd rows are shifted by one half."""
    row = np.round(y)
    x = x + 0.5 * (row % 2)
    return x - np.round(x), y - row


def oblong(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    """Return a field that is positive within a rectangle at the origin."""
    return np.minimum(half_width - np.abs(x), half_height - np.abs(y))


def plus(x: Array, y: Array) -> Array:
    """Return a field that is positive within a plus sign at the origin."""
    return np.maximum(oblong(x, y, 0.4, 0.14), oblong(x, y, 0.14, 0.4))


def triangle(x: Array, y: Array) -> Array:
    """Return a field that is positive within an upright triangle in the unit square about the origin."""
    return 0.25 + 0.5 * y - np.abs(x)


def scale(x: Array, y: Array) -> Array:
    """Return a field that is positive on the round rim of a fish scale in the unit square about the origin."""
    return 0.17 - np.abs(np.hypot(2 * x, y + 0.5) - 1)


def marble(x: Array, y: Array, table: Array) -> Array:
    """Return a field of large irregular patches."""
    a, b, c, d = 2 * np.pi * table[0, 0, :4]
    u, v = 2.2 * x + a + 1.5 * np.sin(1.7 * y + b), 2 * y + c + 1.5 * np.sin(1.9 * x + d)
    return 0.2 * (np.sin(u) + np.sin(v))


def cells(x: Array, y: Array, shift: Array) -> tuple[Array, Array]:
    """Return the distance to the nearest node of a staggered lattice moved by `shift`, and the excess of the next."""
    near, second = np.full_like(x, 9), np.full_like(x, 9)
    row, column = np.round(y).astype(int), np.round(x).astype(int)
    for i in (row - 1, row, row + 1):
        for j in (column - 1, column, column + 1):
            dx, dy = shift[:, i % 8, j % 8]
            distance = np.hypot(x - j - dx - 0.5 * (i % 2), y - i - dy)
            second = np.minimum(second, np.maximum(near, distance))
            near = np.minimum(near, distance)
    return near, second - near


# (name, contours, texture) of each class; its id is its position, counted from 1, and its fold (id - 1) // 5.
CLASSES: tuple[tuple[str, list[Array], Texture], ...] = (
    ("striped_star", [polar(np.tile([1, 0.48], 5), np.arange(10) * np.pi / 5)], lambda x, y, _: line(x) - 0.25),
    ("dotted_ring", [polar(1, TURN), polar(0.45, TURN)], lambda x, y, _: 0.34 - np.hypot(*stagger(x / 1.1, y / 1.1))),
    (
        "brick_arrow",
        [mirrored((0, -1), (0.85, -0.1), (0.36, -0.1), (0.36, 1))],
        lambda x, y, _: oblong(*stagger(x / 2, y), 0.43, 0.37),
    ),
    (
        "checked_heart",
        [np.stack([16 * np.sin(TURN) ** 3, 5 * np.cos(2 * TURN) + 2 * np.cos(3 * TURN) - 13 * np.cos(TURN)], axis=1)],
        lambda x, y, _: 8 * (line(x / 1.6) - 0.25) * (line(y / 1.6) - 0.25),
    ),
    (
        "cracked_leaf",
        [mirrored(*np.stack([0.55 * (1 - ARC**2), ARC], axis=1))],
        lambda x, y, table: 0.15 - cells(x / 1.3, y / 1.3, 0.8 * table)[1],
    ),
    (
        "zigzag_cross",
        [mirrored((0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36), (0.36, 1))],
        lambda x, y, _: line(0.9 * y + 1.8 * line(0.55 * x)) - 0.25,
    ),
    (
        "bubble_crescent",
        [np.concatenate([polar(1, np.pi + 2.3 * ARC), polar(0.78, np.pi - 2 * ARC) - (0, 0.36)])],
        lambda x, y, _: 0.11 - np.abs(np.hypot(*stagger(x / 1.2, y / 1.2)) - 0.32),
    ),
    (
        "grid_drop",
        [np.stack([0.75 * np.sin(TURN) * np.sin(TURN / 2) ** 1.3, -np.cos(TURN)], axis=1)],
        lambda x, y, _: 0.16 - np.minimum(line(x), line(y)),
    ),
    (
        "rayed_flower",
        [polar(0.79 + 0.21 * np.cos(6 * TURN), TURN)],
        lambda x, y, _: (line(np.arctan2(y, x) * 5 / np.pi) - 0.25) * np.hypot(x, y),
    ),
    ("marbled_horseshoe", [np.concatenate([polar(1, 2.5 * ARC), polar(0.45, -2.35 * ARC)])], marble),
    (
        "dashed_hourglass",
        [mirrored((0.75, -1), (0.72, -0.7), (0.2, 0), (0.72, 0.7), (0.75, 1))],
        lambda x, y, _: oblong(*stagger(x / 2, y), 0.3, 0.22),
    ),
    ("plus_hexagon", [polar(1, np.arange(6) * np.pi / 3)], lambda x, y, _: plus(*stagger(x / 1.4, y / 1.4))),
    (
        "honeycomb_bolt",
        [np.array([(0.15, -1), (-0.6, 0.2), (-0.08, 0.2), (-0.3, 1), (0.65, -0.25), (0.1, -0.25), (0.6, -1)])],
        lambda x, y, table: 0.16 - cells(x / 1.3, y / 1.1, 0 * table)[1],
    ),
    (
        "target_tee",
        [mirrored((1, -1), (1, -0.3), (0.36, -0.3), (0.36, 1))],
        lambda x, y, _: line(np.hypot(x, y)) - 0.25,
    ),
    (
        "speckled_mushroom",
        [np.concatenate([polar(1, ARC * np.pi / 2), mirrored((0.95, 0.16), (0.36, 0.16), (0.42, 1))])],
        lambda x, y, table: 0.23 - cells(x * 1.05, y * 1.05, table)[0],
    ),
    (
        "scaly_fish",
        [mirrored(*polar(1, 1.3 + 1.3 * ARC) * (0.65, 1), (0.65, 1.5), (0, 1.25))[:, ::-1]],
        lambda x, y, _: scale(*stagger(x, y)),
    ),
    (
        "wavy_crown",
        [mirrored((0, -0.75), (0.4, -0.05), (0.95, -0.75), (0.8, 0.75))],
        lambda x, y, _: 0.14 - line(0.8 * y + 0.3 * np.sin(2.6 * x)),
    ),
    (
        "woven_house",
        [mirrored((0, -1), (1, -0.15), (0.72, -0.15), (0.72, 0.9))],
        lambda x, y, _: line(np.where((x // 1.5 + y // 1.5) % 2, x, y) * 4 / 3) - 0.25,
    ),
    (
        "triangle_tree",
        [mirrored((0, -1), (0.5, -0.35), (0.28, -0.35), (0.7, 0.25), (0.42, 0.25), (0.9, 0.85), (0.2, 0.85))],
        lambda x, y, _: triangle(*stagger(x, y)),
    ),
    (
        "quartered_gear",
        [polar(0.84 + 0.16 * np.tanh(4 * np.sin(8 * TURN)), TURN)],
        lambda x, y, _: np.sign(x * y) * np.minimum(np.abs(x), np.abs(y)),
    ),
)
CLASS_NAMES: tuple[str, ...] = tuple(name for name, _, _ in CLASSES)
OUTLINES: tuple[list[Array], ...] = tuple(normalised(contours) for _, contours, _ in CLASSES)


def tone(hue: float, saturation: float, luma: float) -> Array:
    """Return the RGB colour (3,), 0..1, of this hue and saturation (0..1) that has this luma (0..1)."""
    colour = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, 0.9))
    own = float(colour @ (0.299, 0.587, 0.114))
    return colour * luma / own if luma < own else colour + (1 - colour) * (luma - own) / (1 - own)


def smooth_noise(rng: np.random.Generator, size: tuple[int, int], grid: tuple[int, int]) -> Array:
    """Return noise (H, W) of unit variance at the nodes of a coarse (rows, columns) grid, interpolated."""
    nodes = rng.standard_normal((max(2, grid[0]), max(2, grid[1])), dtype=np.float32)
    return np.asarray(cv2.resize(nodes, size[::-1], interpolation=cv2.INTER_CUBIC))


def background(rng: np.random.Generator, height: int, width: int) -> Array:
    """Paint an outdoor scene (H, W, 3), 0..1: sky with clouds, a far ridge, and grass, sand or gravel below."""
    size = (height, width)
    y = np.arange(height, dtype=np.float32)[:, None]
    horizon = height * rng.uniform(0.3, 0.6)
    sky_hue, ground_hue = rng.normal(0.57, 0.03), rng.choice([0.09, 0.13, 0.22, 0.27]) + rng.normal(0, 0.02)
    vivid, ground_luma = rng.uniform(0.25, 0.5), rng.uniform(0.3, 0.6)
    top = tone(sky_hue, vivid + 0.15, rng.uniform(0.45, 0.7))
    low = tone(rng.choice([sky_hue, 0.08]), vivid, rng.uniform(0.75, 0.9))
    near, far = tone(ground_hue, vivid, ground_luma), tone(ground_hue + 0.03, vivid, ground_luma + 0.12)

    image = top + (low - top) * np.clip(y / horizon, 0, 1)[..., None] + np.zeros((1, width, 1))
    clouds = np.clip(smooth_noise(rng, size, (7, 4)) + 0.4 * smooth_noise(rng, size, (18, 10)), 0, 1.5)
    image += (0.95 - image) * (rng.uniform(0.2, 0.6) * clouds)[..., None]

    ridge = horizon - height * (0.08 + 0.05 * smooth_noise(rng, (1, width), (2, 6))[:1])
    image += ((far + low) / 2 - 0.08 - image) * np.clip(y - ridge, 0, 1)[..., None]

    stretch = ((5, 2), (2, 7), (3, 3))[rng.integers(3)]  # grain in pixels (high, wide): grass, sand, gravel
    grain = smooth_noise(rng, size, (height // stretch[0], width // stretch[1]))
    grain += smooth_noise(rng, size, (height // 14, width // 14))
    depth = np.clip((y - horizon) / (height - horizon), 0, 1)
    grain = grain[(np.sqrt(depth[:, 0]) * (height - 1)).astype(int)]  # finer towards the horizon
    ground = far + (near - far) * depth[..., None] + (rng.uniform(0.03, 0.06) * grain)[..., None]
    edge = horizon + 0.01 * height * smooth_noise(rng, (1, width), (2, 9))[:1]
    return image + (ground - image) * np.clip(y - edge, 0, 1)[..., None]


def render_object(rng: np.random.Generator, class_id: int, diameter: float, kind: Kind) -> tuple[Array, Array]:
    """Draw an object with the area of a disc of `diameter` pixels: colour (h, w, 3) and coverage (h, w), 0..1."""
    outline, texture = OUTLINES[class_id - 1], CLASSES[class_id - 1][2]
    turn, aspect = rng.uniform(-0.6, 0.6), rng.uniform(0.9, 1.1)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    view = np.eye(3)
    view[:2, :2] = diameter * rotation @ np.diag([aspect, 1 / aspect])
    view[2, :2] = rng.uniform(-0.2, 0.2, 2)
    contours = [cv2.perspectiveTransform(points[None], view)[0] for points in outline]
    corner, far_corner = contours[0].min(axis=0) - 2, contours[0].max(axis=0) + 2
    width, height = np.ceil(far_corner - corner).astype(int).tolist()

    canvas = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    cv2.fillPoly(canvas, [np.round((p - corner) * SUPERSAMPLING).astype(np.int32) for p in contours], 255)
    alpha = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255

    pixels = np.stack(np.meshgrid(np.arange(width) + corner[0], np.arange(height) + corner[1]), axis=-1)
    period = rng.uniform(10, 13) * np.clip(diameter / 70, kind.finest, kind.coarsest)
    surface = cv2.perspectiveTransform(pixels, np.linalg.inv(view)) * diameter / period
    surface = surface + rng.uniform(-0.3, 0.3, 2)
    field = texture(surface[..., 0], surface[..., 1], rng.random((2, 8, 8)) - 0.5)

    hue = rng.uniform()
    dark = tone(hue, rng.uniform(0.3, 0.85), rng.uniform(0.12, 0.27))
    bright = tone(hue + rng.uniform(0.1, 0.9), rng.uniform(0.2, 0.7), rng.uniform(0.7, 0.9))
    first, second = (dark, bright) if rng.uniform() < 0.5 else (bright, dark)
    colour = second + (first - second) * np.clip(field * period / 1.6 + 0.5, 0, 1)[..., None]

    light = rng.uniform(-1, 1, 2)
    bevel = cv2.GaussianBlur(alpha, (0, 0), 1.6)
    bevel = cv2.Sobel(bevel, cv2.CV_32F, 1, 0) * light[0] + cv2.Sobel(bevel, cv2.CV_32F, 0, 1) * light[1]
    shade = 1 + 0.25 * bevel + 0.25 * (pixels @ light) / diameter
    return colour * shade[..., None], alpha


def rim(region: Array) -> Array:
    """Return the pixels (N, 2) of a region that border on pixels outside it."""
    region = region.astype(np.uint8)
    return np.argwhere(region > cv2.erode(region, np.ones((3, 3), np.uint8)))


def place(
    rng: np.random.Generator, alpha: Array, owner: Array, areas: list[int], attached: bool = False
) -> tuple[slice, slice] | None:
    """Find a random window for a new object; None if every window that was tried hides too much (MIN_VISIBLE).

    `owner` (H, W) holds the 1-based number of the object visible at each pixel, `areas` their full pixel counts.
    An attached object's rim meets that of the last object, unless that would place it beyond the image.
    """
    room = np.subtract(owner.shape, alpha.shape)
    rims = [rim(owner == len(areas)), rim(alpha > 0.5)] if attached else []
    for share in np.linspace(1, MIN_VISIBLE, 30) if room.min() >= 0 else ():
        corner = np.subtract(*map(rng.choice, rims)) if rims else rng.integers(room + 1)
        top, left = np.clip(corner, 0, room)
        window = slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1])
        still = owner.copy()
        still[window][alpha > 0.5] = 0
        seen = np.bincount(still.ravel(), minlength=len(areas) + 1)[1:]
        if np.all(seen >= share * np.array(areas)):
            return window
    return None


def classes_of(seed: int, split: str, index: int, kind: Kind = LARGE) -> list[int]:
    """Draw the different class ids of an image; each run of as many images as the deck shows every class once."""
    block, position = divmod(index, len(kind.deck))
    rng = np.random.default_rng([seed, SPLITS.index(split), 0, block])
    ends = np.cumsum(rng.permutation(kind.deck))
    return np.split(rng.permutation(len(CLASSES)) + 1, ends[:-1])[position].tolist()


def make_image(seed: int, split: str, index: int, kind: Kind = LARGE) -> tuple[Array, Array]:
    """Make image (H, W, 3) and mask (H, W) number `index` of a split, both uint8."""
    rng = np.random.default_rng([seed, SPLITS.index(split), 1, index])
    height, width = int(rng.integers(*kind.shorter)), int(rng.integers(*kind.longer))
    if rng.uniform() < 0.3:
        height, width = width, height
    image = background(rng, height, width)
    owner = np.zeros((height, width), np.uint8)
    classes, areas = classes_of(seed, split, index, kind), list[int]()
    shadow_shift = rng.uniform((-4, 2), (4, 6))
    least, most, less = kind.diameter
    for number, class_id in enumerate(classes, start=1):
        diameter = min(height, width) * rng.uniform(least, most - less * len(classes))
        attached = kind.attached > 0 and number > 1 and rng.uniform() < kind.attached
        colour, alpha = render_object(rng, class_id, diameter, kind)
        while (window := place(rng, alpha, owner, areas, attached)) is None:
            diameter *= 0.93
            colour, alpha = render_object(rng, class_id, diameter, kind)
        areas.append(int((alpha > 0.5).sum()))
        owner[window][alpha > 0.5] = number
        move = np.column_stack([np.eye(2), shadow_shift + np.array([window[1].start, window[0].start])])
        shadow = cv2.GaussianBlur(cv2.warpAffine(alpha, move, (width, height)), (0, 0), 3)
        image *= 1 - 0.4 * shadow[..., None]
        image[window] += (colour - image[window]) * alpha[..., None]

    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.6)) * rng.uniform(0.93, 1.06, 3)
    image += rng.uniform(0.005, 0.02) * rng.standard_normal((height, width, 1), dtype=np.float32)
    mask = np.array([0, *classes], np.uint8)[owner]
    mask[cv2.morphologyEx(owner, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0] = IGNORE
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8), mask


def file_names(split: str, index: int) -> tuple[str, str]:
    """Return the paths of an image and its mask, relative to the data set's root."""
    return f"JPEGImages/{split}_{index:05d}.jpg", f"SegmentationClassAug/{split}_{index:05d}.png"


def generate(
    root: str | Path,
    train: int = 600,
    val: int = 300,
    seed: int = 0,
    small: bool = False,
    progress: Callable[[list[tuple[str, int]]], Iterable[tuple[str, int]]] = iter,
) -> bool:
    """Write the data set below `root`; return False, with nothing written, if it is already complete."""
    root = Path(root)
    record = root / "generator.json"
    values = {"version": VERSION, "train": train, "val": val, "seed": seed} | ({"small": True} if small else {})
    parameters = json.dumps(values) + "\n"
    items = [(split, index) for split, count in zip(SPLITS, (train, val), strict=True) for index in range(count)]
    texts = {"classes.txt": list(CLASS_NAMES)}
    for split in SPLITS:
        texts[f"lists/{split}.txt"] = [" ".join(file_names(*item)) for item in items if item[0] == split]
    expected = [*texts, *(name for item in items for name in file_names(*item))]
    if record.exists() and record.read_text() == parameters and all((root / name).exists() for name in expected):
        return False

    for folder in ("JPEGImages", "SegmentationClassAug", "lists"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)  # written last: an interrupted call is not taken for complete
    for item in progress(items):
        image, mask = make_image(seed, *item, SMALL if small else LARGE)
        image_name, mask_name = file_names(*item)
        jpeg = encoded(Image.fromarray(image), "JPEG", quality=JPEG_QUALITY)
        write_bytes(root / image_name, jpeg, force=False)
        write_bytes(root / mask_name, encoded_mask(mask), force=False)
    for name, rows in texts.items():
        write_text(root / name, "".join(f"{row}\n" for row in rows))
    write_text(record, parameters)
    return True
