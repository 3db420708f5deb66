"""scripts/prepare_pascal.py on tiny trees in the official layouts, and util/data/download.py against a local server."""

import hashlib
import http.server
import io
import os
import random
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.io  # type: ignore[import-untyped]
from PIL import Image

from scripts import prepare_pascal
from util.data.class_index import read_list
from util.data.download import download
from util.data.published import LISTS, PUBLISHED, Published
from util.data.synthetic import voc_palette
from util.errors import UserError

A, B, C, D, E, F, G, H = (f"20{year:02}_00{year:04}" for year in range(1, 9))
VOC_TRAIN, VOC_VAL = {A, B}, {C, D}
SBD_TRAIN, SBD_VAL = {B, E, F, G}, {C, H}
TRAIN, AUG = {A, B, F, G, H}, {A, B, E, F, G, H}
VOC, SBD = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"
SBD_IMAGE = G
"""the image that VOC's JPEGImages lack"""


Run = Callable[..., Path]


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
        mask.putpalette(voc_palette())
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
    """The command line on the archives or other sources; returns OUT, where the lists lie too."""

    def command(voc: str = "voc.tar", sbd: str = "sbd.tgz", out: str = "out", *options: str) -> Path:
        return prepare(sources, sources / out, monkeypatch, voc=voc, sbd=sbd, options=options)

    return command


def prepare(
    sources: Path, root: Path, monkeypatch: pytest.MonkeyPatch, options: Sequence[str] = (), **given: str
) -> Path:
    paths = [word for kind, name in given.items() for word in (f"--{kind}", str(sources / name))]
    words = [*paths, "--out", str(root), "--lists", str(root / "lists"), *options]
    monkeypatch.setattr(sys, "argv", ["prepare_pascal.py", *words])
    prepare_pascal.main()
    return root


def tree(root: Path) -> dict[str, bytes]:
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".npz"]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.suffix != ".npz"}


