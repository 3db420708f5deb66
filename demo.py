"""A page to try: paint an object in a photo, and see it found in others, with a checkpoint or without any.

    pip install -r requirements.txt -r requirements-demo.txt
    python demo.py                                      # then open http://127.0.0.1:7860
    python demo.py --checkpoint runs/.../best.pt

It is served on this machine only, needs no network, and leaves no files: what is uploaded lies in a temporary folder
that goes when the demo ends (Ctrl-C, SIGTERM or a closed terminal), or, if it was killed, when the next one starts.
"""

from util.command import run_command

import argparse
import warnings
from pathlib import Path

from PIL import Image

from model.backbones import BACKBONES
from util.demo.server import require_free, require_gradio, serve, upload_folder
from util.segment.segmenter import DEFAULT_BACKBONE, load_segmenter


def main() -> None:
    args = parse_arguments()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # util.segment.pictures has a limit of its own
    with upload_folder() as folder:
        require_gradio(folder)
        require_free(args.port)
        serve(load_segmenter(args.checkpoint, args.backbone, args.device), args.port)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of a trained network; training-free segmentation without")
    parser.add_argument(
        "--backbone", choices=sorted(BACKBONES), help=f"of training-free segmentation; by default {DEFAULT_BACKBONE}"
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
