"""Environment and revision of a run, and files of JSON lines."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch

from util.errors import UserError
from util.files import naming, write_text

ROOT = Path(__file__).resolve().parents[2]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, command line, git revision and whether the tree was clean."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({processor()}, {os.cpu_count()} cores), {torch.get_num_threads()} threads",
        "git_revision": _git("rev-parse", "HEAD"),
        "git_clean": _git("status", "--porcelain") == "",
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's model name, such as 'AMD EPYC 7763', or at least its architecture."""
    with suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown processor"


@cache
def revision() -> str:
    """The git revision of the code, and whether files differ from it; as it was when first asked."""
    commit = _git("rev-parse", "HEAD")
    return "unknown" if commit is None else commit if _git("status", "--porcelain") == "" else f"{commit} with changes"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def keep_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines that ``keep`` refuses: what an interrupted run wrote after its last checkpoint.

    Raises:
        UserError: a line is damaged; one that was cut short at the end is dropped.
    """
    if path.exists():
        try:
            text = path.read_text(encoding="utf-8")
            lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
            kept = "".join(line for line in lines if keep(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path} holds a damaged line ({error!r:.100}); take it out, or name another run_dir"
            ) from error
        write_text(path, kept)


def append_json_line(path: Path, values: dict[str, Any]) -> None:
    """Append a line of JSON to a file."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())
