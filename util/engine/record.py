"""Environment of a run."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch


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


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        return subprocess.check_output(["git", *arguments], cwd=root, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.SubprocessError):
        return None
