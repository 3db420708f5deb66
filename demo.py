"""A page to try: paint an object in a photo, and see it found in others, with a checkpoint or without any.

    pip install -r requirements.txt -r requirements-demo.txt
    python demo.py                                      # then open http://127.0.0.1:7860
    python demo.py --checkpoint runs/.../best.pt

It is served on this machine only, needs no network, and leaves no files: what is uploaded lies in a temporary folder
that goes when the demo ends (Ctrl-C or SIGTERM).
"""

from util.command import run_command

import argparse
import contextlib
import os
import signal
import socket
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from model.backbones import BACKBONES
from util.errors import UserError
from util.segment.segmenter import NTRESegmenter, Segmenter

HOST = "127.0.0.1"


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, so that the folder is removed
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # util.segment.pictures has a limit of its own
    with tempfile.TemporaryDirectory(prefix="ntrenet_demo_", ignore_cleanup_errors=True) as folder:
        require_gradio(folder)
        require_free(args.port)
        if args.checkpoint is None:
            segmenter: Segmenter[Any, Any] = NTRESegmenter.training_free(args.backbone, args.device)
        else:
            segmenter = NTRESegmenter.from_checkpoint(args.checkpoint, args.device)
        serve(segmenter, args.port, Path(folder))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of a trained network; training-free segmentation without")
    parser.add_argument("--backbone", choices=sorted(BACKBONES), default="efficientnet_lite0", help="without one")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


def require_gradio(folder: str) -> None:
    """Import gradio, which reads its settings from the environment as it is imported.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("the demo needs gradio; pip install -r requirements-demo.txt") from error


def require_free(port: int) -> None:
    """Raises UserError: the port is no port, or taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port just left is free
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} cannot be used ({error}); choose another with --port") from error


def serve(segmenter: Segmenter[Any, Any], port: int, folder: Path) -> None:
    """Until Ctrl-C or SIGTERM."""
    from util.demo.page import CSS, THEME, build_page

    page = build_page(segmenter, folder)
    page.launch(
        server_name=HOST,
        server_port=port,
        max_file_size="50mb",
        theme=THEME,
        css=CSS,
        footer_links=[],
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        state_session_capacity=16,
    )
    print(f"open http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    page.close(verbose=False)


if __name__ == "__main__":
    run_command(main)
