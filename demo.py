"""A page to try: mark an object in one image, and see it found in others, with a checkpoint or without one.

    python demo.py                                      # then open http://127.0.0.1:7860
    python demo.py --checkpoint runs/.../best.pt

It is served on this machine only, needs no network, and writes nothing: uploaded images stay in memory.
"""

from util.command import run_command

import argparse
from contextlib import suppress

from util.photos.demo import HOST, Demo, Server
from util.photos.segmenter import add_segmenter_arguments, load_segmenter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_segmenter_arguments(parser)
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    demo = Demo(load_segmenter(args))
    with Server(demo, args.port) as server, suppress(KeyboardInterrupt):
        print(f"open http://{HOST}:{args.port} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_command(main)
