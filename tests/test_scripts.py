"""The shell scripts that run folds and tables, with a stand-in for ``python`` that notes what it is asked to do."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
arguments = sys.argv[1:]
with open("calls.jsonl", "a") as file:
    file.write(json.dumps([os.environ.get("CUDA_VISIBLE_DEVICES"), *arguments]) + "\\n")
if arguments[0].startswith("scripts/"):
    if "make_synthetic.py" in arguments[0]:
        sys.exit()
    os.execv(sys.executable, [sys.executable, *arguments])
fold = next((int(a[10:]) for a in arguments if a.startswith("data.fold=")), None)
if fold is None:
    fold = int(arguments[arguments.index("--config") + 1].split("fold")[1][0])
if arguments[0] == "train.py":
    if os.environ.get("HANG"):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
        pathlib.Path("hanging").write_text("")
        time.sleep(60)
    if os.environ.get("FAIL") == str(fold):
        sys.exit(print("error: no data", file=sys.stderr) or 2)
    run = pathlib.Path(next(a for a in arguments if a.startswith("run_dir="))[8:])
    run.mkdir(parents=True, exist_ok=True)
    (run / "best.pt").write_text("")
    (run / "run.json").write_text(json.dumps({{"finished": {{"steps": 1, "seconds": 1, "peak_memory_mib": 1}}}}))
else:
    out = pathlib.Path(arguments[arguments.index("--out") + 1])
    score = {{"mean": 60.0 + fold, "std": 0.0, "per_seed": [60.0 + fold]}}
    scores = dict.fromkeys(("miou", "fb_iou", "precision"), score)
    about = {{"dataset": "D", "backbone": "b", "shots": 1, "fold": fold, "folds": 4, "seeds": [0], "episodes": 9}}
    about |= {{"unit": "percent", "config": {{"model": {{}}, "loss": {{}}, "seed": 0}}}}
    out.write_text(json.dumps(about | scores))
    os.utime(out, (2e9, 2e9))
"""


