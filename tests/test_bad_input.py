"""How commands end, files that are written whole or not at all, damaged weights, code in files, and progress bars."""

from util.command import run_command

import ast
import errno
import io
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import weights
from model.weights import WeightsError, load_exactly, read_weights, torchvision_file
from scripts import make_synthetic, prepare_pascal
from tests.harness import ROOT, Trap, call, ended, refused, test_command
from util.errors import UserError
from util.files import held_alone, write_atomically
from util.progress import progress

# ---------------------------------------------------------------- how a command ends


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def test_mistakes_end_in_one_line_with_exit_code_2() -> None:
    assert ended(raising(UserError("list a\nb.txt does not exist"))).err == "error: list a b.txt does not exist\n"
    refused(ended(raising(WeightsError("no weights"))), "error: no weights")
    refused(ended(Path("/no/such/file").read_bytes), "cannot write or read /no/such/file: No such file")
    for allocate in (lambda: torch.empty(2**50), lambda: np.zeros(2**50)):
        refused(ended(allocate), "out of memory", "lower train.batch_size")


def test_ctrl_c_and_success_have_their_exit_codes() -> None:
    assert ended(raising(KeyboardInterrupt())) == (130, "", "interrupted\n")
    assert ended(lambda: print("done")) == (0, "done\n", "")


@pytest.mark.parametrize("error", [RuntimeError("a mistake of ours"), OSError(errno.EPIPE, "Broken pipe")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_command(raising(error))


# ---------------------------------------------------------------- writing


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A limit of the system on the size of files, with the effect of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_old_file_stays_until_the_new_one_is_whole_and_is_kept_under_another_name(tmp_path: Path) -> None:
    path, kept = tmp_path / "last.pt", tmp_path / "previous.pt"
    for text in ("first", "second", "third"):
        write_atomically(path, lambda file, text=text: file.write(text.encode()), keep=kept)  # type: ignore[misc]
        assert path.read_text() == text
    assert kept.read_text() == "second"

    def fail(file: Any) -> None:
        file.write(b"half")
        raise ValueError("of ours")

    with pytest.raises(ValueError, match="of ours"):
        write_atomically(path, fail, keep=kept)
    assert (path.read_text(), kept.read_text()) == ("third", "second") and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_ends_other_commands_in_one_line(config: Path, short: Path, tmp_path: Path) -> None:
    command = ["--config", config, "--checkpoint", short / "best.pt", "--episodes", 2, "--out", tmp_path / "r.json"]
    with files_of_at_most(0):
        refused(call(test_command, *command), tmp_path / "r.json", "File too large")
        made = call(make_synthetic, "--out", tmp_path / "made", "--train", 20, "--val", 20)
    refused(made, tmp_path / "made/JPEGImages/train_00000.jpg", "File too large")


def test_a_held_folder_is_clean_and_leaves_nothing_if_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held_alone(folder):
        assert (folder / "lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not folder.exists()
    folder.mkdir()
    for name in ("last.pt", "last.pt.0123.tmp"):  # the second is of a process that was killed while it wrote
        (folder / name).touch()
    with held_alone(folder):
        assert {path.name for path in folder.iterdir()} == {"last.pt", "lock"}


# ---------------------------------------------------------------- weights

STATE = {"weight": torch.arange(60.0).reshape(5, 12), "bias": torch.linspace(-1, 1, 5)}


def test_sound_weights_are_read_in_each_form(tmp_path: Path) -> None:
    for content in (STATE, {"state_dict": {f"module.{name}": value for name, value in STATE.items()}}):
        torch.save(content, tmp_path / "w.pth")
        layer = torch.nn.Linear(12, 5)
        load_exactly(layer, read_weights(tmp_path / "w.pth")[0], source="w.pth")
        assert torch.equal(layer.weight, STATE["weight"])


@pytest.mark.parametrize(
    ("content", "piece"),
    [
        (STATE | {"weight": torch.full((5, 12), torch.nan)}, "'weight' is no tensor of finite numbers"),
        (STATE | {"weight": STATE["weight"].T}, "1 of another shape (weight)"),
        ({"weight": STATE["weight"], "more": torch.zeros(1)}, "1 missing (bias), 1 unknown (more)"),
        ({"model": STATE, "epoch": 3}, "does not hold a state dict but model, epoch"),
        ([torch.zeros(3)], "does not hold a state dict"),
    ],
)
def test_weights_that_do_not_fit_are_refused(content: object, piece: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(content, path)
    refused(ended(lambda: load_exactly(torch.nn.Linear(12, 5), read_weights(path)[0], source=str(path))), path, piece)


def test_damaged_weights_and_code_are_refused_and_code_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, exploded = tmp_path / "w.pth", tmp_path / "exploded"
    torch.save(STATE, path)
    data = path.read_bytes()
    for damaged in (data[:-200], b"", b"text"):
        path.write_bytes(damaged)
        refused(ended(lambda: read_weights(path)), path, "fetch it again")
    other = path.rename(tmp_path / "w.safetensors")
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    refused(ended(lambda: read_weights(other)), other, "pip install safetensors")
    for zipped in (True, False):
        torch.save({"state_dict": Trap(exploded)}, path, _use_new_zipfile_serialization=zipped)
        refused(ended(lambda: read_weights(path)), path, "fetch it again")
    assert not exploded.exists()
    torch.load(path, weights_only=False)
    assert exploded.exists(), "the trap is a working one"


# ---------------------------------------------------------------- nothing that is read or fetched is run

MAY_FETCH = {"util/data/download.py", "model/weights.py"}
"""sources that open addresses: each compares a hash with the file"""


def test_tensors_and_arrays_are_loaded_without_code_and_only_two_sources_fetch() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {name for name in listed if not name.startswith("tests/") and (ROOT / name).is_file()}
    assert {"train.py", *MAY_FETCH} <= found
    for name in found:
        text = (ROOT / name).read_text(encoding="utf-8")
        calls = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        assert all("weights_only=True" in call for call in calls if call.startswith("torch.load(")), name
        assert "allow_pickle=True" not in text, name
        assert name in MAY_FETCH or not re.search(r"urlopen|urlretrieve|import requests|httpx|from_url\(", text), name


def test_every_download_has_a_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for _, md5 in prepare_pascal.DOWNLOADS.values():
        assert re.fullmatch("[0-9a-f]{32}", md5)
    asked: list[str | None] = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, hash_prefix=None: asked.append(hash_prefix))
    for backbone in ("resnet50", "resnet101", "vgg16_bn"):
        path = torchvision_file(backbone, tmp_path)
        assert path.parent == tmp_path and asked[-1] is not None and f"-{asked[-1]}." in path.name


# ---------------------------------------------------------------- progress bars


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize(("stream", "lines"), [(io.StringIO(), 2), (Closed(), 0)])
def test_a_log_gets_a_first_and_a_last_line_and_a_closed_terminal_stops_nothing(
    stream: io.StringIO, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(total=500, desc="title", unit="step", mininterval=0) as shown:
        for _ in range(500):
            shown.update()
    found = stream.getvalue().splitlines()
    assert len(found) == lines and all("title" in line for line in found)
    assert not lines or ("0/500" in found[0] and "100%" in found[1])
