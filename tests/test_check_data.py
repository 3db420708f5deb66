"""check_data.py on damaged data sets, and episodes written to and read from a file."""

import hashlib
import json
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import check_data
from tests.harness import call, succeeded
from util.config import load_config
from util.data import class_index
from util.data.class_index import load_class_index
from util.data.episodes import EpisodeFiles, read_episodes, write_episodes
from util.data.folds import novel_classes
from util.data.published import PUBLISHED, Published
from util.data.synthetic import CLASS_NAMES, generate
from util.engine.build import build_eval_sampler, build_index
from util.errors import UserError

CONFIG = Path("configs/synthetic/efficientnet_lite0_fold0_1shot.yaml")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small data set that stays as it is."""
    root = tmp_path_factory.mktemp("made")
    generate(root, 40, 40, 0)
    return root


@pytest.fixture
def data(made: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A small data set of its own, and the overrides that select it."""
    root = tmp_path / "data"
    shutil.copytree(made, root)
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
    root, overrides = data
    done = succeeded(call(check_data, "--config", CONFIG, *overrides))
    assert "fold 0: ready to train" in done.out
    sha256 = hashlib.sha256((root / "lists/val.txt").read_bytes()).hexdigest()
    assert f"val   {root}/lists/val.txt: unknown; 40 of 40 masks hold 255; SHA-256 {sha256[:16]}\n" in done.out
    lines = {" ".join(line.split()[:2]): line for line in done.out.splitlines()}
    assert lines["0 train"].endswith(", ...") and not lines["0 val"].endswith("..."), "5 of 5 classes are all"


# ---------------------------------------------------------------- which list it is, and its border


@pytest.fixture
def pascal(tmp_path: Path, monkeypatch) -> tuple[Path, list[str]]:
    """Five classes of VOC-like data under the ids of tiny 'published' lists; half of the training masks hold 255."""
    root = tmp_path / "pascal"
    for split, count in (("train", 12), ("val", 12)):
        ids = [f"20{split == 'val':02}_{number:06}" for number in range(count)]
        lines = []
        for number, name in enumerate(ids):
            mask = np.zeros((20, 30), np.uint8)
            mask[3:9, 3:20] = 1 + number % 4
            mask[2] = 255 if split == "val" or number % 4 == 0 else 0
            write(root, name, mask)
            lines.append(f"JPEGImages/{name}.jpg SegmentationClassAug/{name}.png\n")
        (root / f"{split}.txt").write_text("".join(lines))
        digest = hashlib.sha256("".join(f"{name}\n" for name in ids).encode()).hexdigest()
        known = Published(f"the tiny {split}", split, 3 if split == "train" else 12)
        monkeypatch.setitem(PUBLISHED, digest, known)
    changes = [f"data.root={root}", f"data.train_list={root}/train.txt", f"data.val_list={root}/val.txt"]
    return root, [*changes, "data.dataset=PASCAL-5i", "data.classes=[a, b, c, d]", "data.min_area=9"]


def write(root: Path, name: str, mask: np.ndarray) -> None:
    photo = np.full((20, 30, 3), (int(name[2:4]) * 100, int(name[-2:]) * 9, 0), np.uint8)
    for file, values in ((f"JPEGImages/{name}.jpg", photo), (f"SegmentationClassAug/{name}.png", mask)):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(root / file)


def test_published_lists_are_named_whatever_their_order_and_line_ends(pascal, monkeypatch) -> None:
    root, overrides = pascal
    lines = (root / "train.txt").read_text().splitlines()
    (root / "train.txt").write_bytes("\r\n".join(f"/{line}" for line in reversed(lines)).encode())
    code, report = check(monkeypatch, root, overrides)
    assert code == 0 and report["warnings"] == []
    (root / "train.txt").write_text("".join(f"{line}\n" for line in reversed(lines)))
    for split in ("train", "val"):
        about = report["lists"][split]
        assert (about["title"], about["lines"]) == (f"the tiny {split}", 12)
        assert about["masks_with_255"] == (3 if split == "train" else 12)
        assert about["sha256"] == hashlib.sha256((root / f"{split}.txt").read_bytes()).hexdigest()


def test_a_pascal_list_that_no_paper_uses_is_warned_of(pascal, monkeypatch) -> None:
    root, overrides = pascal
    lines = (root / "train.txt").read_text().splitlines(keepends=True)
    (root / "train.txt").write_text("".join(lines[:-1]))
    code, report = check(monkeypatch, root, overrides)
    assert code == 0 and report["lists"]["train"]["title"] == "unknown"
    assert f"list {root}/train.txt is not a train list that papers use (unknown)" in report["warnings"][0]
    (root / "train.txt").write_text("".join(lines))
    swapped = [*overrides, f"data.train_list={root}/val.txt", f"data.val_list={root}/train.txt"]
    _, report = check(monkeypatch, root, swapped)
    assert [re.findall(r"\(the tiny \w+\)", warning) for warning in report["warnings"]] == [
        ["(the tiny val)"],
        ["(the tiny train)"],
    ]


