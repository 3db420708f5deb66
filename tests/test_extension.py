"""The walk of model/README.md, applied to a copy of the tree, gives a module with a loss, a switch and a row."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("model", "util", "scripts", "configs", "train.py", "test.py")
CONFIG = "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml"
SMALL = ["data.image_size=65", "data.min_area=16", "data.scale=[0.4,0.5]", "eval.episodes=2"]
MACHINE = ["device=cpu", "precision=fp32", "workers=0"]


def test_the_walk_of_the_readme_gives_a_module_with_a_loss_a_switch_and_a_row_of_table_3(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        tree.mkdir(exist_ok=True)
        copy(ROOT / part, tree / part)
    walk = (ROOT / "model/README.md").read_text(encoding="utf-8").partition("## Add a module of your own")[2]
    blocks = re.findall(r"^```diff\n(.*?)^```$", walk, re.MULTILINE | re.DOTALL)
    assert len(blocks) <= 5
    for block in blocks:
        subprocess.run(["git", "apply", "-"], cwd=tree, input=block, text=True, check=True)

    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], cwd=tree, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    overrides = [*SMALL, *MACHINE, "model.boundary=true"]
    run("scripts/make_synthetic.py", "--train", "24", "--val", "24")
    run("train.py", "--config", CONFIG, *overrides, "train.epochs=1", "train.batch_size=10", "run_dir=runs/boundary")
    (line,) = (tree / "runs/boundary/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2
    assert json.loads(line)["loss"]["boundary"] > 0
    checkpoint = ["--checkpoint", "runs/boundary/best.pt", "--out", "runs/boundary/results.json"]
    run("test.py", "--config", CONFIG, *overrides, *checkpoint)
    run("scripts/report.py", "runs", "--out", "report")
    rows = [line.split("|")[1].strip() for line in (tree / "report/report.md").read_text().splitlines() if "|" in line]
    assert "+ boundary" in rows
