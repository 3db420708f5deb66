"""The named protocols on a generated tree, derived again from the masks by code of their own."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.harness import ROOT, process, succeeded
from util.config import Config, load_config
from util.data.episodes import EpisodeFiles, EpisodeSampler
from util.engine.build import build_eval_sampler, build_index, build_train_sampler

FOLD = (1, 2, 3, 4, 5)
"""novel classes"""
RED = """
import numpy as np

def red(supports, masks, query):
    assert {x.shape[:2] for x in [query, *supports, *masks]} == {(400, 400)}
    return query[..., 0] > 128
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 images of 120 x 150: a target of 70 x 60 px, a second one of 70 x 40 or 15 x 40, and a border of 255."""
    root = tmp_path_factory.mktemp("protocols")
    rng = np.random.default_rng(0)
    for n in range(80):
        ids = np.zeros((120, 150), np.uint8)
        ids[5:75, 5:65] = 1 + n % 20
        ids[5 : 75 if n % 3 else 20, 80:120] = 1 + (n * 7 + n // 20) % 20
        image = rng.integers(0, 100, (*ids.shape, 3)) + 100 * ((ids > 0) & (rng.random(ids.shape) < 0.9))[..., None]
        ids[:, 145:] = 255
        Image.fromarray(image.astype(np.uint8)).save(root / f"{n}.png")
        Image.fromarray(ids).save(root / f"{n}_mask.png")
    (root / "list.txt").write_text("".join(f"{n}.png {n}_mask.png\n" for n in range(80)))
    return root


def given(tree: Path, protocol: str) -> tuple[list[Path], list[str]]:
    files = [ROOT / "configs/pascal/resnet50_fold0_1shot.yaml", ROOT / f"configs/protocol/{protocol}.yaml"]
    return files, [f"data.root={tree}", *(f"data.{name}_list={tree}/list.txt" for name in ("train", "val"))]


def config_of(tree: Path, protocol: str) -> Config:
    return load_config(*given(tree, protocol))


def areas(tree: Path) -> list[Counter[int]]:
    """Pixels of each class in each image, by eye of numpy."""
    return [Counter(np.array(Image.open(tree / f"{n}_mask.png")).ravel().tolist()) for n in range(80)]


def drawn(sampler: EpisodeSampler, passes: int = 1) -> list[EpisodeFiles]:
    return [sampler(number) for number in range(passes * len(sampler))]


@pytest.mark.parametrize("protocol", ["pfenet", "bam", "hsnet", "hsnet_coco"])
def test_queries_and_supports_are_those_of_the_protocol(tree: Path, protocol: str) -> None:
    config, pixels = config_of(tree, protocol), areas(tree)
    least = 1 if protocol == "hsnet_coco" else 2048
    shows = {c: [n for n in range(80) if pixels[n][c] >= least] for c in FOLD}
    sampler = build_eval_sampler(config, build_index(config, "val"), 0)
    episodes = drawn(sampler, passes=30)
    turns = Counter((e.query, e.class_id) for e in drawn(sampler))
    if protocol == "hsnet":
        assert turns == Counter((n, c) for c in FOLD for n in shows[c])
    elif protocol == "hsnet_coco":
        assert Counter(c for _, c in turns) == Counter(FOLD)
        assert {(e.query, e.class_id) for e in episodes} <= {(n, c) for c in FOLD for n in shows[c]}
    else:
        assert Counter(n for n, _ in turns) == Counter({n for c in FOLD for n in shows[c]})
        present = {(n, c) for n in {n for c in FOLD for n in shows[c]} for c in FOLD if pixels[n][c]}
        assert {(e.query, e.class_id) for e in episodes} == present
        assert any(pixels[n][c] < 2048 for n, c in present), "a small target is asked for beside a large one"
    assert all(e.supports[0] in shows[e.class_id] and e.supports[0] != e.query for e in episodes)


def test_bam_drops_training_images_with_novel_classes_and_the_others_keep_them(tree: Path) -> None:
    pixels = areas(tree)
    large = {n for n in range(80) if any(pixels[n][c] >= 2048 for c in range(6, 21))}
    clean = {n for n in large if not any(pixels[n][c] for c in FOLD)}
    assert clean < large
    for protocol, expected in (("pfenet", large), ("hsnet", large), ("bam", clean)):
        config = config_of(tree, protocol)
        episodes = drawn(build_train_sampler(config, build_index(config, "train")))
        assert {e.query for e in episodes} == expected
        assert {n for e in episodes for n in e.supports} <= expected


def test_hsnet_compares_at_400_pixels_and_results_carry_the_name(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "red.py").write_text(RED)
    files, overrides = given(tree, "hsnet")
    written, out = tmp_path / "e.jsonl", tmp_path / "r.json"
    options = ["--method", "red:red", "--episodes", 9, "--write-episodes", written, "--out", out, "workers=0"]
    command = [ROOT / "test.py", "--config", *files, *options, *overrides]
    assert "1-shot, red:red, protocol hsnet: 9 episodes" in succeeded(process(*command, cwd=tmp_path)).out
    results = json.loads(out.read_text())
    for line, row in zip(written.read_text().splitlines(), results["counts"]["method"], strict=True):
        episode = json.loads(line)
        image, mask = (Image.open(tree / name) for name in episode["query"].split())
        predicted = np.array(image.resize((400, 400), 2))[..., 0] > 128  # as torchvision resizes Pillow's images
        ids = F.interpolate(torch.from_numpy(np.array(mask))[None, None], (400, 400), mode="nearest")[0, 0].numpy()
        truth, valid = ids == episode["class_id"], ids != 255
        expected = [(p & t & valid).sum() for t in (~truth, truth) for p in (~predicted, predicted)]
        assert [int(count) for count in row.split()] == expected and expected[3] > 1000
    succeeded(process(*command, "data.min_area=1", cwd=tmp_path))
    assert (results["protocol"], json.loads(out.read_text())["protocol"]) == ("hsnet", None)
