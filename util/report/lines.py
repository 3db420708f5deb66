"""Many runs in one small file: a line of JSON holds what test.py and train.py wrote of a run and tables need."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from util.files import read_json, write_text

SCORES = ("miou", "fb_iou", "precision")
KEPT = (
    *("dataset", "fold", "folds", "shots", "backbone", "episodes", "seeds", "unit", "train_seed", "list_sha256"),
    *("seconds", "peak_memory_mib", "dtype"),
)
OF_ONE_MACHINE = ("root", "train_list", "val_list", "classes")
"""of config.data: paths, and what the fold's own YAML says at length"""
MACHINE = ("device", "torch", "git_revision", "git_clean")


def to_line(path: Path) -> dict[str, Any]:
    """Join a results file with the run.json and the diagnosis.json beside it, and keep what tables need.

    ``per_seed`` scores, also those at the threshold chosen on base classes, are in percent.
    """
    results, training, diagnosis = (
        read_json(path.with_name(name)) for name in (path.name, "run.json", "diagnosis.json")
    )
    modified = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    line: dict[str, Any] = {"run": path.as_posix(), "modified": modified.isoformat(timespec="seconds")}
    line |= {key: results.get(key) for key in KEPT}
    line |= {name: {"per_seed": results[name]["per_seed"]} for name in SCORES}
    if (calibrated := results.get("calibrated")) is not None:
        line["calibrated"] = {
            "threshold": calibrated["threshold"],
            "miou": {"per_seed": calibrated["miou"]["per_seed"]},
        }
    data = results["config"]["data"]
    line["config"] = {key: results["config"][key] for key in ("model", "loss", "train", "eval", "seed")}
    line["config"]["data"] = {key: value for key, value in data.items() if key not in OF_ONE_MACHINE}
    line["environment"] = {key: results["environment"].get(key) for key in MACHINE}
    if training:
        line["trained"] = {key: training.get(key) for key in (*MACHINE, "finished")}
        line["trained"]["train_list_sha256"] = training.get("list_sha256", {}).get(data["train_list"])
        line["trained"]["starts"] = [
            {key: start[key] for key in ("time", "step")} for start in training.get("starts", [])
        ]
    if diagnosis:
        line["diagnosis"] = {kind: diagnosis[kind] for kind in ("novel", "base")}
    return line


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write the lines sorted by their run's name, so that a file under version control changes where runs did."""
    ordered = sorted(lines, key=lambda line: line["run"])
    write_text(path, "".join(json.dumps(line) + "\n" for line in ordered))