class Place(NamedTuple):
    folder: Path

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", f"scripts/{script}", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=os.environ | {"PATH": path} | environment, capture_output=True, text=True
        )

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("scripts", "configs", "util", "model"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    stand_in = tmp_path / "bin/python"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    return Place(tmp_path)


def test_train_folds_trains_then_evaluates_every_fold_and_ends_with_the_table(place: Place) -> None:
    done = place.run("train_folds.sh", "pascal", "resnet50", "5", "train.lr=0.1")
    assert done.returncode == 0, done.stderr
    calls = place.calls()
    assert [call[1] for call in calls] == ["train.py"] * 4 + ["test.py"] * 4 + ["scripts/fold_table.py"]
    for fold, call in enumerate(calls[:4]):
        run = f"runs/pascal/resnet50_fold{fold}_5shot"
        expected = ["--config", f"configs/pascal/resnet50_fold{fold}_5shot.yaml", f"run_dir={run}", "resume=auto"]
        assert call[2:] == [*expected, "train.lr=0.1"]
        assert calls[4 + fold][4:8] == ["--checkpoint", f"{run}/best.pt", "--seeds", "0"]
    assert done.stdout.splitlines()[-1].split() == ["mean", "61.5", "61.5", "61.5"]


def test_what_is_finished_is_skipped_and_the_table_still_printed(place: Place) -> None:
    place.run("train_folds.sh", "pascal", "resnet50", "1", "pfenet", "seed=2")
    before = len(place.calls())
    again = place.run("train_folds.sh", "pascal", "resnet50", "1", "pfenet", "seed=2")
    assert [call[1] for call in place.calls()[before:]] == ["scripts/fold_table.py"]
    assert "runs/pascal/resnet50_fold3_1shot_pfenet_seed2 is trained" in again.stdout
    assert "61.5" in again.stdout


def test_a_newer_checkpoint_is_evaluated_again(place: Place) -> None:
    place.run("train_folds.sh", "pascal", "resnet50", "1")
    os.utime(place.folder / "runs/pascal/resnet50_fold2_1shot/best.pt", (2.1e9, 2.1e9))
    before = len(place.calls())
    place.run("test_folds.sh", "pascal", "resnet50", "1")
    assert next(call[1:3] + call[4:6] for call in place.calls()[before:]) == [
        "test.py",
        "--config",
        "--checkpoint",
        "runs/pascal/resnet50_fold2_1shot/best.pt",
    ]
    assert len(place.calls()) == before + 2


def test_a_fold_that_fails_does_not_stop_the_others_and_the_same_command_mends_it(place: Place) -> None:
    failed = place.run("train_folds.sh", "pascal", "resnet50", "1", FAIL="1")
    assert failed.returncode == 1
    assert "error: folds 1 failed" in failed.stderr
    assert [call[1] for call in place.calls()] == ["train.py"] * 4
    assert place.run("train_folds.sh", "pascal", "resnet50", "1").returncode == 0
    assert [call[1] for call in place.calls()[4:]] == ["train.py"] + ["test.py"] * 4 + ["scripts/fold_table.py"]


@pytest.mark.parametrize("gpus", ["5", "2,3", "0,1,2,3"])
def test_gpus_share_the_folds(place: Place, gpus: str) -> None:
    done = place.run("train_folds.sh", "pascal", "resnet50", "1", GPUS=gpus)
    assert done.returncode == 0, done.stderr
    names = gpus.split(",")
    for script in ("train.py", "test.py"):
        used = {int(call[3].split("fold")[1][0]): call[0] for call in place.calls() if call[1] == script}
        assert used == {fold: names[fold % len(names)] for fold in range(4)}
    assert done.stdout.splitlines()[-1].split() == ["mean", "61.5", "61.5", "61.5"]


def test_a_failure_on_one_of_several_gpus_is_told(place: Place) -> None:
    failed = place.run("train_folds.sh", "pascal", "resnet50", "1", GPUS="0,1", FAIL="3")
    assert failed.returncode == 1
    assert "error: fold 3 failed; its last words: error: no data" in failed.stderr
    assert [call[1] for call in place.calls()] == ["train.py"] * 4


RUNS = {  # configs trained, evaluated: folds x shots x backbones or ablations
    "table1": 4 * 2 * 3,
    "table2": 4 * 2 * 2,
    "table3": 4 * 4,
    "table4": 4 * 3,
    "fig6": 4 * 6,
}


@pytest.mark.parametrize("table", RUNS)
def test_a_dry_run_prints_every_command_of_a_table_and_runs_none(place: Place, table: str) -> None:
    done = place.run("reproduce.sh", table, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert place.calls() == []
    commands = done.stdout.splitlines()
    trained = [line for line in commands if line.startswith("python train.py ")]
    assert len(set(trained)) == len(trained) == RUNS[table]
    assert len([line for line in commands if line.startswith("python test.py ")]) == RUNS[table]
    for line in trained:
        for word in line.split():
            assert not word.endswith(".yaml") or (ROOT / word).exists()


def test_the_same_run_serves_several_tables(place: Place) -> None:
    for table in ("table3", "table4"):
        place.run("reproduce.sh", table, "synthetic", "efficientnet_lite0", SEEDS="1")
    trained = [call for call in place.calls() if call[1] == "train.py"]
    assert len(trained) == (4 + 2) * 4


def test_the_ladder_trains_and_evaluates_each_row_fold_and_seed_once_and_goes_on_where_it_was(place: Place) -> None:
    part = {"ROWS": "pfenet full", "FOLDS": "1 3", "SEEDS": "0 2"}
    assert place.run("ladder.sh", "train.lr=0.1", FAIL="3", **part).returncode == 1
    assert [call[1] for call in place.calls()].count("test.py") == 4
    assert place.run("ladder.sh", "train.lr=0.1", **part).returncode == 0
    tested = [call for call in place.calls() if call[1] == "test.py"]
    runs = {call[call.index("--out") + 1] for call in tested}
    root = "runs/ladder/synthetic/efficientnet_lite0_1shot"
    rows = [(row, fold, seed) for row in ("pfenet", "full") for fold in (1, 3) for seed in (0, 2)]
    assert runs == {f"{root}/{row}_fold{fold}_seed{seed}/results.json" for row, fold, seed in rows}
    assert len(tested) == len(runs)
    assert all(call[call.index("--episodes") + 1] == "1000" and "train.lr=0.1" in call for call in tested)
    assert all(("configs/ablation/pfenet.yaml" in call) == ("pfenet_" in call[-1]) for call in tested)
    before = len(place.calls())
    assert place.run("ladder.sh", **part).returncode == 0
    assert [call[1] for call in place.calls()[before:]] == ["scripts/make_synthetic.py"]


def test_the_ladder_serves_another_config_and_diagnoses(place: Place) -> None:
    done = place.run("ladder.sh", "configs/custom.yaml", DRY_RUN="1", DIAGNOSE="1")
    commands = done.stdout.splitlines()
    for script in ("train.py", "scripts/diagnose.py", "test.py"):
        of_script = [line for line in commands if line.startswith(f"python {script} --config configs/custom.yaml")]
        assert len(of_script) == 4 * 4 * 3
    assert len(commands) == 3 * 4 * 4 * 3
    assert place.calls() == []


def test_no_script_has_a_syntax_error() -> None:
    for script in (ROOT / "scripts").glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("name", ["train_fold.sh", "test_fold.sh"])
def test_a_fold_script_without_arguments_prints_its_usage(place: Place, name: str) -> None:
    done = place.run(name)
    assert done.returncode == 2 and done.stdout == ""
    assert f"bash scripts/{name} DATASET BACKBONE FOLD SHOT [ABLATION] [key=value ...]" in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("reproduce.sh", ["table5"]),
        ("reproduce.sh", []),
        ("ladder.sh", ["configs/costum.yaml"]),
        ("train_fold.sh", ["pascal", "resnet50"]),
        ("train_fold.sh", ["pascal", "resnet5", "0", "1"]),
        ("train_fold.sh", ["pascal", "resnet50", "0", "1", "pfnet"]),
        ("test_fold.sh", ["pascal", "resnet50", "0", "1", "run_dir=elsewhere"]),
    ],
)
def test_a_mistake_in_the_arguments_ends_before_anything_runs(place: Place, script: str, arguments: list[str]) -> None:
    done = place.run(script, *arguments)
    assert done.returncode == 2
    assert done.stderr
    assert place.calls() == []


