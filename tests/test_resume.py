"""Runs that are stopped or killed anywhere, and runs of several processes, equal one run in one go."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import pty
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from tests.harness import (
    ENVIRONMENT,
    ROOT,
    Run,
    beside_progress_bars,
    call,
    contents,
    copied,
    differences,
    finished,
    json_lines,
    load,
    refused,
    scalars,
    sha256,
    start,
    succeeded,
)
from util.engine import build, evaluation, training
from util.engine.checkpoint import load_checkpoint, save_checkpoint
from util.files import held_alone

EACH_STEP = "train.checkpoint_minutes=0"
"""saves after every step"""
LONG = "train.epochs=50"
SMALLEST = ["train.epochs=1", "train.batch_size=4", "data.image_size=33", "eval.episodes=1"]


def started(config: Path, run: Path, *overrides: str, processes: int = 1) -> subprocess.Popen[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return start(*launcher[: 4 * (processes > 1)], "train.py", "--config", config, f"run_dir={run}", *overrides)


def resume(config: Path, run: Path, *overrides: str) -> str:
    """Continue a run in this process until its end; what it says."""
    return succeeded(call(train, "--config", config, f"run_dir={run}", "resume=auto", *overrides)).out


def until_saved(child: subprocess.Popen[str], run: Path) -> None:
    while child.poll() is None and not (run / "last.pt").exists():
        time.sleep(0.005)


def assert_same_run(run: Path, straight: Path) -> None:
    """Checkpoints, metrics and events, bit for bit; not the clock."""
    for name in ("last.pt", "best.pt"):
        got, expected = (load(folder / name) for folder in (run, straight))
        for state in (got, expected):
            for key in ("seconds", "config", "revision"):  # the config names its run_dir
                state.pop(key, None)
        assert differences(got, expected) == []
    assert (run / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    got, expected = scalars(run), scalars(straight)
    assert got.keys() == expected.keys()
    for name in expected.keys() - {"episodes_per_second"}:
        assert got[name] == expected[name], name  # none is lost, none stands twice


def copy_of(run: Run, folder: Path) -> Path:
    """A run that may be changed, as if it had been trained there."""
    shutil.copytree(run.folder, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(str(run.folder), str(folder)))
    return folder


# ---------------------------------------------------------------- signals


def test_ctrl_c_saves_first_and_the_run_goes_on_bit_for_bit(run: Run, config: Path, tmp_path: Path) -> None:
    """Sent in the second epoch, as a terminal does it: to the loader's workers as well."""
    end = load(run.folder / "last.pt")["step"]
    for attempt in range(4):  # where this process sleeps too long, the run is over before the signal
        folder = tmp_path / f"run{attempt}"
        child = started(config, folder, "workers=2")
        until_saved(child, folder)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGINT)
        result = finished(child)
        if result.code != 0:
            break
    assert result.code == 130 and beside_progress_bars(result.err) == []
    step = load(folder / "last.pt")["step"]
    assert end / 2 <= step < end
    last = f"stopped by SIGINT after step {step}, saved in {folder / 'last.pt'}; resume=auto continues"
    assert result.out.splitlines()[-1] == last
    assert f"resumed at step {step}" in resume(config, folder)
    assert_same_run(folder, run.folder)
    record = json.loads((folder / "run.json").read_text())
    assert record["resumed_at_step"] == step and record["finished"]["steps"] == end
    assert [begun["step"] for begun in record["starts"]] == [0, step]


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_first(config: Path, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = started(config, folder, "workers=1", EACH_STEP, processes=2)
    until_saved(child, folder)
    os.killpg(child.pid, signal.SIGTERM)
    _, out, err = finished(child)
    (last,) = [line for line in out.splitlines() if line.startswith("stopped by SIGTERM after step ")]
    assert "train.py" not in err, err[-3000:]  # torchrun's own traceback is all there is
    step = int(last.split()[5].rstrip(","))
    assert load(folder / "last.pt")["step"] == step < load(run.folder / "last.pt")["step"]


def test_a_closed_terminal_saves_first(config: Path, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        command = [sys.executable, "train.py", "--config", str(config), f"run_dir={folder}", EACH_STEP]
        os.chdir(ROOT)
        os.execvpe(sys.executable, command, ENVIRONMENT)
    while not (folder / "last.pt").exists():
        os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert 0 < load(folder / "last.pt")["step"] < load(run.folder / "last.pt")["step"]


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "a worker killed"])
def test_what_ends_a_validation_loses_no_step(
    killed: bool, config: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = evaluation.NetworkMethod.predict

    def ended(*arguments: Any) -> Any:
        if killed:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.NetworkMethod, "predict", ended)
        result = call(train, "--config", config, f"run_dir={tmp_path}/run")
    if killed:
        refused(result, "the system ended a loader process")
    else:
        assert result.code == 143 and beside_progress_bars(result.err) == []
    state = load(tmp_path / "run/last.pt")
    assert (state["step"], state["finished_step"]) == (load(run.folder / "last.pt")["step"] / 2, 0)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    resume(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", run.folder)


def test_a_run_of_so_many_steps_ends_inside_an_epoch_and_resumes_there(
    config: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "run"
    epoch = load(run.folder / "last.pt")["step"] // 2
    steps, step = epoch + 3, build.forward
    done = itertools.count(1)

    def asked(*arguments: Any) -> Any:
        if next(done) == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    command = ["--config", config, f"train.steps={steps}"]
    succeeded(call(train, *command, f"run_dir={straight}"))
    with monkeypatch.context() as patch:
        patch.setattr(training, "forward", asked)
        assert f"SIGTERM after step {steps - 1}" in call(train, *command, f"run_dir={folder}").out
    resume(config, folder, f"train.steps={steps}")
    assert_same_run(folder, straight)
    lines, recorded = json_lines(straight / "metrics.jsonl"), scalars(straight)
    assert [line["step"] for line in lines] == [epoch, steps]
    assert recorded["lr"][-1] == (steps, pytest.approx(0.03 * (1 / steps) ** 0.9))
    last = [value for _, value in recorded["loss/total"][epoch:]]
    assert lines[-1]["loss"]["total"] == pytest.approx(sum(last) / 3, rel=1e-5)


def test_a_signal_in_the_very_last_write_is_heeded(
    config: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fsync = copy_of(run, tmp_path / "run"), os.fsync
    best = load(folder / "best.pt")
    del best["threshold"]
    torch.save(best, folder / "best.pt")

    def asked(file: int) -> None:
        if list(folder.glob("best.pt.*.tmp")):
            os.kill(os.getpid(), signal.SIGTERM)
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", asked)
        result = call(train, "--config", config, f"run_dir={folder}", "resume=auto")
    assert result.code == 143 and result.out.splitlines()[-1].startswith("stopped by SIGTERM")
    assert "finished" not in (folder / "run.json").read_text()  # so that scripts/train_fold.sh resumes it
    resume(config, folder)
    assert_same_run(folder, run.folder)
    assert "finished" in (folder / "run.json").read_text()


# ---------------------------------------------------------------- killed, out of disk, damaged


def kill_and_resume(config: Path, folder: Path, kills: int, seed: int) -> None:
    """Kill a run ``kills`` times, each at a random moment of its work, then let it finish."""
    rng, hits = random.Random(seed), 0
    while hits < kills:
        tensorboard = folder / "tensorboard"
        before = tensorboard.stat().st_mtime_ns if tensorboard.exists() else 0
        child = started(config, folder, "resume=auto", EACH_STEP)
        while child.poll() is None and not (tensorboard.exists() and tensorboard.stat().st_mtime_ns != before):
            time.sleep(0.01)  # until this start has opened its own events
        if hits > 0:  # on a slow machine the first kill may have come before the first save
            until_saved(child, folder)
        time.sleep(rng.random() * 1.5)
        if child.poll() is not None:
            succeeded(finished(child))
            shutil.rmtree(folder)  # it was through before the signal
            continue
        os.killpg(child.pid, signal.SIGKILL)
        finished(child)
        hits += 1
    time.sleep(1)  # TensorBoard orders the event files of one second by process id, and this process is the oldest
    resume(config, folder, EACH_STEP)


def test_a_run_killed_at_random_moments_equals_one_in_one_go(config: Path, run: Run, tmp_path: Path) -> None:
    kill_and_resume(config, tmp_path / "run", kills=2, seed=0)
    assert_same_run(tmp_path / "run", run.folder)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"last.pt", "previous.pt", "best.pt"}
    assert not [name for name in names if name.endswith(".tmp") or name == "lock"]


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_equals_one_in_one_go(config: Path, run: Run, tmp_path: Path) -> None:
    for seed in range(5):
        kill_and_resume(config, tmp_path / f"run{seed}", kills=4, seed=seed + 1)
        assert_same_run(tmp_path / f"run{seed}", run.folder)


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on_exactly(
    config: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fsync, hashes = tmp_path / "run", os.fsync, []

    def full(file: int) -> None:
        if list(folder.glob("last.pt.*.tmp")) and (folder / "last.pt").exists():
            hashes.append(sha256(folder / "last.pt"))
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        failure = call(train, "--config", config, f"run_dir={folder}")
    refused(failure, folder / "last.pt", "No space left", "free some space", "run_dir")
    assert hashes == [sha256(folder / "last.pt")] and not list(folder.glob("*.tmp"))
    resume(config, folder)
    assert_same_run(folder, run.folder)


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_last_checkpoint_is_met_with_the_one_before(
    config: Path, run: Run, tmp_path: Path, damage: str
) -> None:
    folder = copy_of(run, tmp_path / "run")
    if damage == "gone":  # stopped between the two renames
        (folder / "last.pt").unlink()
    else:
        (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:5000])
    result = succeeded(call(train, "--config", config, f"run_dir={folder}", "resume=auto"))
    assert "continuing from" in result.err and "previous.pt" in result.err
    assert_same_run(folder, run.folder)
    assert load_checkpoint(folder / "previous.pt")["step"] > 0  # the damaged one took no good one's place
    assert (folder / "damaged.pt").exists() == (damage == "truncated")


def save_and_die(folder: Path, number: int) -> int:
    """Save in a process of its own, killed before its change ``number`` to the folder; its exit code."""
    pid = os.fork()
    if pid == 0:
        calls = itertools.count()

        def die(event: str, _: object) -> None:
            if event in ("os.rename", "os.link", "os.remove") and next(calls) == number:
                os._exit(9)

        sys.addaudithook(die)
        save_checkpoint(folder / "last.pt", {"step": 3}, keep=folder / "previous.pt")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_checkpoint_is_whole_whichever_change_of_a_save_is_the_last(tmp_path: Path) -> None:
    torch.save({"step": 1}, tmp_path / "previous.pt")
    torch.save({"step": 2}, tmp_path / "last.pt")
    kills = 0
    while save_and_die(tmp_path, number=kills) != 0:
        kills += 1
        assert load(tmp_path / "last.pt")["step"] == 2
    assert kills >= 3
    assert [load(tmp_path / name)["step"] for name in ("last.pt", "previous.pt")] == [3, 2]


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_the_losses_of_one_and_the_same_scores(config: Path, tmp_path: Path, count: int) -> None:
    runs, batch = [tmp_path / "alone", tmp_path / "together"], "train.batch_size=4"
    succeeded(call(train, "--config", config, f"run_dir={runs[0]}", batch))
    result = succeeded(finished(started(config, runs[1], batch, processes=count)))
    assert result.out.count("done: ") == 1  # the first process alone speaks
    for expected, got in zip(*(json_lines(folder / "metrics.jsonl") for folder in runs), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert got["miou"] == pytest.approx(expected["miou"], abs=1e-3)
    banks = [load(folder / "last.pt")["loss"]["bank.stored"] for folder in runs]
    assert torch.equal(*banks) and banks[0].sum() > 0
    assert f'"processes": {count}' in (runs[1] / "run.json").read_text()


def test_a_batch_that_cannot_be_shared_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "processes", lambda: 2)
    result = call(train, "--config", config, f"run_dir={tmp_path}/run", "train.batch_size=3")
    refused(result, "train.batch_size 3 is shared by 2 processes; make it a multiple of that")


def test_two_trainings_in_one_folder_are_refused_with_the_owner(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = started(config, run, "workers=2", LONG, EACH_STEP)
    until_saved(first, run)
    second = call(train, "--config", config, f"run_dir={run}", "resume=auto", LONG)
    refused(
        second, f"run_dir {run} is in use by process {first.pid} on {socket.gethostname()}; end it, or set run_dir="
    )
    first.kill()
    finished(first)


def test_a_folder_that_cannot_be_locked_is_used_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_daemon(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_daemon)
    with held_alone(tmp_path / "run"):
        assert "cannot be locked (No locks available)" in capsys.readouterr().err


# ---------------------------------------------------------------- what is not resumed, and what is


def test_a_second_start_without_resume_is_refused_and_overwrites_nothing(run: Run, config: Path) -> None:
    before = contents(run.folder)
    refused(call(train, "--config", config, f"run_dir={run.folder}"), run.folder, "resume=auto", "run_dir=")
    assert contents(run.folder) == before


def test_resuming_with_other_settings_is_refused_and_names_each(run: Run, config: Path) -> None:
    before = contents(run.folder)
    changed = ["train.lr=0.1", "seed=5", "data.fold=2", "train.epochs=3", "loss.pcl=0.1"]
    line = refused(
        call(train, "--config", config, f"run_dir={run.folder}", "resume=auto", "workers=1", *changed),
        *(run.folder / "last.pt", "resume=none", "train.lr is 0.03 there and 0.1 here", "seed is 0 there and 5 here"),
        *("data.fold is 0 there", "train.epochs is 2 there", "loss.pcl is 0.01 there and 0.1 here"),
    )
    assert "run_dir is" not in line and "workers is" not in line
    assert contents(run.folder) == before


def test_a_checkpoint_without_optimizer_is_not_resumed(run: Run, config: Path, tmp_path: Path) -> None:
    result = call(train, "--config", config, f"run_dir={tmp_path}", f"resume={run.folder / 'best.pt'}")
    refused(result, run.folder / "best.pt", "last.pt")


def test_resuming_a_finished_run_changes_nothing(run: Run, config: Path, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path / "run")
    assert "done" in resume(config, folder)
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        assert sha256(folder / name) == sha256(run.folder / name)


def test_a_run_resumes_with_its_data_moved_and_lists_of_windows_but_not_with_other_lines(
    tiny: Path, config: Path, tmp_path: Path
) -> None:
    root, overrides = copied(tiny, tmp_path / "here")
    overrides = [*overrides, *SMALLEST, f"run_dir={tmp_path}/run"]
    succeeded(call(train, "--config", config, *overrides))
    moved = root.rename(tmp_path / "there")
    for path in (moved / "lists").glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    overrides = [word.replace(str(root), str(moved)) for word in overrides]
    succeeded(call(train, "--config", config, *overrides, "resume=auto"))
    path = moved / "lists/train.txt"
    path.write_text("\n".join(path.read_text("utf-8-sig").split("\n")[::-1]))  # the same images: other episodes
    refused(call(train, "--config", config, *overrides, "resume=auto"), path, "has changed since checkpoint")
