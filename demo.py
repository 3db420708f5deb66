"""A page to try: mark an object in one image, and see it found in others, with a checkpoint or without one.

    python demo.py                                      # then open http://127.0.0.1:7860
    python demo.py --checkpoint runs/.../best.pt

It is served on this machine only, needs no network, and writes nothing: uploaded images stay in memory.
"""

from util.command import run_command

import argparse
from contextlib import suppress
from pathlib import Path

from model.backbones import BACKBONES
from util.photos.demo import HOST, Demo, Server
from util.photos.segmenter import DEFAULT_BACKBONE, load_segmenter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="of a trained network; without it, segmentation is training-free")
    add("--backbone", choices=sorted(BACKBONES), help=f"of training-free segmentation, default {DEFAULT_BACKBONE}")
    add("--port", type=int, default=7860)
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    demo = Demo(load_segmenter(args.checkpoint, args.backbone, args.device))
    with Server(demo, args.port) as server, suppress(KeyboardInterrupt):
        print(f"open http://{HOST}:{args.port} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_command(main)
