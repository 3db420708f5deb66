"""No source runs what it reads or fetches. ruff's security rules (.ruff.toml) find most such calls."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from model.weights import torchvision_file
from scripts import prepare_pascal
from scripts.prepare_coco import read_jobs
from tests.harness import ROOT
from util.errors import UserError

MAY_FETCH = {"util/data/download.py", "model/weights.py"}
"""the sources that open addresses: each compares a hash with what came"""
SHELL = re.compile(r"\beval\b|\b(curl|wget)\b[^|\n]*\|\s*(ba|z)?sh\b|\bchmod\s+(-R\s+)?777\b|--trusted-host|--insecure")


def sources(pattern: str) -> dict[str, str]:
    """Of the repository, those not yet added included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in listed if (ROOT / name).is_file()}


def test_tensors_and_arrays_are_loaded_without_code_and_only_two_sources_fetch() -> None:
    found = sources("*.py")
    assert {"train.py", *MAY_FETCH} <= found.keys()
    for name, text in found.items():
        if not name.startswith("tests/"):
            calls = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
            assert all("weights_only=True" in call for call in calls if call.startswith("torch.load(")), name
            assert "allow_pickle=True" not in text, name
            assert name in MAY_FETCH or not re.search(r"urlopen|urlretrieve|requests\.|httpx|from_url\(", text), name


def test_no_shell_script_runs_what_it_reads_or_fetches() -> None:
    found = sources("*.sh")
    assert "scripts/quickstart.sh" in found
    for name, text in found.items():
        code = [line.partition(" #")[0] for line in text.splitlines() if not line.lstrip().startswith("#")]
        assert [line for line in code if SHELL.search(line)] == [], name


# tests/test_prepare_pascal.py has archives with '../', absolute names and links, and downloads with another checksum


@pytest.mark.parametrize(
    "change",
    [{"file_name": name} for name in ("../evil.jpg", "/evil.jpg", "..", "", "a\\..\\evil.jpg", "a\n.jpg", 3)],
    ids=str,
)
def test_annotations_cannot_name_a_file_elsewhere(change: dict[str, object], tmp_path: Path) -> None:
    names = yaml.safe_load((ROOT / "configs/base/coco.yaml").read_text(encoding="utf-8"))["data"]["classes"]
    good = {"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "height": 4, "width": 5}
    shown = {"id": 7, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [[0, 0, 3, 0, 3, 3]]}
    data = {"categories": [{"id": n, "name": c} for n, c in enumerate(names, 1)], "annotations": [shown]}
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({**data, "images": [good]}))
    assert [job.mask for job in read_jobs(path)] == ["COCO_train2014_000000000001.png"]
    path.write_text(json.dumps({**data, "images": [good | change]}))
    with pytest.raises(UserError, match=r"instances\.json is damaged"):
        read_jobs(path)


def test_every_download_has_a_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, *urls, md5 in prepare_pascal.DOWNLOADS.values():
        assert Path(name).name == name and urls and re.fullmatch("[0-9a-f]{32}", md5)
    asked: list[str | None] = []
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path, hash_prefix=None: asked.append(hash_prefix)
    )
    for backbone in ("resnet50", "resnet101", "vgg16_bn"):
        path = torchvision_file(backbone, tmp_path)
        assert path.parent == tmp_path and asked[-1] is not None and f"-{asked[-1]}." in path.name
