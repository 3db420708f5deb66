"""Which part of the tree may import which."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("train.py", "test.py", "predict.py", "demo.py", "hubconf.py")
SHARED = ("util.config", "util.errors", "util.files", "util.progress", "util.command")
MAY_IMPORT = {  # a part of the tree: modules of other parts that it may import
    "model": (),
    "util/config.py": ("model.backbones", "util.errors", "util.files"),
    "util/data": ("model.IGNORE", "model.ops", *SHARED),
    "util/engine": ("model", "util.data", *SHARED),
    "util/photos": ("model", "util.data", "util.engine", *SHARED),
    "scripts/report.py": (
        "model.backbones",
        "util.engine.metrics",
        "util.command",
        "util.config",
        "util.errors",
        "util.files",
    ),
}
ONLY_IN = {  # a name or module: the files and folders that may import it
    "build_ntrenet": ("util/engine/build.py",),
    "build_backbone": ("model/training_free.py", "util/engine/build.py"),
    "util.photos": ("util/photos/", "predict.py", "demo.py", "hubconf.py", "test.py"),
    "model.training_free": ("model/ntrenet.py", "util/photos/", "test.py"),
}


def imports(path: Path) -> Iterator[str]:
    """The project's names that a file imports: 'util.config.Config' ..."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.startswith(("model.", "util.", "scripts.", "tests.")))


def files(*parts: str) -> list[Path]:
    paths = [ROOT / part for part in parts]
    return [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))]


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_each_part_imports_only_the_parts_below_it(part: str) -> None:
    allowed = part.removesuffix(".py").replace("/", "."), *MAY_IMPORT[part]
    named = [(path.name, name) for path in files(part) for name in imports(path)]
    assert named
    assert [(path, name) for path, name in named if not any(within(name, module) for module in allowed)] == []


@pytest.mark.parametrize("name", ONLY_IN)
def test_a_name_is_imported_only_in_its_files(name: str) -> None:
    for path in files("model", "util", *COMMANDS):
        place = path.relative_to(ROOT).as_posix()
        if any(within(found, name) or found.endswith(f".{name}") for found in imports(path)):
            assert place.startswith(ONLY_IN[name]), f"{place} imports {name}"