def test_the_border_lost_in_all_but_one_mask_fails_a_published_list(pascal, monkeypatch) -> None:
    root, overrides = pascal
    for path in sorted((root / "SegmentationClassAug").glob("2001_*"))[1:]:
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 255, 0, mask)).save(path)
    code, report = check(monkeypatch, root, overrides)
    assert code == 1
    assert any(
        p.startswith("1 of 12 val masks hold the value 255, of the published ones 12")
        for p in report["problems"]["val"]
    )
    code, report = check(monkeypatch, root, [*overrides, "data.dataset=Mine"])
    assert code == 1, "whatever the data set is called"
    lines = (root / "val.txt").read_text().splitlines(keepends=True)
    (root / "val.txt").write_text("".join(lines[:-1]))
    code, report = check(monkeypatch, root, [*overrides, "data.dataset=Mine"])
    assert code == 0, "an unknown list"
    assert [w for w in report["warnings"] if w.startswith("1 of 11 val masks hold the value 255")]


@pytest.mark.parametrize(("dataset", "code"), [("PASCAL-5i", 1), ("COCO-20i", 1), ("Mine", 0)])
def test_lists_that_share_photos_are_an_error_on_benchmarks_and_a_warning_elsewhere(
    pascal, monkeypatch, dataset, code
) -> None:
    root, overrides = pascal
    with (root / "val.txt").open("a") as file:
        file.write("SegmentationClassAug/../JPEGImages/2000_000003.jpg SegmentationClassAug/2000_000003.png\n")
    found, report = check(monkeypatch, root, [*overrides, f"data.dataset={dataset}"])
    assert found == code
    messages = report["problems"]["val"] if code else report["warnings"]
    assert any(f"1 photos stand in the training and in the validation list ({root}/JPEGImages" in m for m in messages)


def test_the_index_of_a_sound_list_is_left_behind_and_believed(data, monkeypatch) -> None:
    root, overrides = data
    broken = root / "JPEGImages/val_00003.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-2000])
    check(monkeypatch, root, overrides)
    assert [path.name for path in (root / "lists").glob("*.npz")] == ["train.txt.index.npz"], "not of a damaged list"
    broken.write_bytes(whole)
    check(monkeypatch, root, overrides)
    config = load_config(CONFIG, overrides)
    with monkeypatch.context() as patch:
        patch.setattr(class_index, "count_pixels", None)
        kept = [build_index(config, split) for split in ("train", "val")]
    for path in (root / "lists").glob("*.npz"):
        path.unlink()
    for index, split in zip(kept, ("train", "val"), strict=True):
        anew = build_index(config, split)
        np.testing.assert_array_equal(index.pixels.toarray(), anew.pixels.toarray())
        np.testing.assert_array_equal(index.ignored, anew.ignored)


# ---------------------------------------------------------------- pictures that viewers turn


def turn(path: Path, orientation: int) -> None:
    """Store a picture turned, with the EXIF orientation by which it is seen as before."""
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 2: Image.Transpose.FLIP_LEFT_RIGHT}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).transpose(undo[orientation]).save(path, exif=exif)


def test_a_mask_of_the_picture_as_seen_is_refused_with_the_orientation_named(pascal, monkeypatch) -> None:
    root, overrides = pascal
    turn(root / "JPEGImages/2000_000003.jpg", 6)
    code, report = check(monkeypatch, root, overrides)
    (problem,) = report["problems"]["train"]
    assert code == 1 and "2000_000003.jpg is 20x30" in problem and "its EXIF orientation turns the image" in problem
    Image.new("RGB", (20, 30)).save(root / "JPEGImages/2000_000003.jpg")
    _, report = check(monkeypatch, root, overrides)
    assert "EXIF" not in report["problems"]["train"][0]


@pytest.mark.parametrize(("orientation", "square"), [(3, False), (2, False), (6, True)])
def test_a_turned_picture_whose_size_says_nothing_is_hinted_at(pascal, monkeypatch, orientation, square) -> None:
    root, overrides = pascal
    path = root / "JPEGImages/2000_000003.jpg"
    if square:
        write(root, path.stem, np.pad(np.full((20, 20), 1, np.uint8), ((0, 0), (0, 0))))
        Image.new("RGB", (20, 20)).save(path)
    turn(path, orientation)
    code, report = check(monkeypatch, root, overrides)
    assert code == 0
    assert [w for w in report["warnings"] if f"1 images are turned on screen by their EXIF orientation ({path})" in w]


