"""The shell scripts that run folds and tables, with a stand-in for ``python`` that records its arguments."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness import ROOT

STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, signal, sys
arguments = sys.argv[1:]
with open("calls.jsonl", "a") as file:
    file.write(json.dumps([os.environ.get("CUDA_VISIBLE_DEVICES"), *arguments]) + "\\n")
if "make_synthetic.py" in arguments[0]:
    sys.exit()
if arguments[0] == "scripts/report.py":
    os.execv(sys.executable, [sys.executable, *arguments])
fold = next((int(a[10:]) for a in arguments if a.startswith("data.fold=")), None)
if fold is None:
    fold = int(arguments[arguments.index("--config") + 1].split("fold")[1][0])
if arguments[0] == "train.py":
    if os.environ.get("HANG"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # a handler could run after the wait began
        pathlib.Path("hanging").write_text("")
        signal.sigtimedwait([signal.SIGTERM], 60)
        sys.exit(143)
    if os.environ.get("FAIL") == str(fold):
        sys.exit("error: no data")
    run = pathlib.Path(next(a for a in arguments if a.startswith("run_dir="))[8:])
    run.mkdir(parents=True, exist_ok=True)
    (run / "best.pt").write_text("")
    (run / "run.json").write_text(json.dumps({{"finished": {{"steps": 1, "seconds": 1, "peak_memory_mib": 1}}}}))
else:
    out = pathlib.Path(arguments[arguments.index("--out") + 1])
    scores = dict.fromkeys(("miou", "fb_iou", "precision"), {{"per_seed": [60.0 + fold]}})
    about = {{"dataset": "D", "backbone": "b", "shots": 1, "fold": fold, "folds": 4, "seeds": [0], "episodes": 9}}
    out.write_text(json.dumps(about | scores | {{"config": {{"seed": 0}}}}))
    os.utime(out, (2e9, 2e9))
"""


