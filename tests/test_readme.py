"""README's commands: their files, options and configs exist; a slow test runs those that need no download, in order."""

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.harness import ROOT
from tests.scenes import scene, write_pair
from util.config import load_config

NOT_RUN = r"pascal|coco|COCO|--download|pfenet|^demo\.py|^scripts/(bench|export)\.py|^-m "
"""commands after ``python`` that need PASCAL, COCO, the network, a browser, minutes or other requirements"""
TINY = ["data.image_size=65", "data.scale=[0.9,1.1]", "data.min_area=100", "model.prototype_channels=16"]
TINY += ["train.epochs=1", "train.warmup=1", "eval.episodes=4", "workers=0", "device=cpu"]
SMALL = {
    "scripts/make_synthetic.py": ["--train", "40", "--val", "30"],
    **dict.fromkeys(("train.py", "test.py", "scripts/check_data.py", "scripts/diagnose.py"), TINY),
}
STAND_IN = f"""#!{sys.executable}
import os, re, sys
if re.search({NOT_RUN!r}, " ".join(sys.argv[1:])) is None:
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:], *{SMALL}.get(sys.argv[1], [])])
"""
"""``python`` that makes trainings small"""


class Parsed(Exception):  # noqa: N818 (it is no error)
    """A command line was understood."""


def shell_blocks() -> str:
    return "".join(re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE))


def commands() -> Iterator[list[str]]:
    """Words of each command, without comments."""
    for line in shell_blocks().replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def test_the_files_options_and_configs_of_the_readmes_commands_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_known_args

    def stop(parser, args=None, namespace=None):
        found, others = parse(parser, args, namespace)
        assert not [word for word in others if word.startswith("-")], sys.argv
        if "config" in found and found.config[0].parts[0] == "configs":  # others are written by earlier commands
            load_config(found.config, [word for word in sys.argv if re.match(r"[a-z_.]+=", word)])
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.chdir(ROOT)
    parsed = set()
    for program, script, *words in commands():
        if program == "bash":
            assert (ROOT / script).exists(), script
        elif program == "python" and script != "-m":
            monkeypatch.setattr(sys, "argv", [script, *words])
            with pytest.raises(Parsed):
                runpy.run_path(script, run_name="__main__")
            parsed.add(script)
    assert {"train.py", "test.py", "predict.py", "scripts/report.py"} <= parsed


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The project with a stand-in for its environment, and the images that README names."""
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
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_readme_works_from_a_fresh_shell(tree: Path) -> None:
    script = "trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR\n" + shell_blocks()
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tree), "DRY_RUN": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", "-Eeuo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
    assert (tree / "runs/quickstart/panel.png").exists()


def test_small_commands_do_not_import_torch() -> None:
    small = "check_data, make_lists, make_synthetic, prepare_coco, prepare_pascal, report"
    code = f"from scripts import {small}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
