"""Runs that are killed anywhere, and runs of several processes, equal one run in one go."""

import itertools
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from util.data.synthetic import generate
from util.engine.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CONFIG = """\
base: {base}
data:
  root: {root}
  train_list: {root}/lists/train.txt
  val_list: {root}/lists/val.txt
  min_area: 64
  image_size: 65
train: {{epochs: 2, batch_size: 4, warmup: 20, checkpoint_minutes: 0}}
eval: {{episodes: 8, every: 1, select: miou}}
precision: fp32
workers: 0
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("resume")
    generate(folder / "data", 28, 24)
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(base=ROOT / "configs/base/synthetic.yaml", root=folder / "data"))
    yield path
    shutil.rmtree(folder)


def start(config: Path, run: Path, *overrides: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "train.py", "--config", str(config), f"run_dir={run}", *overrides]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes)


def launcher(count: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")


@pytest.fixture(scope="module")
def straight(config: Path) -> Path:
    """The run in one go."""
    run = config.parent / "straight"
    child = start(config, run)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-2000:]
    return run


def assert_same_run(run: Path, straight: Path) -> None:
    """Checkpoints and metrics, bit for bit; not the clock."""
    for name in ("last.pt", "best.pt"):
        got, expected = (torch.load(folder / name, weights_only=True) for folder in (run, straight))
        for state in (got, expected):
            for key in ("seconds", "config"):  # the config names its run_dir
                del state[key]
        assert differences(got, expected) == []
    assert (run / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def differences(a: object, b: object, where: str = "") -> list[str]:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for n in range(len(a)) for d in differences(a[n], b[n], f"{where}[{n}]")]
    return [] if a == b else [f"{where}: {a!r} {b!r}"]


def kill_and_resume(config: Path, run: Path, kills: int, seed: int) -> int:
    """Kill a run ``kills`` times, each at a random moment of its work, then let it finish; how often it was hit."""
    rng, hits = random.Random(seed), 0
    while hits < kills:
        tensorboard = run / "tensorboard"
        before = tensorboard.stat().st_mtime_ns if tensorboard.exists() else 0
        child = start(config, run, "resume=auto")
        while child.poll() is None and not (tensorboard.exists() and tensorboard.stat().st_mtime_ns != before):
            time.sleep(0.01)  # until this start has opened its own events
        while hits > 0 and child.poll() is None and not (run / "last.pt").exists():
            time.sleep(0.01)  # on a slow machine the first kill may have come before the first save
        time.sleep(rng.random() * 1.5)
        if child.poll() is not None:
            assert child.returncode == 0, child.communicate()[1][-2000:]
            shutil.rmtree(run)  # it was through before the signal
            continue
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        hits += 1
    child = start(config, run, "resume=auto")
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-2000:]
    return len(json.loads((run / "run.json").read_text())["starts"])


def test_a_run_killed_at_random_moments_equals_one_in_one_go(config: Path, straight: Path, tmp_path: Path) -> None:
    starts = kill_and_resume(config, tmp_path / "run", kills=2, seed=0)
    assert starts >= 2
    assert_same_run(tmp_path / "run", straight)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"last.pt", "previous.pt", "best.pt"}
    assert not [name for name in names if name.endswith(".tmp") or name == "lock"]


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_equals_one_in_one_go(
    config: Path, straight: Path, tmp_path: Path
) -> None:
    for seed in range(5):
        kill_and_resume(config, tmp_path / f"run{seed}", kills=4, seed=seed + 1)
        assert_same_run(tmp_path / f"run{seed}", straight)


def until_saved(child: subprocess.Popen[str], run: Path) -> None:
    while child.poll() is None and not (run / "last.pt").exists():
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_saves_first_and_the_run_goes_on_exactly(
    config: Path, straight: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    child = start(config, run, "workers=2")
    until_saved(child, run)
    for _ in range(3):  # as shells and launchers repeat it
        os.killpg(child.pid, number)
        time.sleep(0.1)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 128 + number, err[-2000:]
    assert "Traceback" not in err
    assert out.splitlines()[-1].startswith(f"stopped by {number.name} after step ")
    assert str(run / "last.pt") in out
    assert not (run / "run.json").read_text().count("finished")
    child = start(config, run, "resume=auto")
    assert child.communicate(timeout=300) and child.returncode == 0
    assert_same_run(run, straight)


def test_sigterm_to_torchrun_saves_first(config: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(config, run, "workers=1", launcher=launcher(2))
    until_saved(child, run)
    os.killpg(child.pid, signal.SIGTERM)
    out, err = child.communicate(timeout=120)
    (last,) = [line for line in out.splitlines() if line.startswith("stopped by SIGTERM after step ")]
    assert "train.py" not in err, err[-3000:]  # torchrun's own traceback is all there is
    step = int(last.split()[5].rstrip(","))
    assert torch.load(run / "last.pt", weights_only=True)["step"] == step
    assert step < torch.load(straight / "last.pt", weights_only=True)["step"]


def test_a_closed_terminal_saves_first_and_nohup_goes_on(config: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execvpe(sys.executable, [sys.executable, "train.py", "--config", str(config), f"run_dir={run}"], ENVIRONMENT)
    while not (run / "last.pt").exists():
        os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    stopped_at = torch.load(run / "last.pt", weights_only=True)["step"]
    assert 0 < stopped_at < torch.load(straight / "last.pt", weights_only=True)["step"]
    before = (run / "last.pt").stat().st_mtime_ns
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what a child inherits, as from nohup
    child = start(config, run, "resume=auto")
    signal.signal(signal.SIGHUP, previous)
    while child.poll() is None and (run / "last.pt").stat().st_mtime_ns == before:
        os.killpg(child.pid, signal.SIGHUP)
        time.sleep(0.05)
    assert child.communicate(timeout=300) and child.returncode == 0
    assert_same_run(run, straight)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_worker_killed_by_the_system_is_one_line_and_a_save(config: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(config, run, "workers=2", "train.epochs=50")
    until_saved(child, run)
    workers = [path for path in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 2, err[-3000:]
    (line,) = [line for line in re.split(r"[\r\n]", err) if line.strip() and "%|" not in line]
    assert line.startswith("error: the system ended a loader process, most often for want of memory: lower workers")
    step = int(line.split("saved first, after step ")[1].split(":")[0])
    assert torch.load(run / "last.pt", weights_only=True)["step"] == step


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_last_checkpoint_is_met_with_the_one_before(
    config: Path, straight: Path, tmp_path: Path, damage: str
) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    if damage == "gone":  # stopped between the two renames
        (run / "last.pt").unlink()
    else:
        (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:5000])
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(straight), str(run)))
    child = start(config, run, "resume=auto")
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-2000:]
    assert "going on from" in err
    assert "previous.pt" in err
    assert "Traceback" not in err
    assert_same_run(run, straight)
    assert load_checkpoint(run / "previous.pt")["step"] > 0  # the damaged one took no good one's place
    assert (run / "damaged.pt").exists() == (damage == "truncated")


def save_and_die(folder: Path, call: int) -> int:
    """Save in a process of its own, killed before its change number ``call`` to the folder; its exit code."""
    pid = os.fork()
    if pid == 0:
        calls = itertools.count()

        def die(event: str, _: object) -> None:
            if event in ("os.rename", "os.link", "os.remove") and next(calls) == call:
                os._exit(9)

        sys.addaudithook(die)
        save_checkpoint(folder / "last.pt", {"step": 3}, keep=folder / "previous.pt")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_both_checkpoints_are_whole_whichever_change_of_a_save_is_the_last(tmp_path: Path) -> None:
    torch.save({"step": 1}, tmp_path / "previous.pt")
    torch.save({"step": 2}, tmp_path / "last.pt")
    seen = []
    while save_and_die(tmp_path, call=len(seen)) != 0:
        seen.append([torch.load(tmp_path / name)["step"] for name in ("last.pt", "previous.pt")])
    assert len(seen) >= 3
    assert all(steps in ([2, 1], [2, 2]) for steps in seen)
    assert [torch.load(tmp_path / name)["step"] for name in ("last.pt", "previous.pt")] == [3, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "previous.pt"}


def test_two_trainings_in_one_folder_are_refused_with_the_owner(config: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(config, run, "workers=2", "train.epochs=50")
    until_saved(first, run)
    second = start(config, run, "resume=auto", "train.epochs=50")
    _, err = second.communicate(timeout=120)
    assert second.returncode == 2
    wanted = f"error: run_dir {run} is in use by process {first.pid} on {socket.gethostname()}; end it, or set run_dir="
    assert err.startswith(wanted), err
    first.kill()  # its lock is stale: nobody took it away, and its workers still live
    first.communicate()
    assert (run / "lock").exists()
    third = start(config, run, "resume=auto", "train.epochs=50")
    moment = (run / "last.pt").stat().st_mtime_ns
    while third.poll() is None and (run / "last.pt").stat().st_mtime_ns == moment:
        time.sleep(0.01)
    third.send_signal(signal.SIGTERM)
    _, err = third.communicate(timeout=120)
    assert third.returncode == 143, err
    assert not (run / "lock").exists()


def test_a_refused_start_leaves_no_folder(config: Path, tmp_path: Path) -> None:
    child = start(config, tmp_path / "run", "train.lr=0.1", "resume=nowhere.pt")
    _, err = child.communicate(timeout=120)
    assert child.returncode == 2 and "nowhere.pt does not exist" in err
    assert not (tmp_path / "run").exists()


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_losses_of_one_and_the_same_scores(
    config: Path, straight: Path, tmp_path: Path, count: int
) -> None:
    run = tmp_path / "run"
    child = start(config, run, launcher=launcher(count))
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-3000:]
    assert out.count("done: ") == 1  # the first process alone speaks
    for got, expected in zip(losses(run), losses(straight), strict=True):
        assert got == pytest.approx(expected, abs=1e-5)
    metrics = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (run, straight)]
    for got, expected in zip(*metrics, strict=True):
        assert got["miou"] == pytest.approx(expected["miou"], abs=1e-3)
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (run, straight)]
    banks = [state["criterion"]["bank.stored"] for state in states]
    assert torch.equal(*banks)
    assert banks[0].sum() > 0
    assert json.loads((run / "run.json").read_text())["starts"][0]["processes"] == count


def test_a_batch_that_cannot_be_shared_is_refused(config: Path, tmp_path: Path) -> None:
    child = start(config, tmp_path / "run", "train.batch_size=3", launcher=launcher(2))
    _, err = child.communicate(timeout=300)
    assert child.returncode != 0
    assert "error: train.batch_size 3 is shared by 2 processes; make it a multiple of that" in err


def test_a_run_of_other_code_goes_on_with_a_warning(config: Path, straight: Path, tmp_path: Path) -> None:
    """Its checkpoint and config.yaml hold a key that there was once."""
    run = shutil.copytree(straight, tmp_path / "run")
    state = torch.load(run / "last.pt", weights_only=True)
    state["revision"] = "0" * 40
    state["config"]["resume_changed_code"] = False
    torch.save(state, run / "last.pt")
    text = (run / "config.yaml").read_text().replace(str(straight), str(run))
    (run / "config.yaml").write_text(text + "resume_changed_code: false\n")
    child = start(config, run, "resume=auto")
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-2000:]
    (line,) = [line for line in re.split(r"[\r\n]", err) if line.strip() and "%|" not in line]
    revisions = [entry["git_revision"] for entry in json.loads((run / "run.json").read_text())["starts"]]
    assert line.startswith(f"warning: checkpoint {run / 'last.pt'} was written by revision {'0' * 40}, this is ")
    assert len(revisions) == 2 and str(revisions[1] or "unknown") in line
    child = start(config, run, "resume=auto", "resume_changed_code=true")
    assert "unknown key 'resume_changed_code'" in child.communicate(timeout=300)[1]


def test_a_folder_of_another_config_is_refused_though_it_has_no_checkpoint(
    config: Path, straight: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(straight / "config.yaml", tmp_path / "run")
    child = start(config, tmp_path / "run", "resume=auto", "train.lr=0.5")
    _, err = child.communicate(timeout=300)
    assert child.returncode == 2
    assert "train.lr is 0.05 there and 0.5 here" in err
