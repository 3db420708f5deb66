"""How commands end, damaged weights, and code in files."""

from util.command import run_command

import ast
import errno
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model import weights
from model.weights import WeightsError, load_exactly, read_weights
from tests.harness import ROOT, Trap, ended, refused
from util.errors import UserError

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
