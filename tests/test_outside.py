"""test.py as a referee of methods that are not ours: a function, and a folder of PNGs; against counts by hand."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.harness import NOVEL, ROOT, call, process, refused, sha256, succeeded, test_command

WEAK = """
import numpy as np

def bright(supports, masks, query):
    colours = [image[mask == 1].mean(0) for image, mask in zip(supports, masks) if (mask == 1).any()]
    assert all(image.shape[:2] == mask.shape for image, mask in zip(supports, masks))
    return np.exp(-np.abs(query - np.mean(colours, 0)).mean(-1) / 40)

def careless(supports, masks, query):
    found = bright(supports, masks, query)
    for image in (query, *supports):
        image[:] = 0
    return found

def flat(supports, masks, query):
    return np.zeros(3)
"""


def predicted(root: Path, episode: dict[str, Any]) -> np.ndarray:
    """The function ``bright`` of WEAK, by hand from the files."""
    colours = []
    for image, mask in map(str.split, episode["supports"]):
        on = np.array(Image.open(root / mask)) == episode["class_id"]
        colours.append(np.array(Image.open(root / image).convert("RGB"))[on].mean(0))
    query = np.array(Image.open(root / episode["query"].split()[0]).convert("RGB"))
    return np.exp(-np.abs(query - np.mean(colours, 0)).mean(-1) / 40) > 0.5


def scores(root: Path, episodes: list[dict[str, Any]], masks: list[np.ndarray]) -> dict[str, float]:
    """IoU of each class in percent."""
    sums = {name: np.zeros(2) for name in NOVEL}
    for episode, mask in zip(episodes, masks, strict=True):
        truth = np.array(Image.open(root / episode["query"].split()[1]))
        target, valid = truth == episode["class_id"], truth != 255
        sums[episode["class"]] += (mask & target).sum(), ((mask | target) & valid).sum()
    return {name: 100 * both / either if either else 0.0 for name, (both, either) in sums.items()}


def test_a_function_and_its_masks_on_disk_score_as_by_hand(config: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "weak.py").write_text(WEAK)
    written = tmp_path / "episodes.jsonl"
    command = ["--config", config, "--out", tmp_path / "r.json", "data.shots=2"]
    chosen = ["--method", "weak:bright", "--episodes", 12, "--write-episodes", written]
    done = succeeded(process(ROOT / "test.py", *command, *chosen, cwd=tmp_path))  # found in the folder of the command
    results = json.loads((tmp_path / "r.json").read_text())
    assert "Synthetic-5i fold 0 of 4, 2-shot, weak:bright: 12 episodes" in done.out
    assert (results["method"], results["checkpoint"], "baselines" in results) == ("weak:bright", None, False)
    episodes = [json.loads(line) for line in written.read_text().splitlines()]
    masks = [predicted(tiny, episode) for episode in episodes]
    by_hand = scores(tiny, episodes, masks)
    assert max(by_hand.values()) > 5
    assert results["per_class"] == pytest.approx(by_hand, abs=0.01)
    assert results["miou"]["mean"] == pytest.approx(np.mean(list(by_hand.values())), abs=0.01)

    rows = [list(map(int, row.split())) for row in results["counts"]["method"]]
    truths = [np.array(Image.open(tiny / e["query"].split()[1])) == e["class_id"] for e in episodes]
    assert [row[3] for row in rows] == [(mask & truth).sum() for mask, truth in zip(masks, truths, strict=True)]
    assert results["episode_classes"] == [e["class"] for e in episodes]
    assert results["episodes_sha256"] == sha256(written)

    for workers in (0, 1):  # what it writes into its images changes no other episode
        careless = ["--method", "weak:careless", "--episodes", 12, f"workers={workers}"]
        succeeded(process(ROOT / "test.py", *command, *careless, cwd=tmp_path))
        assert json.loads((tmp_path / "r.json").read_text())["counts"] == results["counts"]

    folder = tmp_path / "masks"
    folder.mkdir()
    for n, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * (255 if n % 2 else 1)).save(folder / f"{n:02}.png")
    from_disk = [*command, "--episodes-from", written, "--predictions", folder]
    succeeded(call(test_command, *from_disk))
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["per_class"] == pytest.approx(by_hand, abs=0.01)
    assert (again["counts"], again["episodes_sha256"]) == (results["counts"], results["episodes_sha256"])

    Image.new("L", (9, 9)).save(folder / "03.png")
    (folder / "05.png").rename(folder / "12.png")
    (folder / "notes.txt").write_text("")
    line = refused(
        call(test_command, *from_disk), "5.png is missing", "03.png is 9x9 but its query is", "0.png to 11.png"
    )
    assert all(f"{folder / name} is no episode" in line for name in ("12.png", "notes.txt"))
    (folder / "12.png").rename(folder / "05.png")
    (folder / "notes.txt").unlink()
    Image.fromarray(np.full(masks[3].shape, 7, np.uint8)).save(folder / "03.png")
    refused(call(test_command, *from_disk), "03.png holds [7]", "0 and 255")


def test_the_prior_mask_of_the_readme_is_close_to_the_baseline(config: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "scripts/README.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "prior.py").write_text(block)
    out = tmp_path / "r.json"
    options = ["--method", "prior:segment", "--baselines", "--episodes", 20, "--out", out, "data.image_size=129"]
    succeeded(process(ROOT / "test.py", "--config", config, *options, cwd=tmp_path))
    results = json.loads(out.read_text())
    baseline = results["baselines"]["prior"]["miou"]["mean"]
    assert baseline > 20 and results["miou"]["mean"] == pytest.approx(baseline, abs=3)  # squashed, not fitted
    assert set(results["baselines"]) == {"all_foreground", "prior", "training_free", "training_free_edges"}


def test_what_is_no_method_is_refused(
    config: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weak_too.py").write_text(WEAK)
    command = ["--config", config, "eval.episodes=2"]
    for given, pieces in (
        (["--method", "weak_too:flat"], ["weak_too:flat must return", "returned (3,)"]),
        (["--method", "weak_too:none"], ["weak_too:none", "package.module:function"]),
        (["--method", "nowhere:f"], ["nowhere:f", "No module named 'nowhere'"]),
        (["--method", "weak_too:np"], ["is no function"]),
        (["--method", "weak_too:flat", "--checkpoint", short / "best.pt"], ["one of --checkpoint, --method"]),
        (["--predictions", tmp_path], ["--episodes-from"]),
    ):
        refused(call(test_command, *command, *given), *pieces)
