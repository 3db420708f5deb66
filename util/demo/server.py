"""How the demo is served: to this machine only, to its own page only, and so that no upload outlives it."""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from util.errors import UserError
from util.segment.segmenter import Segmenter

HOST = "127.0.0.1"
FOLDER = "ntrenet_demo_"
"""what the names of the temporary folders begin with"""
LOCK = "lock"
"""in such a folder; held while its demo runs"""

App = Callable[[Any, Any, Any], Awaitable[None]]
"""an ASGI application"""


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """Make a temporary folder, which is removed however the demo ends; what a killed one left is removed too.

    SIGTERM and SIGHUP, a closed terminal, end the demo as Ctrl-C does.
    """
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:  # as under nohup
            signal.signal(name, signal.default_int_handler)
    remove_old_folders()
    made = tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True)
    with made as folder, FileLock(Path(folder) / LOCK):
        yield Path(folder)


def remove_old_folders() -> None:
    """Remove the folders of demos that run no more. One without a lock is being made, or is of somebody else."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError, Timeout):
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink() and (folder / LOCK).is_file():
                with FileLock(folder / LOCK, timeout=0):
                    shutil.rmtree(folder)


def require_free(port: int) -> None:
    """Raise UserError where the port is no port, or taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port just left is free
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} cannot be used ({error}); choose another with --port") from error


def require_gradio(folder: Path) -> None:
    """Import gradio, which reads its settings from the environment as it is imported.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("the demo needs gradio; pip install -r requirements-demo.txt") from error


def is_own(headers: Mapping[str, str]) -> bool:
    """Tell whether a request is of this demo's page: no other page in the visitor's browser may read or send anything.

    A name that another page has let point here shows in ``host``, another page in ``origin`` or ``sec-fetch-site``. A
    link to the page may be followed from anywhere.

    Args:
        headers: of the request, their names in small letters.
    """
    host = headers.get("host", "")
    if host.rsplit(":", 1)[0] not in (HOST, "localhost"):
        return False
    if headers.get("origin", f"http://{host}") != f"http://{host}":
        return False
    from_elsewhere = headers.get("sec-fetch-site", "none") in ("cross-site", "same-site")
    return not from_elsewhere or headers.get("sec-fetch-mode") == "navigate"


def own_requests_only(app: App) -> App:
    """Answer other requests than those of :func:`is_own` with 403."""

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope.get("headers", [])}
        if scope["type"] not in ("http", "websocket") or is_own(headers):
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"This page is served to 127.0.0.1 and localhost only.\n"})

    return guarded


def serve(segmenter: Segmenter[Any, Any], port: int) -> None:
    """Serve the page until Ctrl-C, SIGTERM or SIGHUP."""
    from starlette.middleware import Middleware

    from util.demo.page import CSS, THEME, build_page

    page = build_page(segmenter)
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
        app_kwargs={"middleware": [Middleware(own_requests_only)]},
    )
    print(f"open http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    page.close(verbose=False)
