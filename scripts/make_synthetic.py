"""Write the synthetic segmentation data set: python scripts/make_synthetic.py --out data/synthetic"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import cv2

from util.data.synthetic import CLASS_NAMES, generate
from util.progress import progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder to write to (data/synthetic; --small: data/synthetic_small)")
    parser.add_argument(
        "--small", action="store_true", help="5 to 8 small objects an image instead of 2 or 3 large ones"
    )
    parser.add_argument("--train", type=int, default=600, help="number of training images")
    parser.add_argument("--val", type=int, default=300, help="number of validation images")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files, byte for byte")
    args = parser.parse_args()
    out = args.out or Path("data/synthetic_small" if args.small else "data/synthetic")
    cv2.setNumThreads(1)
    written = generate(out, args.train, args.val, args.seed, args.small, lambda items: progress(items, unit="image"))
    size = f"{args.train} training and {args.val} validation images of {len(CLASS_NAMES)} classes"
    print(f"{out}: {size}" + ("." if written else " are already there; nothing to do."))


if __name__ == "__main__":
    run_command(main)