def test_a_slurm_task_trains_and_evaluates_its_fold(place: Place) -> None:
    done = place.run("slurm.sh", "pascal", "resnet50", "1", "pfenet", SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 0, done.stderr
    assert [call[1] for call in place.calls()] == ["train.py", "test.py"]
    assert all("resnet50_fold2_1shot_pfenet" in " ".join(call[1:]) for call in place.calls())


def test_a_preempted_slurm_task_lets_the_run_save_and_goes_back_into_the_queue(place: Place) -> None:
    scontrol = place.folder / "bin/scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" > scontrol.txt\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "77", "HANG": "1"}
    path = f"{place.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "scripts/slurm.sh", "pascal", "resnet50", "1"]
    task = subprocess.Popen(command, cwd=place.folder, env=os.environ | slurm | {"PATH": path})
    while not (place.folder / "hanging").exists():
        assert task.poll() is None
        time.sleep(0.02)
    task.terminate()
    assert task.wait(timeout=30) == 0
    assert (place.folder / "scontrol.txt").read_text() == "requeue 77_1\n"
    assert [call[1] for call in place.calls()] == ["train.py"]


def test_the_quick_starts_environment_is_used_where_none_is_active(tmp_path: Path) -> None:
    for folder in ("scripts", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "of the environment: $*"\n')
    python.chmod(0o755)
    command = ["bash", "scripts/train_fold.sh", "synthetic", "efficientnet_lite0", "0", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("of the environment: train.py --config"), done


def test_without_any_python_a_script_says_once_what_to_do(place: Place) -> None:
    for program in ("bash", "dirname"):
        (place.folder / "bin" / program).symlink_to(shutil.which(program) or program)
    (place.folder / "bin/python").unlink()
    done = place.run("train_folds.sh", "synthetic", "efficientnet_lite0", "1", PATH=str(place.folder / "bin"))
    assert done.returncode == 2
    assert done.stderr == (
        "error: there is no python; run 'bash scripts/environment.sh requirements.txt', which makes .venv, first\n"
    )
