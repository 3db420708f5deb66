"""No source runs what it reads: calls that would are sought in every source, and found in small ones made for that."""

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from model.weights import torchvision_file
from scripts import prepare_pascal
from scripts.prepare_coco import read_jobs
from util.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MAY_FETCH = ("util/data/download.py", "model/weights.py")
"""the sources that open addresses: each compares a hash with what came"""

FORBIDDEN = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "runs text",
    "__import__": "runs what a name says",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
    "pickle.load": "runs code in the file",
    "pickle.loads": "runs code in the file",
    "pickle.Unpickler": "runs code in the file",
    "marshal.loads": "trusts its input",
    "shelve.open": "runs code in the file",
    "joblib.load": "runs code in the file",
    "pandas.read_pickle": "runs code in the file",
    "torch.hub.load": "runs code from the web",
    "yaml.unsafe_load": "runs code in the file",
    "yaml.full_load": "makes objects",
    "tempfile.mktemp": "lets another take the name",
    "shutil.unpack_archive": "unpacks to the members' names",
}
FETCHES = (
    "urllib.request.",
    "requests.",
    "httpx.",
    "torch.hub.download_url_to_file",
    "torch.hub.load_state_dict_from_url",
)
SHELL = re.compile(r"\beval\b|\b(curl|wget)\b[^|\n]*\|\s*(ba|z)?sh\b|\bchmod\s+(-R\s+)?777\b|--trusted-host|--insecure")
SAFE_LOADERS = ("SafeLoader", "CSafeLoader")


def unsafe_calls(source: str, place: str) -> list[str]:
    """'line N: what, why' of every call in a Python source that could run, or fetch, what an input says."""
    tree = ast.parse(source)
    names = imported(tree)
    safe = (*SAFE_LOADERS, *safe_loaders(tree, names))
    return [f"{place} line {call.lineno}: {why}" for call, why in findings(tree, names, safe, place)]


def findings(tree: ast.AST, names: dict[str, str], safe: tuple[str, ...], place: str) -> Iterator[tuple[ast.Call, str]]:
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = full_name(call.func, names)
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in FORBIDDEN:
            yield call, f"{name} {FORBIDDEN[name]}"
        if "shell" in given and not is_constant(given["shell"], False):
            yield call, f"{name} with shell=True runs a shell"
        if name == "torch.load" and not is_constant(given.get("weights_only"), True):
            yield call, "torch.load without weights_only=True runs code in the file"
        if name in ("yaml.load", "yaml.load_all"):
            loader = given.get("Loader", call.args[1] if len(call.args) > 1 else None)
            if loader is None or full_name(loader, names).removeprefix("yaml.") not in safe:
                yield call, f"{name} without a safe loader makes objects"
        if "allow_pickle" in given and not is_constant(given["allow_pickle"], False):
            yield call, f"{name} with allow_pickle runs code in the file"
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if method in ("extractall", "extract") and not is_constant(given.get("filter"), "data"):
            yield call, f"{method} without filter='data' unpacks to the members' names"
        if name.startswith(FETCHES) and name != "urllib.request.Request" and place not in MAY_FETCH:
            yield call, f"{name} fetches; that is for {' and '.join(MAY_FETCH)}"