class Place(NamedTuple):
    """A copy of the project in which scripts run."""

    folder: Path

    def environment(self, **changes: str) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"} | changes

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command, env = ["bash", f"scripts/{script}", *arguments], self.environment(**environment)
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)

    def calls(self) -> list[list[str]]:
        """CUDA_VISIBLE_DEVICES and arguments of each call of ``python`` since this was last asked."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return [json.loads(line) for line in lines]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("scripts", "configs", "util", "model"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    stand_in = tmp_path / "bin/python"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    return Place(tmp_path)


def test_train_folds_trains_and_evaluates_every_fold_prints_the_table_and_skips_what_is_finished(place: Place) -> None:
    command = ("train_folds.sh", "pascal", "resnet50", "5", "pfenet", "seed=2", "train.lr=0.1")
    done = place.run(*command)
    assert done.returncode == 0, done.stderr
    calls = place.calls()
    assert [call[1] for call in calls] == ["train.py"] * 4 + ["test.py"] * 4 + ["scripts/report.py"]
    for fold, call in enumerate(calls[:4]):
        run = f"runs/pascal/resnet50_fold{fold}_5shot_pfenet_seed2"
        configs = [f"configs/pascal/resnet50_fold{fold}_5shot.yaml", "configs/ablation/pfenet.yaml"]
        assert call[2:] == ["--config", *configs, f"run_dir={run}", "resume=auto", "seed=2", "train.lr=0.1"]
        assert calls[4 + fold][5:8] == ["--checkpoint", f"{run}/best.pt", "--seeds"]
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| + PCL")]
    assert [cell.strip() for cell in row.split("|")[2:7]] == ["60.0", "61.0", "62.0", "63.0", "61.5"]
    assert row in place.run(*command).stdout
    assert [call[1] for call in place.calls()] == ["scripts/report.py"]
    os.utime(place.folder / "runs/pascal/resnet50_fold2_5shot_pfenet_seed2/best.pt", (2.1e9, 2.1e9))
    place.run(*command)
    assert [call[1] for call in place.calls()] == ["test.py", "scripts/report.py"]


@pytest.mark.parametrize("gpus", ["", "0,1"])
def test_a_fold_that_fails_does_not_stop_the_others_and_the_same_command_tries_it_again(
    place: Place, gpus: str
) -> None:
    failed = place.run("train_folds.sh", "pascal", "resnet50", "1", FAIL="1", GPUS=gpus)
    assert failed.returncode == 1
    assert "error: fold 1 failed" in failed.stderr and "error: no data" in failed.stderr
    assert [call[1] for call in place.calls()] == ["train.py"] * 4
    assert place.run("train_folds.sh", "pascal", "resnet50", "1", GPUS=gpus).returncode == 0
    assert [call[1] for call in place.calls()] == ["train.py"] + ["test.py"] * 4 + ["scripts/report.py"]


def test_gpus_share_the_folds(place: Place) -> None:
    assert place.run("train_folds.sh", "pascal", "resnet50", "1", GPUS="2,3").returncode == 0
    calls = place.calls()
    for script in ("train.py", "test.py"):
        used = {int(call[3].split("fold")[1][0]): call[0] for call in calls if call[1] == script}
        assert used == {0: "2", 1: "3", 2: "2", 3: "3"}


# folds x shots x backbones, or folds x rows
RUNS = {"table1": 4 * 2 * 3, "table2": 4 * 2 * 2, "table3": 4 * 4, "table4": 4 * 3, "fig6": 4 * 6}


@pytest.mark.parametrize("table", RUNS)
def test_a_dry_run_prints_every_command_of_a_table_and_runs_none(place: Place, table: str) -> None:
    done = place.run("reproduce.sh", table, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert place.calls() == []
    trained, tested = (
        [line.split() for line in done.stdout.splitlines() if line.startswith(f"python {name}.py ")]
        for name in ("train", "test")
    )
    folders = {word for words in trained for word in words if word.startswith("run_dir=")}
    assert len(folders) == len(trained) == len(tested) == RUNS[table]
    assert all((ROOT / word).exists() for words in trained for word in words if word.endswith(".yaml"))
    assert (table == "fig6") == any("model.prototype_channels=768" in words for words in trained)


def test_the_ladder_trains_and_evaluates_each_row_fold_and_seed_once_and_continues(place: Place) -> None:
    part = {"ROWS": "pfenet full", "FOLDS": "1 3", "SEEDS": "0 2"}
    assert place.run("ladder.sh", "train.lr=0.1", FAIL="3", **part).returncode == 1
    first = [call for call in place.calls() if call[1] == "test.py"]
    assert place.run("ladder.sh", "train.lr=0.1", **part).returncode == 0
    tested = first + [call for call in place.calls() if call[1] == "test.py"]
    root = "runs/ladder/synthetic/efficientnet_lite0_1shot"
    rows = [f"{row}_fold{fold}_seed{seed}" for row in ("full", "pfenet") for fold in (1, 3) for seed in (0, 2)]
    assert sorted(call[-1] for call in tested) == [f"{root}/{row}/results.json" for row in rows]
    assert len(first) == len(tested) / 2 and all("train.lr=0.1" in call for call in tested)
    assert all(("configs/ablation/pfenet.yaml" in call) == ("pfenet_" in call[-1]) for call in tested)
    assert place.run("ladder.sh", **part).returncode == 0
    assert [call[1] for call in place.calls()] == ["scripts/make_synthetic.py"]


def test_a_wrong_argument_ends_before_anything_runs(place: Place) -> None:
    for script, arguments, message in (
        ("reproduce.sh", ["table5"], "bash scripts/reproduce.sh table1|table2"),
        ("ladder.sh", ["configs/costum.yaml"], "configs/costum.yaml does not exist"),
        ("train_fold.sh", ["pascal", "resnet50", "0", "1", "pfnet"], "configs/ablation/pfnet.yaml does not exist"),
        ("test_fold.sh", ["pascal", "resnet50", "0", "1", "run_dir=elsewhere"], "leave out run_dir=elsewhere"),
    ):
        done = place.run(script, *arguments)
        assert done.returncode == 2 and message in done.stderr
    assert place.calls() == []


def test_a_slurm_task_runs_its_fold_and_a_preempted_one_lets_the_run_save_and_requeues(place: Place) -> None:
    assert place.run("slurm.sh", "pascal", "resnet50", "1", SLURM_ARRAY_TASK_ID="2").returncode == 0
    assert [call[1] for call in place.calls()] == ["train.py", "test.py"]
    scontrol = place.folder / "bin/scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" > scontrol.txt\n')
    scontrol.chmod(0o755)
    env = place.environment(SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_JOB_ID="77", HANG="1")
    task = subprocess.Popen(["bash", "scripts/slurm.sh", "pascal", "resnet50", "1"], cwd=place.folder, env=env)
    while not (place.folder / "hanging").exists():
        assert task.poll() is None
        time.sleep(0.02)
    task.terminate()
    assert task.wait(timeout=30) == 0
    assert (place.folder / "scontrol.txt").read_text() == "requeue 77_1\n"
    assert [call[1] for call in place.calls()] == ["train.py"]