def test_copies_of_a_photo_in_one_list_or_both_are_warned_of(data, monkeypatch) -> None:
    root, overrides = data
    assert check(monkeypatch, root, overrides)[1]["warnings"] == []
    images = root / "JPEGImages"
    for original, copy in (("val_00001", "val_00002"), ("train_00001", "val_00003")):
        for folder, suffix in ((images, "jpg"), (root / "SegmentationClassAug", "png")):
            shutil.copyfile(folder / f"{original}.{suffix}", folder / f"{copy}.{suffix}")
    code, report = check(monkeypatch, root, overrides)
    assert code == 0
    (warning,) = report["warnings"]
    assert warning.startswith("2 photos stand under several names (")
    for names in (("train_00001", "val_00003"), ("val_00001", "val_00002")):
        assert " = ".join(f"{images}/{name}.jpg" for name in names) in warning


# ---------------------------------------------------------------- messages


def rewrite(root: Path, change) -> None:
    """Change every line of the validation list."""
    path = root / "lists/val.txt"
    path.write_text("".join(f"{change(line)}\n" for line in path.read_text().splitlines()))


LIST_MISTAKES = {
    "absolute paths": (lambda root, line: " ".join(f"{root}/{p}" for p in line.split()), "but would with data.root=/"),
    "backslashes": (lambda root, line: line.replace("/", "\\"), "write / in place of"),
    "another case": (lambda root, line: line.replace(".jpg", ".JPG"), r"but there is val_00000\.jpg"),
    "swapped columns": (
        lambda root, line: " ".join(reversed(line.split())),
        "is a JPEG; masks, the second path of a line",
    ),
}


@pytest.mark.parametrize("mistake", LIST_MISTAKES)
def test_the_mistakes_that_lists_have_get_a_hint(data, monkeypatch, mistake) -> None:
    root, overrides = data
    change, hint = LIST_MISTAKES[mistake]
    rewrite(root, lambda line: change(root, line))
    _, report = check(monkeypatch, root, overrides)
    assert len(report["problems"]["val"]) == 40 and all(re.search(hint, p) for p in report["problems"]["val"][:1])
    with pytest.raises(UserError, match=hint):
        build_index(load_config(CONFIG, overrides), "val")
    if mistake == "absolute paths":
        rewritten = [*overrides, "data.root=/"]
        rewrite_train = root / "lists/train.txt"
        lines = rewrite_train.read_text().splitlines()
        rewrite_train.write_text("".join(" ".join(f"{root}/{p}" for p in line.split()) + "\n" for line in lines))
        assert check(monkeypatch, root, rewritten)[0] == 0


def test_a_name_that_another_system_spells_otherwise_gets_a_hint(data) -> None:
    """As archives from macOS have them."""
    root, _ = data
    (root / "JPEGImages/val_00001.jpg").rename(root / unicodedata.normalize("NFD", "JPEGImages/Bär.jpg"))
    (root / "l.txt").write_text(unicodedata.normalize("NFC", "JPEGImages/Bär.jpg SegmentationClassAug/val_00001.png\n"))
    with pytest.raises(UserError, match=r"does not exist, but there is"):
        load_class_index(root / "l.txt", root, 20, progress=False)


def test_paths_that_begin_with_the_root_get_a_hint(data, monkeypatch) -> None:
    root, _ = data
    rewrite(root, lambda line: " ".join(f"data/{p}" for p in line.split()))
    monkeypatch.chdir(root.parent)
    with pytest.raises(UserError, match=r"does not exist, but would with data\.root=\.; .*80 of 80 files are missing"):
        load_class_index(Path("data/lists/val.txt"), Path("data"), 20, progress=False)


def test_all_lines_that_stand_twice_are_named_at_once(data, monkeypatch) -> None:
    root, overrides = data
    lines = (root / "lists/val.txt").read_text()
    (root / "lists/val.txt").write_text(lines + lines)
    with pytest.raises(
        UserError, match=r"line 41: the same as line 1; .*line 45: the same as line 5; and 35 more; .*remove"
    ):
        build_index(load_config(CONFIG, overrides), "val")
    code, report = check(monkeypatch, root, overrides)
    assert code == 1
    assert len(report["problems"]["val"]) == 40
    assert f"list {root}/lists/val.txt line 80: the same as line 40" in report["problems"]["val"]


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
    for shots in (1, 3):
        with pytest.raises(UserError, match=f"2 supports, but data.shots is {shots}"):
            recorded(config, path, shots=shots)


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
        ("query", "JPEGImages/other.jpg", "JPEGImages/other.jpg is no line of"),
        ("supports", ["JPEGImages/val_00001.jpg SegmentationClassAug/val_00001.png"], "1 supports"),
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
