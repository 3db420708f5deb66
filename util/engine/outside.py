"""Methods from outside this repository, in the same evaluation: a Python function, or masks on disk."""

import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.data.class_index import ClassIndex
from util.data.dataset import target_of
from util.data.episodes import EpisodeFiles
from util.data.images import image_size, read_class_ids
from util.engine.evaluation import IMAGE, Method
from util.engine.feature_cache import Key
from util.errors import UserError, first_of

Function = Callable[[list[np.ndarray], list[np.ndarray], np.ndarray], Any]
"""(supports, masks, query) -> mask or probability of the query's size (H, W).

Images are RGB (H, W, 3) uint8, each of its own size; a support's mask is (H, W) uint8: 1 target, 0 other, 255 ignored.
"""


class Entry(NamedTuple):
    """An image as its method keeps it, and its mask of class ids (H, W), uint8."""

    image: Any
    ids: Tensor


class PixelMethod(Method):
    """A method that reads images and masks at their own sizes; subclasses predict.

    Args:
        prepare: an image (H, W, 3) -> the image as it is kept, of about so many ``more_bytes``, on ``device``.
    """

    def __init__(
        self,
        owner: object,
        prepare: Callable[[np.ndarray], Any] = lambda image: image,
        more_bytes: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.owner, self.read = (owner,), _read
        self.prepare, self.more_bytes, self.device = prepare, more_bytes, device

    def keys(self, episode: EpisodeFiles, value: int) -> list[Key]:
        """Return one key for each image."""
        return [(line, IMAGE) for line in (episode.query, *episode.supports)]

    def nbytes(self, key: Key) -> int:
        """Estimate the bytes of an image and mask of 500 x 500, and of what is kept of the image."""
        return 4 * 500**2 + self.more_bytes

    def encode(self, missing: Sequence[Key], samples: Mapping[int, Any], held: Mapping[Key, Any]) -> dict[Key, Any]:
        """Prepare each image."""
        entries: dict[Key, Any] = {}
        for key in missing:
            image, ids = samples[key[0]]
            entries[key] = Entry(self.prepare(image), torch.from_numpy(ids).to(self.device))
        return entries


class FunctionMethod(PixelMethod):
    """A function that segments one query at a time; what it returns is target above 0.5."""

    def __init__(self, function: Function, name: str) -> None:
        super().__init__(name)
        self.function, self.name = function, name

    def predict(
        self, episodes: Sequence[EpisodeFiles], values: Sequence[int], held: Mapping[Key, Any]
    ) -> dict[str, list[Tensor]]:
        """Call the function for each episode."""
        scores = []
        for episode, value in zip(episodes, values, strict=True):
            query, *supports = (held[line, IMAGE] for line in (episode.query, *episode.supports))
            masks = [target_of(support.ids, value).numpy() for support in supports]
            images = [one.image.copy() for one in (query, *supports)]  # a function may write into its arguments
            with torch.inference_mode(False):  # and train on its supports
                result = self.function(images[1:], masks, images[0])
            found = np.asarray(result, np.float32)
            if found.shape != query.ids.shape or not ((found >= 0) & (found <= 1)).all():
                raise UserError(
                    f"{self.name} must return a mask or a probability, {query.ids.shape} in [0, 1] like its query, but"
                    f" returned {found.shape} of {found.min(initial=1):g} to {found.max(initial=0):g}"
                )
            scores.append(torch.from_numpy(found) - 0.5)
        return {"method": scores}


def load_function(name: str) -> Function:
    """Import 'package.module:function', also from the folder in which the command is started."""
    sys.path.append(str(Path.cwd()))
    try:
        function = pkgutil.resolve_name(name)
    except (ValueError, AttributeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and not name.startswith(error.name or ":"):
            raise  # something that the module itself imports
        raise UserError(f"--method {name}: {error}; give package.module:function") from error
    if not callable(function):
        raise UserError(f"--method {name}: this is no function; give package.module:function")
    return function


class FolderMethod(PixelMethod):
    """Predictions on disk: a PNG for each episode, named by its number, of 0 and 1 or of 0 and 255."""

    def __init__(self, folder: Path, index: ClassIndex, episodes: Sequence[EpisodeFiles], square: int) -> None:
        super().__init__(folder)
        # equal episodes may occur twice in a file, so they are told apart by identity
        self.path_of = dict(zip(map(id, episodes), find_predictions(folder, index, episodes, square), strict=True))

    def keys(self, episode: EpisodeFiles, value: int) -> list[Key]:
        """Return the query's key."""
        return [(episode.query, IMAGE)]

    def predict(
        self, episodes: Sequence[EpisodeFiles], values: Sequence[int], held: Mapping[Key, Any]
    ) -> dict[str, list[Tensor]]:
        """Read the mask of each episode."""
        return {"method": [torch.from_numpy(read_prediction(self.path_of[id(e)]) - np.float32(0.5)) for e in episodes]}


def find_predictions(folder: Path, index: ClassIndex, episodes: Sequence[EpisodeFiles], square: int = 0) -> list[Path]:
    """Return the file of each episode, squashed or not; a UserError names the missing, extra and wrong-sized ones."""
    files = sorted(path for path in folder.glob("*") if not path.name.startswith("."))
    found = {int(path.stem): path for path in files if path.suffix == ".png" and path.stem.isdecimal()}
    problems = [f"{folder / f'{n}.png'} is missing" for n in range(len(episodes)) if n not in found]
    expected = [found[n] for n in range(len(episodes)) if n in found]
    extra = set(files).difference(expected)
    problems += [f"{path} is no episode's number" for path in sorted(extra)]
    for n, episode in enumerate(episodes):
        right = (square, square) if square else image_size(index.items[episode.query].image)
        if n in found and (size := image_size(found[n])) != right:
            problems.append(f"{found[n]} is {size[1]}x{size[0]} but its query is {right[1]}x{right[0]}")
    if problems:
        raise UserError(f"{first_of(problems)}; --predictions needs 0.png to {len(episodes) - 1}.png, one an episode")
    return expected


def read_prediction(path: Path) -> np.ndarray:
    """Read a black and white PNG, (H, W) float32 of 0 and 1."""
    values = read_class_ids(path)
    found = set(np.unique(values).tolist())
    if not (found <= {0, 1} or found <= {0, 255}):
        raise UserError(f"prediction {path} holds {sorted(found)[:5]}; a mask holds 0 and 1, or 0 and 255")
    return (values > 0).astype(np.float32)


def _read(image: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the image and a writable copy of its mask."""
    return image, ids.copy()
