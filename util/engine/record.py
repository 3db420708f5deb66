"""Environment and revision of a run, and files of JSON lines."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch

from util.files import naming, write_text

ROOT = Path(__file__).resolve().parents[2]


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, device, command line, git revision and whether the tree was clean."""
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


def processor() -> str:
    """Return the processor's model name, such as 'AMD EPYC 7763', or at least its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, "") or platform.processor() or platform.machine()


@cache
def revision() -> str:
    """Return the git revision of the code, and whether files differ from it; the same for the whole process."""
    commit = _git("rev-parse", "HEAD")
    return "unknown" if commit is None else commit if _git("status", "--porcelain") == "" else f"{commit} with changes"


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.check_output(["git", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def keep_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines that ``keep`` refuses, and a last line that was cut short."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if line.endswith("\n") and keep(json.loads(line))))


def append_json_line(path: Path, values: dict[str, Any]) -> None:
    """Append a line of JSON to a file."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