def test_archives_give_every_mask_and_list(run: Run, sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run()
    for list_name, ids in (("train", TRAIN), ("val", VOC_VAL)):
        items = read_list(out / f"lists/{list_name}.txt", out)
        assert [item.image.stem for item in items] == [item.mask.stem for item in items] == sorted(ids)
        for image, mask, *_ in items:
            original = sources / (f"{SBD}/img" if image.stem == SBD_IMAGE else f"{VOC}/JPEGImages") / image.name
            assert image.read_bytes() == original.read_bytes()
            with Image.open(mask) as stored:
                assert (stored.mode, stored.getpalette()) == ("P", voc_palette())
                expected = mask_of(mask.stem, 0 if mask.stem in VOC_TRAIN | VOC_VAL else 1)
                np.testing.assert_array_equal(np.asarray(stored), expected)
    assert (out / "lists/val.txt").read_text().startswith(f"JPEGImages/{C}.jpg SegmentationClassAug/{C}.png\n")
    assert len(tree(out)) == 2 * 7 + 2  # nothing that no list needs
    printed = capsys.readouterr().out
    for title, ids in (("train", TRAIN), ("val", VOC_VAL)):
        assert f"{len(ids)}  {out}/lists/{title}.txt: the tiny {title}; 2 masks hold 255" in printed
    assert f"6 from {sources}/voc.tar, 1 from {sources}/sbd.tgz" in printed
    assert f"4 from {sources}/voc.tar, 3 from {sources}/sbd.tgz" in printed
    assert "check_data.py --config configs/pascal/resnet50_fold0_1shot.yaml data.root=" in printed


def test_folders_give_the_same_tree_by_links_or_copies(
    run: Run, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    first = f"JPEGImages/{A}.jpg"
    hard = run("VOCdevkit/VOC2012", "benchmark_RELEASE", "hard")
    assert (hard / first).samefile(sources / "VOCdevkit/VOC2012" / first)
    monkeypatch.setattr(os, "link", refuse)
    soft = run(".", ".", "soft")
    assert (soft / first).is_symlink()
    monkeypatch.setattr(os, "symlink", refuse)
    copied = run(".", ".", "copied")
    assert not (copied / first).is_symlink()
    assert tree(hard) == tree(soft) == tree(copied) == tree(run())


def test_rerun_changes_nothing_and_mends_what_is_broken(run: Run, sources: Path) -> None:
    out = run()
    before, stamps = tree(out), times(out)
    run()
    run(".", ".")
    assert times(out) == stamps
    for broken in (out / f"JPEGImages/{A}.jpg", out / f"SegmentationClassAug/{H}.png"):
        broken.write_bytes(broken.read_bytes()[:-40])
    run()
    assert tree(out) == before
    assert sum(times(out)[path] != stamps[path] for path in stamps if path.is_file()) == 2


@pytest.mark.parametrize(
    ("step", "given"),
    [("write_bytes", ("voc.tar", "sbd.tgz", "second")), ("link", (".", ".", "second"))],
)
def test_goes_on_after_an_interruption(
    step: str, given: tuple[str, ...], run: Run, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, out = tree(run()), sources / "second"
    real, calls = getattr(prepare_pascal, step), iter(range(3))

    def interrupted(*args: object, **options: object) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        real(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_pascal, step, interrupted)
        run(*given)
    stamps = {path: stamp for path, stamp in times(out).items() if path.is_file()}
    assert len(stamps) >= 3 and not list(out.glob("lists/*"))
    assert tree(run(*given)) == complete
    assert stamps.items() <= times(out).items()


@pytest.mark.parametrize("given", [("voc.tar", "sbd.tgz"), (".", ".")])
def test_a_preparation_in_the_midst_of_another_disturbs_neither(
    given: tuple[str, str], run: Run, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, real, calls = tree(run(*given, "first")), prepare_pascal.Source.read, iter(range(1))

    def read(self: prepare_pascal.Source, names: list[str]) -> Iterator[tuple[str, bytes]]:
        if next(calls, None) is not None:  # the first has surveyed what there is to do; now the second does it all
            run(*given, "second")
        yield from real(self, names)

    monkeypatch.setattr(prepare_pascal.Source, "read", read)
    assert tree(run(*given, "second")) == complete


def test_aug_has_a_list_of_its_own(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("voc.tar", "sbd.tgz", "out", "--train-list", "aug")
    assert {item.image.stem for item in read_list(out / "lists/train_aug.txt", out)} == AUG
    assert {item.image.stem for item in read_list(out / "lists/train.txt", out)} == TRAIN
    assert f"data.train_list={out}/lists/train_aug.txt" in capsys.readouterr().out
    assert all(item.image.exists() and item.mask.exists() for item in read_list(out / "lists/train_aug.txt", out))


def ready_made(sources: Path, run: Run) -> None:
    """Folders as most people have them: greyscale masks, and images of other lists beside."""
    made = run("voc.tar", "sbd.tgz", "made", "--train-list", "aug")
    for kind in ("JPEGImages", "SegmentationClassAug"):
        shutil.copytree(made / kind, sources / "have" / kind)
    write_jpeg(sources / "have/JPEGImages/2009_000009.jpg", 9)
    mask = sources / f"have/SegmentationClassAug/{A}.png"
    Image.fromarray(np.asarray(Image.open(mask))).save(mask)


def test_ready_made_folders_are_linked_and_verified(
    run: Run, sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ready_made(sources, run)
    given = {"masks": "have/SegmentationClassAug", "images": "have/JPEGImages"}
    for place in ("out", "have"):  # elsewhere, and where they lie
        out = prepare(sources, sources / place, monkeypatch, **given)
        assert "5  " + str(out / "lists/train.txt") + ": the tiny train; 2 masks hold 255" in capsys.readouterr().out
    assert (sources / f"out/SegmentationClassAug/{A}.png").samefile(sources / f"have/SegmentationClassAug/{A}.png")
    assert len(tree(sources / "out")) == 2 * 7 + 2


LACKING: dict[str, tuple[Callable[[Path], object], str]] = {
    "no image": (lambda at: (at / f"JPEGImages/{A}.jpg").unlink(), f"JPEGImages lack the image of {A}"),
    "no mask": (lambda at: (at / f"SegmentationClassAug/{D}.png").unlink(), f"ClassAug lack the mask of {D}"),
    "other size": (lambda at: Image.new("L", (17, 11)).save(at / f"SegmentationClassAug/{H}.png"), r"same size"),
    "no border": (
        lambda at: Image.fromarray(mask_of(D, 1)).save(at / f"SegmentationClassAug/{D}.png"),
        r"1 masks of .*val\.txt hold 255, of the published ones 2",
    ),
    "coloured": (lambda at: Image.new("RGB", (17, 12)).save(at / f"SegmentationClassAug/{D}.png"), "has mode RGB"),
}


@pytest.mark.parametrize("what", LACKING)
def test_ready_made_folders_that_are_not_as_published_are_refused(
    what: str, run: Run, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready_made(sources, run)
    spoil, message = LACKING[what]
    spoil(sources / "have")
    with pytest.raises(UserError, match=message):
        prepare(sources, sources / "out", monkeypatch, masks="have/SegmentationClassAug", images="have/JPEGImages")


@pytest.mark.parametrize(
    "given",
    [{"masks": "have"}, {"images": "have"}, {"masks": "a", "images": "b", "voc": "voc.tar"}, {"voc": "voc.tar"}],
)
def test_sources_that_do_not_go_together_are_refused(
    given: dict[str, str], sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--masks and --images"):
        prepare(sources, sources / "out", monkeypatch, **given)


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
    assert tree(run("voc.tar", "sbd.tgz", "second")) == before
    assert (set(sources.iterdir()) | set(sources.parent.iterdir())) - names == {sources / "second"}


def test_a_member_that_swells_is_refused_by_its_size(run: Run, sources: Path) -> None:
    """20 GB of nothing, sparse, in a few KB of tar."""
    name = f"{VOC}/JPEGImages/{A}.jpg"
    with tarfile.open(sources / "voc.tar") as archive:
        members = [(member, archive.extractfile(member)) for member in archive.getmembers() if member.isreg()]
        with tarfile.open(sources / "swells.tar", "w", format=tarfile.PAX_FORMAT) as other:
            for member, file in members:
                if member.name == name:
                    sparse = tarfile.TarInfo(name)
                    data = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
                    sparse.size = len(data)
                    sparse.pax_headers = {
                        "GNU.sparse.major": "1",
                        "GNU.sparse.minor": "0",
                        "GNU.sparse.name": name,
                        "GNU.sparse.realsize": str(20 * 10**9),
                    }
                    other.addfile(sparse, io.BytesIO(data))
                else:
                    other.addfile(member, file)
    with pytest.raises(UserError, match=rf"swells\.tar holds JPEGImages/{A}\.jpg of 20,000,000,000 bytes"):
        run("swells.tar")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


Mistake = tuple[Callable[[Path], object], tuple[str, ...], str]
FOLDERS = (".", ".")
MISTAKES: dict[str, Mistake] = {
    "no archive": (str, ("none.tar",), r"none\.tar does not exist; give the archive"),
    "no tar": (lambda at: (at / "voc.tar").write_text("<html>"), (), r"voc\.tar is damaged or no tar archive; .*again"),
    "cut tar": (lambda at: cut(at / "voc.tar"), (), r"voc\.tar is truncated or damaged; .*again"),
    "cut tgz": (lambda at: cut(at / "sbd.tgz"), (), r"sbd\.tgz is truncated or damaged"),
    "swapped": (str, ("sbd.tgz", "voc.tar"), rf"sbd\.tgz and .*voc\.tar lack the image of {A}"),
    "wrong folder": (str, ("benchmark_RELEASE", "."), "holds no VOCdevkit/VOC2012/JPEGImages; give the folder"),
    "no image": (lambda at: (at / f"{VOC}/JPEGImages/{A}.jpg").unlink(), FOLDERS, f"lack the image of {A}; not whole"),
    "cut mat": (lambda at: cut(at / f"{SBD}/cls/{H}.mat"), FOLDERS, rf"{H}\.mat is damaged"),
    "cut mask": (lambda at: cut(at / f"{VOC}/SegmentationClass/{A}.png"), FOLDERS, f"{A}.png is damaged"),
    "out is a file": (lambda at: (at / "out").write_text(""), (), "out.*: Not a directory; check path"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line_that_helps(mistake: str, run: Run, sources: Path) -> None:
    spoil, given, message = MISTAKES[mistake]
    spoil(sources)
    with pytest.raises(UserError, match=message) as error:
        run(*given)
    assert "\n" not in str(error.value)
    assert not (sources / "out/lists/train.txt").exists()


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
        match=r"/broken did not come whole \(150,000 bytes are missing\); run again to continue .*\.bin\.part",
    ):
        download(f"{server}/broken", path, MD5)
    assert part.read_bytes() == PAYLOAD[:150_000]
    part.write_bytes(b"?" * 1000)
    with pytest.raises(UserError, match=f"came with MD5 .*, not {MD5}, .*by hand and save it as {path}"):
        download(f"{server}/file", path, MD5)
    assert not part.exists() and not path.exists()
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1/file did not come whole .*Connection refused.*by hand"):
        download("http://127.0.0.1:1/file", path, MD5)
    path.write_bytes(b"another")
    with pytest.raises(UserError, match=f"{path} is not the file at .*; delete it"):
        download(f"{server}/file", path, MD5)


def test_the_command_downloads_from_the_place_that_answers(
    server: str, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (sources / "voc.tar").read_bytes()
    monkeypatch.setattr(sys.modules[__name__], "PAYLOAD", whole)
    gone, here = "http://127.0.0.1:1/voc.tar", f"{server}/file"
    monkeypatch.setitem(prepare_pascal.DOWNLOADS, "voc", ("voc.tar", gone, here, hashlib.md5(whole).hexdigest()))
    out = sources / "out"
    given = ["--download", "--sbd", str(sources / "sbd.tgz"), "--out", str(out), "--lists", str(out / "lists")]
    monkeypatch.setattr(sys, "argv", ["prepare_pascal.py", *given])
    prepare_pascal.main()
    assert (out / "downloads/voc.tar").read_bytes() == whole
    shutil.rmtree(out / "downloads")
    assert len(tree(out)) == 2 * 7 + 2
