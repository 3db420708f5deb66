"""The walk of model/README.md, applied to a copy of the tree, gives a module with a loss, a switch and a table row."""

import json
import re
import shutil
import subprocess
from pathlib import Path

from tests.harness import ROOT, process, succeeded

PARTS = ("model", "util", "scripts", "configs", "train.py", "test.py")
CONFIG = "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml"
SMALL = ["data.image_size=65", "data.min_area=16", "data.scale=[0.4,0.5]", "eval.episodes=2"]
MACHINE = ["device=cpu", "precision=fp32", "workers=0"]


def test_the_walk_gives_a_module_that_reads_the_supports_in_four_files(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tree / part)
    walk = (ROOT / "model/README.md").read_text(encoding="utf-8").partition("## Add a module of your own")[2]
    blocks = re.findall(r"^```diff\n(.*?)^```$", walk, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        assert block.count("+++ b/") == 1
        subprocess.run(["git", "apply", "-"], cwd=tree, input=block, text=True, check=True)

    overrides = [*SMALL, *MACHINE, "model.surroundings=true"]
    succeeded(process("scripts/make_synthetic.py", "--train", "24", "--val", "24", cwd=tree))
    training = ["train.epochs=1", "train.batch_size=10", "run_dir=runs/surroundings"]
    succeeded(process("train.py", "--config", CONFIG, *overrides, *training, cwd=tree))
    (line,) = (tree / "runs/surroundings/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2
    assert json.loads(line)["loss"]["surroundings"] > 0
    checkpoint = ["--checkpoint", "runs/surroundings/best.pt", "--out", "runs/surroundings/results.json"]
    succeeded(process("test.py", "--config", CONFIG, *overrides, *checkpoint, cwd=tree))
    succeeded(process("scripts/report.py", "runs", "--out", "report.md", cwd=tree))
    rows = [line.split("|")[1] for line in (tree / "report.md").read_text().splitlines() if line.startswith("|")]
    assert any("model.surroundings=true" in row for row in rows), rows
