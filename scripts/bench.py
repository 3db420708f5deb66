"""Measure ours against a plain formulation, in one process, in turn, with a check that both give the same.

    python scripts/bench.py --mode index [--masks 12000] [--json OUT]

index: the class index of a list of 500x375 masks, built anew (cold) and from its cache (warm), against a plain
loop that reads every mask with Pillow and counts with numpy.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.class_index import ClassIndex, load_class_index, read_list
from util.config import parse_arguments
from util.errors import UserError, run_command
from util.record import environment, require_writable, write_json
from util.synthetic import CLASS_NAMES, make_image

R = TypeVar("R")

REPEATS = 3
DIFFERENT = 40
"""masks that are drawn; the others are links to them"""
SIZE = (500, 375)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["index"], required=True)
    parser.add_argument("--masks", type=int, default=12000)
    parser.add_argument("--json", type=Path)
    args, overrides = parse_arguments(parser)
    if overrides or args.masks < DIFFERENT:
        raise UserError(f"--masks must be at least {DIFFERENT}; there are no other settings, got {overrides}")
    if args.json is not None:
        require_writable(args.json, ".json")
    with tempfile.TemporaryDirectory() as folder:
        result = bench_index(Path(folder), args.masks)
    print(
        f"class index of {args.masks} masks of 500x375, medians of {REPEATS}:"
        f" plain loop {result['plain_seconds']:.2f} s,"
        f" ours cold {result['cold_seconds']:.2f} s ({result['cold_ratio']:.2f} times faster),"
        f" warm {result['warm_seconds']:.2f} s; counts equal: {result['equal']}"
    )
    if args.json is not None:
        write_json(args.json, result | {"environment": environment(torch.device("cpu"))})


def bench_index(root: Path, masks: int) -> dict[str, Any]:
    """Times in seconds of the plain loop and of ours, cold and warm; whether all three give the same counts."""
    list_path = draw_masks(root, masks)
    num_classes = len(CLASS_NAMES)
    cache = list_path.with_name(list_path.name + ".index.npz")

    def plain() -> np.ndarray:
        rows = []
        for item in read_list(list_path, root):
            mask = np.asarray(Image.open(item.mask))
            rows.append(np.bincount(mask.ravel(), minlength=256))
        return np.stack(rows)[:, : num_classes + 1]

    def ours() -> ClassIndex:
        return load_class_index(list_path, root, num_classes, progress=False)

    plain_times: list[float] = []
    cold_times: list[float] = []
    warm_times: list[float] = []
    equal = True
    plain()  # fills the page cache for both
    for _ in range(REPEATS):
        cache.unlink(missing_ok=True)
        seconds, expected = timed(plain)
        plain_times.append(seconds)
        for times in (cold_times, warm_times):
            seconds, index = timed(ours)
            times.append(seconds)
            equal &= bool((index.pixels == expected).all())
    medians = {
        "plain_seconds": statistics.median(plain_times),
        "cold_seconds": statistics.median(cold_times),
        "warm_seconds": statistics.median(warm_times),
    }
    return {
        "mode": "index",
        "masks": masks,
        **medians,
        "cold_ratio": medians["plain_seconds"] / medians["cold_seconds"],
        "spread": {"plain": plain_times, "cold": cold_times, "warm": warm_times},
        "equal": equal,
    }


def draw_masks(root: Path, masks: int) -> Path:
    """A list of ``masks`` lines below ``root``; files beyond the first are links."""
    lines = []
    for number in range(masks):
        image, mask = root / f"{number:06d}.jpg", root / f"{number:06d}.png"
        if number < DIFFERENT:
            picture, ids = make_image(0, "val", number)
            Image.fromarray(picture).resize(SIZE).save(image)
            Image.fromarray(ids).resize(SIZE, Image.Resampling.NEAREST).save(mask)
        else:
            os.link(root / f"{number % DIFFERENT:06d}.jpg", image)
            os.link(root / f"{number % DIFFERENT:06d}.png", mask)
        lines.append(f"{image.name} {mask.name}\n")
    path = root / "list.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def timed(function: Callable[[], R]) -> tuple[float, R]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    run_command(main)
