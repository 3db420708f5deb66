"""scripts/prepare_pascal.py on tiny trees in the official layouts, and util/data/download.py against a local server."""

import hashlib
import http.server
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io  # type: ignore[import-untyped]
from PIL import Image

from scripts import prepare_pascal
from util.data.class_index import read_list
from util.data.download import download
from util.data.published import LISTS, PUBLISHED, Published
from util.errors import UserError

A, B, C, D, E, F, G, H = (f"20{year:02}_00{year:04}" for year in range(1, 9))
VOC_TRAIN, VOC_VAL = {A, B}, {C, D}
SBD_TRAIN, SBD_VAL = {B, E, F, G}, {C, H}
TRAIN, AUG = {A, B, F, G, H}, {A, B, E, F, G, H}
VOC, SBD = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"
SBD_IMAGE = G
"""the image that VOC's JPEGImages lack"""
ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., Path]


def palette() -> list[int]:
    """VOC's colour map: bit b of an id is bit 7 - b // 3 of the colour b % 3."""
    colours = np.zeros((256, 3), int)
    for i in range(256):
        for b in range(8):
            colours[i, b % 3] += (i >> b & 1) << (7 - b // 3)
    return colours.ravel().tolist()


def sha256(ids: set[str]) -> str:
    return hashlib.sha256(("\n".join(sorted(ids)) + "\n").encode()).hexdigest()


def mask_of(name: str, seed: int) -> np.ndarray:
    mask = np.random.default_rng([int(name[-4:]), seed]).integers(0, 21, (12, 17), dtype=np.uint8)
    if seed == 0:
        mask[2:4] = 255  # VOC's border; SBD has none
    return mask


def write_jpeg(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 17, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with VOCdevkit, benchmark_RELEASE, and an archive of each; the published lists are the tiny trees'."""
    voc, sbd = tmp_path / VOC, tmp_path / SBD
    for seed, name in enumerate((A, B, C, D, E, F, H)):
        write_jpeg(voc / f"JPEGImages/{name}.jpg", seed)
    (voc / "SegmentationClass").mkdir()
    for name in VOC_TRAIN | VOC_VAL:
        mask = Image.fromarray(mask_of(name, 0))
        mask.putpalette(palette())
        mask.save(voc / f"SegmentationClass/{name}.png")
    (sbd / "cls").mkdir(parents=True)
    for name in SBD_TRAIN | SBD_VAL:
        write_jpeg(sbd / f"img/{name}.jpg", 100 + int(name[-4:]))
        content = {"Boundaries": np.zeros(20), "Segmentation": mask_of(name, 1), "CategoriesPresent": np.arange(3)}
        scipy.io.savemat(sbd / f"cls/{name}.mat", {"GTcls": content}, do_compression=True)
    with tarfile.open(tmp_path / "voc.tar", "w") as archive:
        archive.add(tmp_path / "VOCdevkit", "VOCdevkit")
    with tarfile.open(tmp_path / "sbd.tgz", "w:gz") as archive:
        archive.add(tmp_path / "benchmark_RELEASE", "benchmark_RELEASE")
    shipped = tmp_path / "shipped/pascal"
    shipped.mkdir(parents=True)
    for title, ids, ignored in (("train", TRAIN, 2), ("val", VOC_VAL, 2), ("train_aug", AUG, 2)):
        lines = [f"JPEGImages/{name}.jpg SegmentationClassAug/{name}.png\n" for name in sorted(ids)]
        (shipped / f"{title}.txt").write_text("".join(lines))
        monkeypatch.setitem(PUBLISHED, sha256(ids), Published(f"the tiny {title}", title, ignored))
    monkeypatch.setattr(prepare_pascal, "LISTS", shipped.parent)
    return tmp_path


@pytest.fixture
def run(sources: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line with sources, the name of OUT and other options; returns OUT, which holds the lists too."""

    def command(out: str = "out", *options: str, **given: str) -> Path:
        root = sources / out
        given = given or {"voc": "voc.tar", "sbd": "sbd.tgz"}
        words = [word for kind, name in given.items() for word in (f"--{kind}", str(sources / name))]
        words += ["--out", str(root), "--lists", str(root / "lists"), *options]
        monkeypatch.setattr(sys, "argv", ["prepare_pascal.py", *words])
        prepare_pascal.main()
        return root

    return command


FOLDERS = {"voc": ".", "sbd": "."}
READY_MADE = {"masks": "have/SegmentationClassAug", "images": "have/JPEGImages"}


def tree(root: Path) -> dict[str, bytes]:
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".npz"]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.suffix != ".npz"}


def test_archives_give_every_mask_and_list(run: Run, sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run()
    for list_name, ids in (("train", TRAIN), ("val", VOC_VAL)):
        items = read_list(out / f"lists/{list_name}.txt", out)
        assert [item.image.stem for item in items] == [item.mask.stem for item in items] == sorted(ids)
        for image, mask, *_ in items:
            original = sources / (f"{SBD}/img" if image.stem == SBD_IMAGE else f"{VOC}/JPEGImages") / image.name
            assert image.read_bytes() == original.read_bytes()
            with Image.open(mask) as stored:
                assert (stored.mode, stored.getpalette()) == ("P", palette())
                expected = mask_of(mask.stem, 0 if mask.stem in VOC_TRAIN | VOC_VAL else 1)
                np.testing.assert_array_equal(np.asarray(stored), expected)
    assert (out / "lists/val.txt").read_text().startswith(f"JPEGImages/{C}.jpg SegmentationClassAug/{C}.png\n")
    assert len(tree(out)) == 2 * 7 + 2  # nothing that no list needs
    printed = capsys.readouterr().out
    for title, ids in (("train", TRAIN), ("val", VOC_VAL)):
        assert f"{out}/lists/{title}.txt: {len(ids)} lines, the tiny {title}; 2 masks hold 255" in printed
    assert "check_data.py --config configs/pascal/resnet50_fold0_1shot.yaml data.root=" in printed


def test_folders_give_the_same_tree_by_links_or_copies(
    run: Run, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    first = f"JPEGImages/{A}.jpg"
    hard = run("hard", voc=VOC, sbd="benchmark_RELEASE")
    assert (hard / first).samefile(sources / VOC / first)
    monkeypatch.setattr(os, "link", refuse)
    soft = run("soft", **FOLDERS)
    assert (soft / first).is_symlink()
    monkeypatch.setattr(os, "symlink", refuse)
    copied = run("copied", **FOLDERS)
    assert not (copied / first).is_symlink()
    assert tree(hard) == tree(soft) == tree(copied) == tree(run())


def test_goes_on_after_an_interruption(run: Run, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete, out = tree(run()), sources / "second"
    real, calls = prepare_pascal.write_bytes, iter(range(3))

    def interrupted(path: Path, data: bytes, **options: bool) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        real(path, data, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_pascal, "write_bytes", interrupted)
        run("second")
    stamps = times(out)
    assert len(stamps) == 3 and not list(out.glob("lists/*"))
    assert tree(run("second")) == complete
    assert stamps.items() <= times(out).items()
    stamps = times(out)
    run("second", **FOLDERS)
    assert times(out) == stamps, "a complete data set is not changed"


def test_aug_has_a_list_of_its_own(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("out", "--train-list", "aug")
    assert {item.image.stem for item in read_list(out / "lists/train_aug.txt", out)} == AUG
    assert {item.image.stem for item in read_list(out / "lists/train.txt", out)} == TRAIN
    assert f"data.train_list={out}/lists/train_aug.txt" in capsys.readouterr().out
    assert all(item.image.exists() and item.mask.exists() for item in read_list(out / "lists/train_aug.txt", out))


def ready_made(sources: Path, run: Run) -> None:
    """Folders as most people have them: a greyscale mask, and images of other lists."""
    made = run("made", "--train-list", "aug")
    for kind in ("JPEGImages", "SegmentationClassAug"):
        shutil.copytree(made / kind, sources / "have" / kind)
    write_jpeg(sources / "have/JPEGImages/2009_000009.jpg", 9)
    mask = sources / f"have/SegmentationClassAug/{A}.png"
    Image.fromarray(np.asarray(Image.open(mask))).save(mask)


def test_ready_made_folders_are_linked_and_verified(
    run: Run, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready_made(sources, run)
    for name in ("out", "have"):  # elsewhere, and in the folder that holds them
        out = run(name, **READY_MADE)
        assert f"{out}/lists/train.txt: 5 lines, the tiny train; 2 masks hold 255" in capsys.readouterr().out
    assert (sources / f"out/SegmentationClassAug/{A}.png").samefile(sources / f"have/SegmentationClassAug/{A}.png")
    assert len(tree(sources / "out")) == 2 * 7 + 2


LACKING: dict[str, tuple[Callable[[Path], object], str]] = {
    "no image": (lambda at: (at / f"JPEGImages/{A}.jpg").unlink(), f"JPEGImages lack the image of {A}"),
    "no mask": (lambda at: (at / f"SegmentationClassAug/{D}.png").unlink(), f"ClassAug lack the mask of {D}"),
    "no border": (
        lambda at: Image.fromarray(mask_of(D, 1)).save(at / f"SegmentationClassAug/{D}.png"),
        r"1 masks of .*val\.txt hold 255, of the published ones 2",
    ),
}


@pytest.mark.parametrize("what", LACKING)
def test_ready_made_folders_that_are_not_as_published_are_refused(what: str, run: Run, sources: Path) -> None:
    ready_made(sources, run)
    spoil, message = LACKING[what]
    spoil(sources / "have")
    with pytest.raises(UserError, match=message):
        run(**READY_MADE)


@pytest.mark.parametrize(
    ("title", "number", "sha"),
    [
        ("train", 5953, "a9bc0a1466deee7a9d4923ae677ec6098f090110a60cb769052a4abad586746c"),
        ("val", 1449, "cdc1326d12f69ce5153aa5da04a4d8783e146868d42d19f82f44e74b97ac907d"),
        ("train_aug", 10582, "d1326bd532648d73bc4b1bd275434eba81930982dc7401a65a8cecb26c028e24"),
    ],
)
def test_the_lists_that_are_shipped_are_the_published_ones(title: str, number: int, sha: str) -> None:
    lines = (LISTS / f"pascal/{title}.txt").read_text().splitlines()
    ids = {line[11:22] for line in lines}
    assert lines == [f"JPEGImages/{name}.jpg SegmentationClassAug/{name}.png" for name in sorted(ids)]
    assert (len(lines), sha256(ids)) == (number, sha)


def test_archives_cannot_write_elsewhere(run: Run, sources: Path) -> None:
    before, prefix = tree(run()), "VOCdevkit/VOC2012/"
    with tarfile.open(sources / "voc.tar", "w") as archive:
        for name in ("../escaped", f"{prefix}../../../escaped", f"{sources}/escaped"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"{prefix}JPEGImages/{A}.jpg")
            info.type, info.linkname = kind, "../../../../etc/passwd"
            archive.addfile(info)
        archive.add(sources / "VOCdevkit", "VOCdevkit")
    names = set(sources.iterdir()) | set(sources.parent.iterdir())
    assert tree(run("second")) == before
    assert (set(sources.iterdir()) | set(sources.parent.iterdir())) - names == {sources / "second"}


def test_a_member_too_large_for_an_image_is_not_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_pascal, "LARGEST", 50)
    with pytest.raises(UserError, match=r"voc\.tar holds JPEGImages/.*\.jpg of .* bytes, which is no image or mask"):
        run()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


MISTAKES: dict[str, tuple[Callable[[Path], object], dict[str, str], str]] = {
    "masks alone": (str, {"masks": "have"}, "--masks and --images go together"),
    "voc alone": (str, {"voc": "voc.tar"}, "give --voc and --sbd"),
    "no archive": (str, {"voc": "none.tar", "sbd": "sbd.tgz"}, r"none\.tar does not exist; give the archive"),
    "no tar": (lambda at: (at / "voc.tar").write_text("<html>"), {}, r"voc\.tar is damaged or no tar archive; .*again"),
    "cut tar": (lambda at: cut(at / "voc.tar"), {}, r"voc\.tar is damaged or no tar archive; .*again"),
    "swapped": (str, {"voc": "sbd.tgz", "sbd": "voc.tar"}, rf"sbd\.tgz and .*voc\.tar lack the image of {A}"),
    "wrong folder": (str, {"voc": SBD, "sbd": "."}, "holds no VOCdevkit/VOC2012/JPEGImages; give the folder"),
    "no image": (lambda at: (at / f"{VOC}/JPEGImages/{A}.jpg").unlink(), FOLDERS, f"lack the image of {A}; download"),
    "cut mat": (lambda at: cut(at / f"{SBD}/cls/{H}.mat"), FOLDERS, rf"{H}\.mat is damaged"),
    "cut mask": (lambda at: cut(at / f"{VOC}/SegmentationClass/{A}.png"), FOLDERS, rf"{A}\.png cannot be read"),
    "out is a file": (lambda at: (at / "out").write_text(""), {}, "out.*: Not a directory; check path"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line_that_helps(mistake: str, run: Run, sources: Path) -> None:
    spoil, given, message = MISTAKES[mistake]
    spoil(sources)
    with pytest.raises(UserError, match=message) as error:
        run(**given)
    assert "\n" not in str(error.value)


def test_as_a_process_from_another_folder(sources: Path) -> None:
    """The official lists: the tiny archives lack most of their images."""
    script = str(ROOT / "scripts/prepare_pascal.py")
    given = ["--voc", "voc.tar", "--sbd", "sbd.tgz", "--out", "o", "--lists", "l"]
    done = subprocess.run([sys.executable, script, *given], cwd=sources, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: voc.tar and sbd.tgz lack the image of 2007_000032,")
    assert done.stderr.count("\n") == 1 and not (sources / "l/train.txt").exists()


# ---------------------------------------------------------------- downloads


PAYLOAD = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(PAYLOAD).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """/file knows ranges, /whole does not, /broken closes after half."""

    asked: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.path != "/whole" else 0
        if start >= len(PAYLOAD):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(PAYLOAD) - 1}/{len(PAYLOAD)}")
        self.send_header("Content-Length", str(len(PAYLOAD) - start))
        self.end_headers()
        self.wfile.write(PAYLOAD[start : len(PAYLOAD) // 2 if self.path == "/broken" else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Server.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as local:
        threading.Thread(target=local.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{local.server_port}"
        local.shutdown()


@pytest.mark.parametrize(
    ("place", "have", "asked"),
    [("file", 0, None), ("file", 10, "bytes=10-"), ("whole", 10, "bytes=10-"), ("file", 300_000, "bytes=300000-")],
)
def test_download_resumes(server: str, tmp_path: Path, place: str, have: int, asked: str | None) -> None:
    path = tmp_path / "new/file.bin"
    if have:
        path.parent.mkdir()
        path.with_name("file.bin.part").write_bytes(PAYLOAD[:have])
    for _ in range(2):  # the second time asks nobody
        download(f"{server}/{place}", path, MD5)
    assert path.read_bytes() == PAYLOAD
    assert Server.asked == [asked]
    assert os.listdir(path.parent) == ["file.bin"]  # noqa: PTH208


def test_download_says_what_went_wrong(server: str, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    part = tmp_path / "file.bin.part"
    with pytest.raises(
        UserError,
        match=r"/broken is incomplete \(150,000 bytes are missing\); run again to continue .*\.bin\.part",
    ):
        download(f"{server}/broken", path, MD5)
    assert part.read_bytes() == PAYLOAD[:150_000]
    part.write_bytes(b"?" * 1000)
    with pytest.raises(UserError, match=f"has MD5 .*, not {MD5}, .*by hand and save it as {path}"):
        download(f"{server}/file", path, MD5)
    assert not part.exists() and not path.exists()
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1/file is incomplete .*Connection refused.*by hand"):
        download("http://127.0.0.1:1/file", path, MD5)
    path.write_bytes(b"another")
    with pytest.raises(UserError, match=f"{path} is not the file at .*; delete it"):
        download(f"{server}/file", path, MD5)


def test_the_command_downloads_the_archive_that_is_not_given(
    server: str, sources: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (sources / "voc.tar").read_bytes()
    monkeypatch.setattr(sys.modules[__name__], "PAYLOAD", whole)
    monkeypatch.setitem(prepare_pascal.DOWNLOADS, "voc", ("voc.tar", f"{server}/file", hashlib.md5(whole).hexdigest()))
    out = run("out", "--download", sbd="sbd.tgz")
    assert (out / "downloads/voc.tar").read_bytes() == whole
    shutil.rmtree(out / "downloads")
    assert len(tree(out)) == 2 * 7 + 2
