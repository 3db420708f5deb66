"""README's commands as typed, in README's order, from a fresh shell; and what a command says if a package is missing.

``python`` of the tree's .venv is a stand-in. It makes what trains or evaluates small, and only notes a command that
``NOT_RUN`` names, or, among the fast tests, that is not of README's "Your own data". Those are parsed afterwards.
"""

import argparse
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from scenes import ROOT, scene, write_pair

from util.config import load_config

NOT_RUN = {
    r"pascal|coco|COCO": "needs PASCAL or COCO",
    r"--download|pfenet": "needs the network",
    r"^demo\.py": "serves until Ctrl-C",
    r"^scripts/bench\.py": "takes minutes",
    r"^scripts/export\.py": "needs requirements-export.txt",
    r"[A-Z]+_[A-Z]+|\[": "has a place to fill in",
    r"^-m ": "installs, or runs the tests",
}
"""pattern of a command line after ``python``, and why it is parsed only"""
TINY = [
    "data.image_size=65",
    "data.scale=[0.9, 1.1]",
    "data.min_area=100",
    "model.prototype_channels=16",
    "train.epochs=1",
    "train.warmup=1",
    "eval.episodes=4",
    "workers=0",
    "device=cpu",
]
SMALL = {
    "scripts/make_synthetic.py": ["--train", "40", "--val", "30"],
    **dict.fromkeys(("train.py", "test.py", "scripts/check_data.py", "scripts/diagnose.py"), TINY),
}
STAND_IN = f"""#!{sys.executable}
import json, os, re, sys
line = " ".join(sys.argv[1:])
wanted = re.search(os.environ["WANTED"], line) or sys.argv[1] == "-c"
run = wanted and not any(re.search(pattern, line) for pattern in {list(NOT_RUN)})
with open("calls.jsonl", "a") as file:
    print(json.dumps([bool(run), *sys.argv[1:]]), file=file)
if run:
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:], *{SMALL}.get(sys.argv[1], [])])
"""


class Parsed(Exception):  # noqa: N818 (it is no error)
    """A command line was understood."""


def shell_blocks() -> str:
    return "".join(re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The project with a stand-in for its environment, and the pictures that README speaks of."""
    for path in ROOT.iterdir():
        if path.name in ("model", "util", "scripts", "configs", "lists", "tests") or path.suffix in (".py", ".txt"):
            (tmp_path / path.name).symlink_to(path)
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    for name in ("pip", "ruff", "pyrefly"):
        (programs / name).symlink_to(shutil.which("true") or "/bin/true")
    (programs / "python").write_text(STAND_IN)
    (programs / "python").chmod(0o755)
    for n in range(20):
        write_pair(tmp_path / "data/mine", f"{n + 1:03}", 1 + n % 4, 1 + (n + 1) % 4)
    masks = {"cat.jpg": "cat.png", "s1.jpg": "m1.png", "s2.jpg": "m2.png"}
    for seed, name in enumerate([*masks, "photo.jpg", "photos/1.jpg", "folder/2.jpg", "data/mine/new/3.jpg"]):
        pixels, disc = scene(seed, 320, 240)  # as large as the box that README gives
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
        if name in masks:
            Image.fromarray(disc).save(tmp_path / masks[name])
    (tmp_path / "targets.yaml").write_text("disc: {supports: [s1.jpg, s2.jpg], masks: [m1.png, m2.png]}\n")
    return tmp_path


@pytest.mark.parametrize("wanted", ["data/mine", pytest.param("", marks=pytest.mark.slow)])
def test_every_command_of_the_readme_works_from_a_fresh_shell(tree: Path, monkeypatch, wanted: str) -> None:
    say = "trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR\n"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tree), "DRY_RUN": "1", "OMP_NUM_THREADS": "1", "WANTED": wanted}
    done = subprocess.run(
        ["bash", "-Eeuo", "pipefail", "-c", say + shell_blocks()],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
    calls = [json.loads(line) for line in (tree / "calls.jsonl").read_text().splitlines()]
    assert {"train.py", "test.py", "predict.py"} <= {call[1] for call in calls if call[0]}
    monkeypatch.chdir(tree)
    for run, *words in calls:
        if not run and words[0].endswith(".py"):
            require_understood(words, monkeypatch)


def require_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's options are known, and its config is there and takes its overrides."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(parser, args=None, namespace=None):
        found, others = parse(parser, args, namespace)
        assert not [word for word in others if word.startswith("-")], words
        if "config" in found and "YOUR_CONFIG" not in words:
            load_config(found.config, [word for word in words if re.match(r"[a-z_.]+=", word)])
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed):
        runpy.run_path(words[0], run_name="__main__")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)


COMMANDS = [
    "train.py",
    "test.py",
    "predict.py",
    "demo.py",
    *sorted(f"scripts/{p.name}" for p in ROOT.glob("scripts/*.py")),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_where_packages_are_missing_one_line_says_what_to_do(command: str) -> None:
    bare = [sys.executable, "-S", command]  # without site-packages
    done = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    remedy = r"run '(source \.venv/bin/activate|pip install -r requirements\.txt)' first"
    assert re.fullmatch(f"error: .* has no package '.*'; {remedy}\n", done.stderr)


def test_small_commands_do_not_wait_for_torch() -> None:
    small = "check_data, fold_table, make_lists, make_synthetic, prepare_coco, prepare_pascal, report"
    code = f"from scripts import {small}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