def imported(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: {'np': 'numpy', 'load': 'torch.load'}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """'torch.load' of that expression, by whatever name it was imported; '' where it is no name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = full_name(node.value, names)
        return f"{before}.{node.attr}" if before else ""
    return ""


def safe_loaders(tree: ast.AST, names: dict[str, str]) -> list[str]:
    """Classes of this source that are made from a safe loader."""
    return [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(full_name(base, names).removeprefix("yaml.") in SAFE_LOADERS for base in node.bases)
    ]


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and (type(node.value), node.value) == (type(value), value)


def unsafe_shell(text: str, place: str) -> list[str]:
    """Likewise of a shell script: text that is run as code, or that comes from the web straight into a shell."""
    lines = enumerate(text.splitlines(), 1)
    code = ((number, line.partition(" #")[0]) for number, line in lines if not line.lstrip().startswith("#"))
    return [f"{place} line {number}: {line.strip()}" for number, line in code if SHELL.search(line)]


def sources(pattern: str) -> list[str]:
    """Of the repository, those not yet added included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def test_no_source_makes_an_unsafe_call() -> None:
    places = [place for place in sources("*.py") if not place.startswith("tests/")]
    assert {"train.py", "util/engine/checkpoint.py", "model/weights.py", "scripts/prepare_pascal.py"} <= set(places)
    assert [f for place in places for f in unsafe_calls((ROOT / place).read_text(encoding="utf-8"), place)] == []


TRAPS = re.compile(r"(pickle\.loads|torch\.load without weights_only|torch\.hub\.load |test_demo\.py .*urlopen)")
"""what tests do to show that a trap is a working one, that the hub's entry works, or whom the demo's page refuses"""


def test_no_test_makes_an_unsafe_call_but_to_spring_its_own_trap() -> None:
    places = [place for place in sources("*.py") if place.startswith("tests/")]
    found = [f for place in places for f in unsafe_calls((ROOT / place).read_text(encoding="utf-8"), place)]
    assert [finding for finding in found if not TRAPS.search(finding)] == []


def test_no_shell_script_runs_what_it_reads_or_fetches() -> None:
    places = sources("*.sh")
    assert "scripts/quickstart.sh" in places
    assert [f for place in places for f in unsafe_shell((ROOT / place).read_text(encoding="utf-8"), place)] == []


UNSAFE = [
    "eval(text)",
    "exec(text)",
    "compile(text, '', 'exec')",
    "__import__(name)",
    "import os; os.system('ls')",
    "from os import system as run; run('ls')",
    "import os; os.popen('ls')",
    "import subprocess; subprocess.run('ls', shell=True)",
    "import subprocess as s; s.Popen('ls', shell=flag)",
    "from subprocess import check_output; check_output('ls', shell=True)",
    "import pickle; pickle.load(file)",
    "import pickle as p; p.loads(data)",
    "from pickle import loads; loads(data)",
    "import torch; torch.load(path)",
    "import torch; torch.load(path, weights_only=False)",
    "import torch; torch.load(path, weights_only=flag)",
    "from torch import load; load(path, map_location='cpu')",
    "import yaml; yaml.load(text)",
    "import yaml; yaml.load(text, yaml.Loader)",
    "import yaml; yaml.load(text, Loader=yaml.FullLoader)",
    "import yaml; yaml.unsafe_load(text)",
    "import yaml\nclass Mine(yaml.Loader): pass\nyaml.load(text, Mine)",
    "import tarfile; tarfile.open(path).extractall(folder)",
    "import tarfile; tarfile.open(path).extractall(folder, filter='fully_trusted')",
    "import tarfile; tarfile.open(path).extract('a', folder)",
    "import zipfile; zipfile.ZipFile(path).extractall(folder)",
    "import shutil; shutil.unpack_archive(path)",
    "import tempfile; tempfile.mktemp()",
    "import numpy as np; np.load(path, allow_pickle=True)",
    "from numpy import load; load(path, allow_pickle=flag)",
    "import urllib.request; urllib.request.urlopen(url)",
    "from urllib.request import urlretrieve; urlretrieve(url)",
    "import requests; requests.get(url)",
    "import torch; torch.hub.load_state_dict_from_url(url)",
    "def inside():\n    return [eval(x) for x in y]",
]
SAFE = [
    "model.eval()",
    "import re; re.compile('a')",
    "import os; os.path.join('a')",
    "import subprocess; subprocess.run(['ls'], shell=False)",
    "import pickle; pickle.dumps(1)",
    "import torch; torch.load(path, map_location='cpu', weights_only=True)",
    "import yaml; yaml.safe_load(text)",
    "import yaml; yaml.load(text, yaml.SafeLoader)",
    "import yaml\nclass Mine(yaml.SafeLoader): pass\nyaml.load(text, Mine)",
    "import tarfile; tarfile.open(path).extractall(folder, filter='data')",
    "import tarfile; tarfile.open(path).extractfile(member)",
    "import tempfile; tempfile.mkdtemp()",
    "import numpy as np; np.load(path, allow_pickle=False)",
    "import json; json.loads(text)",
    "'eval(text)'",
]


@pytest.mark.parametrize("source", UNSAFE)
def test_an_unsafe_call_is_found(source: str) -> None:
    assert len(unsafe_calls(source, "somewhere.py")) == 1


@pytest.mark.parametrize("source", SAFE)
def test_a_safe_call_is_not_taken_for_an_unsafe_one(source: str) -> None:
    assert unsafe_calls(source, "somewhere.py") == []


def test_only_the_sources_that_check_hashes_may_fetch() -> None:
    source = "import urllib.request; urllib.request.urlopen(url)"
    assert all(unsafe_calls(source, place) == [] for place in MAY_FETCH)


@pytest.mark.parametrize("line", ['eval "$x"', "curl -s https://a.b | sh", "wget -O- a.b | bash", "chmod -R 777 ."])
def test_an_unsafe_shell_line_is_found(line: str) -> None:
    assert unsafe_shell(f"set -e\n{line}\n", "a.sh") == [f"a.sh line 2: {line}"]


@pytest.mark.parametrize(
    "line", ["# eval it", "python test.py  # evaluate", "curl -O https://a.b/c", 'echo "evaluation"']
)
def test_a_safe_shell_line_is_not_taken_for_an_unsafe_one(line: str) -> None:
    assert unsafe_shell(line, "a.sh") == []


# What is unpacked and fetched; tests/test_prepare_pascal.py has archives with '../', absolute names and links, and
# downloads with another checksum


@pytest.mark.parametrize(
    "name",
    [
        "../evil.jpg",
        "/evil.jpg",
        "a/../../evil.jpg",
        "..",
        "",
        "evil.png",
        "a\\..\\evil.jpg",
        "a\0.jpg",
        "a\n.jpg",
        3,
        None,
    ],
)
def test_annotations_cannot_name_a_file_elsewhere(name: object, tmp_path: Path) -> None:
    names = yaml.safe_load((ROOT / "configs/base/coco.yaml").read_text(encoding="utf-8"))["data"]["classes"]
    good = {"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "height": 4, "width": 5}
    shown = {"id": 7, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [[0, 0, 3, 0, 3, 3]]}
    data = {"categories": [{"id": n, "name": c} for n, c in enumerate(names, 1)], "annotations": [shown]}
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({**data, "images": [good]}))
    assert [job.mask for job in read_jobs(path)] == ["COCO_train2014_000000000001.png"]
    path.write_text(json.dumps({**data, "images": [good | {"file_name": name}]}))
    with pytest.raises(UserError, match=r"instances\.json is damaged"):
        read_jobs(path)


@pytest.mark.parametrize("change", [{"height": 1.5}, {"width": True}, {"height": "4"}, {"width": None}])
def test_annotations_of_an_image_without_a_whole_size_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    names = yaml.safe_load((ROOT / "configs/base/coco.yaml").read_text(encoding="utf-8"))["data"]["classes"]
    image = {"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "height": 4, "width": 5} | change
    categories = [{"id": n, "name": c} for n, c in enumerate(names, 1)]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"categories": categories, "annotations": [], "images": [image]}))
    with pytest.raises(UserError, match=r"instances\.json is damaged"):
        read_jobs(path)


def test_weights_by_name_are_fetched_with_a_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path, hash_prefix=None: asked.append(hash_prefix)
    )
    for backbone in ("resnet50", "resnet101", "vgg16_bn"):
        path = torchvision_file(backbone, tmp_path)
        assert path.parent == tmp_path and asked[-1] is not None and f"-{asked[-1]}." in path.name
    assert len(asked) == 3


def test_every_download_of_the_prepare_scripts_has_a_hash() -> None:
    for name, *urls, md5 in prepare_pascal.DOWNLOADS.values():
        assert Path(name).name == name and urls and re.fullmatch("[0-9a-f]{32}", md5)
