"""check_data.py on damaged data sets, and episodes written to and read from a file."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import check_data
from util.build import build_eval_sampler, build_index
from util.config import load_config
from util.episodes import EpisodeFiles, read_episodes, write_episodes
from util.errors import UserError
from util.folds import novel_classes
from util.synthetic import CLASS_NAMES, generate

CONFIG = Path("configs/synthetic/efficientnet_lite0_fold0_1shot.yaml")


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, list[str]]:
    """A small data set of its own, and the overrides that select it."""
    root = tmp_path / "data"
    generate(root, 40, 40, 0)
    return root, [f"data.root={root}", f"data.train_list={root}/lists/train.txt", f"data.val_list={root}/lists/val.txt"]


def check(monkeypatch: pytest.MonkeyPatch, root: Path, overrides: list[str]) -> tuple[int, dict]:
    """Exit code and JSON report of check_data.py."""
    out = root / "report.json"
    monkeypatch.setattr(sys, "argv", ["check_data.py", "--config", str(CONFIG), "--json", str(out), *overrides])
    with pytest.raises(SystemExit) as stop:
        check_data.main()
    return int(stop.value.code or 0), json.loads(out.read_text())


def test_a_good_set_is_ready_and_its_counts_are_right(data, monkeypatch) -> None:
    root, overrides = data
    code, report = check(monkeypatch, root, overrides)
    assert code == 0
    masks = [np.array(Image.open(p)) for p in sorted((root / "SegmentationClassAug").glob("val_*.png"))]
    for fold in report["folds"]:
        novel = range(5 * fold["fold"] + 1, 5 * fold["fold"] + 6)
        images = {CLASS_NAMES[c - 1]: sum(int((m == c).sum()) >= 1024 for m in masks) for c in novel}
        split = fold["splits"]["val"]
        assert split["images_per_class"] == images
        assert split["lines"] == 40
        assert split["qualifying_images"] == sum(any((m == c).sum() >= 1024 for c in novel) for m in masks)
        ignored = sum(int((m == 255).sum()) for m in masks) / sum(m.size for m in masks)
        assert split["ignored_share"] == pytest.approx(ignored)
        assert split["problems"] == []


def rgb_mask(root: Path) -> Path:
    path = root / "SegmentationClassAug/train_00003.png"
    Image.open(path).convert("RGB").save(path)
    return path


def truncated_image(root: Path) -> Path:
    path = root / "JPEGImages/val_00003.jpg"
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def other_size(root: Path) -> Path:
    path = root / "JPEGImages/train_00007.jpg"
    Image.open(path).resize((50, 60)).save(path)
    return path


def foreign_value(root: Path) -> Path:
    path = root / "SegmentationClassAug/val_00001.png"
    mask = np.array(Image.open(path))
    mask[0, 0] = 77
    Image.fromarray(mask).save(path)
    return path


@pytest.mark.parametrize("damage", [rgb_mask, truncated_image, other_size, foreign_value])
def test_a_damaged_file_is_named_and_fails_the_check(data, monkeypatch, damage) -> None:
    root, overrides = data
    path = damage(root)
    code, report = check(monkeypatch, root, overrides)
    assert code == 1
    split = "train" if "train" in path.name else "val"
    assert [str(path) in problem for problem in report["problems"][split]] == [True]


def test_every_damaged_file_is_found_in_one_go(data, monkeypatch) -> None:
    root, overrides = data
    paths = [rgb_mask(root), other_size(root)]
    _, report = check(monkeypatch, root, overrides)
    assert all(any(str(path) in problem for problem in report["problems"]["train"]) for path in paths)


def test_greyscale_and_palette_masks_count_the_same(data, monkeypatch) -> None:
    root, overrides = data
    _, before = check(monkeypatch, root, overrides)
    for path in (root / "SegmentationClassAug").glob("*.png"):
        Image.fromarray(np.array(Image.open(path))).save(path)
    _, after = check(monkeypatch, root, overrides)
    assert before == after


def test_a_class_that_cannot_give_an_episode_fails_the_check(data, monkeypatch) -> None:
    root, overrides = data
    code, report = check(monkeypatch, root, [*overrides, "data.shots=30"])
    assert code == 1
    assert any("striped_star" in p and "31" in p for p in report["folds"][0]["splits"]["val"]["problems"])


def test_a_lost_border_is_warned_of(data, monkeypatch) -> None:
    root, overrides = data
    for path in (root / "SegmentationClassAug").glob("val_*.png"):
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 255, 0, mask).astype(np.uint8)).save(path)
    code, report = check(monkeypatch, root, overrides)
    assert code == 0
    assert len(report["warnings"]) == 1 and "val" in report["warnings"][0]


def test_the_command_line_prints_a_table(data) -> None:
    _, overrides = data
    command = [sys.executable, "scripts/check_data.py", "--config", str(CONFIG), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "fold 0: ready to train" in done.stdout


@pytest.fixture
def sampler(data):
    config = load_config(CONFIG, [*data[1], "data.shots=2"])
    return config, build_eval_sampler(config, build_index(config, "val"), 3)


def recorded(config, path: Path, **changes) -> list[EpisodeFiles]:
    index = build_index(config, "val")
    options = {"classes": novel_classes(config.data), "shots": config.data.shots} | changes
    return read_episodes(path, index, root=Path(config.data.root), **options)


def test_episodes_come_back_from_a_file_as_they_were(sampler, tmp_path) -> None:
    config, episodes = sampler
    path = tmp_path / "e.jsonl"
    write_episodes(path, episodes, 25, root=Path(config.data.root), class_names=config.data.classes)
    back = recorded(config, path)
    assert back == [episodes(n) for n in range(25)]


def test_episodes_of_a_photo_with_several_masks_come_back_too(data, tmp_path) -> None:
    """78 of 1000 episodes of such a list once had the query as their support, and the file was then refused."""
    root, overrides = data
    lines = []
    for name in sorted(path.stem for path in (root / "SegmentationClassAug").glob("val_*.png")):
        mask = np.array(Image.open(root / f"SegmentationClassAug/{name}.png"))
        for c in np.setdiff1d(mask, [0, 255]).tolist():
            own = f"SegmentationClassAug/{name}_{c}.png"
            Image.fromarray(np.where(np.isin(mask, [c, 255]), mask, 0)).save(root / own)
            lines.append(f"JPEGImages/{name}.jpg {own}\n")
    (root / "lists/val.txt").write_text("".join(lines))
    config = load_config(CONFIG, overrides)
    episodes = build_eval_sampler(config, build_index(config, "val"), 0)
    path = tmp_path / "e.jsonl"
    write_episodes(path, episodes, 1000, root=Path(config.data.root), class_names=config.data.classes)
    assert recorded(config, path) == [episodes(n) for n in range(1000)]
    written = [json.loads(line) for line in path.read_text().splitlines()]
    for episode in written[:50]:
        for line_ in (episode["query"], *episode["supports"]):
            assert episode["class_id"] in np.unique(Image.open(root / line_.split()[1]))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("list_sha256", "0" * 64, "made for a list"),
        ("query", "JPEGImages/other.jpg", "JPEGImages/other.jpg is no line of"),
        ("supports", ["JPEGImages/val_00001.jpg SegmentationClassAug/val_00001.png"], "1 supports"),
        ("class_id", 20, "not novel"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_at_its_first_mismatch(sampler, tmp_path, key, value, words) -> None:
    config, episodes = sampler
    path = tmp_path / "e.jsonl"
    write_episodes(path, episodes, 5, root=Path(config.data.root), class_names=config.data.classes)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3][key] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=f"line 4: .*{words}"):
        recorded(config, path)


def line(**changes: object) -> str:
    record = {"query": "a", "supports": ["b"], "class_id": 1, "list_sha256": "c"} | changes
    return json.dumps(record) + "\n"


@pytest.mark.parametrize(
    "text",
    ["", "not json\n", "[1, 2]\n", '{"query": "a"}\n', line(supports=None), line(query=["a"]), line(class_id=True)],
)
def test_a_file_that_holds_no_episodes_is_refused(sampler, tmp_path, text) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"e\.jsonl"):
        recorded(sampler[0], path)
