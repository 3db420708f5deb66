"""The rules of the house: which part of the tree may import which."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {  # a part of the tree: what it may import of the others
    "model": (),
    "util/config.py": ("model.backbones", "util.errors", "util.files"),
    "util/data": ("model.IGNORE", "model.ops", "util.config", "util.errors", "util.files", "util.progress"),
    "util/engine": ("model", "util.config", "util.errors", "util.files", "util.progress", "util.data"),
    "util/segment": ("model", "util.config", "util.errors", "util.files", "util.progress", "util.data", "util.engine"),
    "util/report": ("model.backbones", "util.config", "util.errors", "util.files", "util.progress"),
}
BUILT_IN = {  # what builds the network and its loss: who calls it
    "build_ntrenet": ("model/ntrenet.py", "util/engine/build.py"),
    "build_backbone": ("model/backbone.py", "model/training_free.py", "util/engine/build.py"),
}


def imports(path: Path) -> Iterator[str]:
    """The project's modules, and what is imported from them, that a file names: 'util.config.Config' ..."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith(("model.", "util.", "scripts.", "tests.")))


def files(part: str) -> list[Path]:
    path = ROOT / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def test_each_part_imports_only_what_lies_below_it() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for part, others in MAY_IMPORT.items()
        for path in files(part)
        for name in imports(path)
        if not any(within(name, module) for module in (part.removesuffix(".py").replace("/", "."), *others))
    ]
    assert wrong == []


def test_the_network_is_built_in_one_place() -> None:
    for path in (path for part in ("model", "util", "train.py", "test.py", "predict.py") for path in files(part)):
        place = path.relative_to(ROOT).as_posix()
        for name in imports(path):
            builder = name.rpartition(".")[2]
            assert place in BUILT_IN.get(builder, (place,)), f"{place} imports {builder}"
