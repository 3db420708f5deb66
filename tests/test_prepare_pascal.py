"""scripts/prepare_pascal.py on tiny trees in the official layouts, and util/data/download.py against a local server."""

import hashlib
import http.server
import random
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io  # type: ignore[import-untyped]
from PIL import Image

from scripts import prepare_pascal
from util.data.download import download
from util.data.published import LISTS
from util.errors import UserError

A, B, C, D, E, F, G, H = (f"20{year:02}_00{year:04}" for year in range(1, 9))
VOC_TRAIN, VOC_VAL = {A, B}, {C, D}
SBD_TRAIN, SBD_VAL = {B, E, F, G}, {C, H}
TRAIN, AUG = {A, B, F, G, H}, {A, B, E, F, G, H}
VOC, SBD = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"
SBD_IMAGE = G
"""the image that VOC's JPEGImages lack"""
Run = Callable[..., Path]


def palette() -> list[int]:
    """VOC's colour map: bit b of an id is bit 7 - b // 3 of the colour b % 3."""
    colours = np.zeros((256, 3), int)
    for i in range(256):
        for b in range(8):
            colours[i, b % 3] += (i >> b & 1) << (7 - b // 3)
    return colours.ravel().tolist()


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
    """The folder with VOCdevkit, benchmark_RELEASE, and an archive of each; the shipped lists are the tiny trees'."""
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
    for title, ids in (("train", TRAIN), ("val", VOC_VAL), ("train_aug", AUG)):
        lines = [f"JPEGImages/{name}.jpg SegmentationClassAug/{name}.png\n" for name in sorted(ids)]
        (shipped / f"{title}.txt").write_text("".join(lines))
    monkeypatch.setattr(prepare_pascal, "LISTS", shipped.parent)
    return tmp_path


@pytest.fixture
def run(sources: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line with sources, the name of OUT and other options; returns OUT."""

    def command(out: str = "out", *options: str, **given: str) -> Path:
        root = sources / out
        given = given or {"voc": "voc.tar", "sbd": "sbd.tgz"}
        words = [word for kind, name in given.items() for word in (f"--{kind}", str(sources / name))]
        words += ["--out", str(root), *options]
        monkeypatch.setattr(sys, "argv", ["prepare_pascal.py", *words])
        prepare_pascal.main()
        return root

    return command


FOLDERS = {"voc": ".", "sbd": "."}
READY_MADE = {"masks": "have/SegmentationClassAug", "images": "have/JPEGImages"}


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_archives_give_every_image_and_mask(run: Run, sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run()
    for name in TRAIN | VOC_VAL:
        original = sources / (f"{SBD}/img" if name == SBD_IMAGE else f"{VOC}/JPEGImages") / f"{name}.jpg"
        assert (out / f"JPEGImages/{name}.jpg").read_bytes() == original.read_bytes()
        with Image.open(out / f"SegmentationClassAug/{name}.png") as stored:
            assert (stored.mode, stored.getpalette()) == ("P", palette())
            expected = mask_of(name, 0 if name in VOC_TRAIN | VOC_VAL else 1)
            np.testing.assert_array_equal(np.asarray(stored), expected)
    assert len(tree(out)) == 2 * 7  # nothing that no list needs
    printed = capsys.readouterr().out
    assert f"check_data.py --config configs/pascal/resnet50_fold0_1shot.yaml data.root={out}\n" in printed


def test_folders_give_the_same_tree_by_links(run: Run, sources: Path) -> None:
    expected = tree(run())
    for out in (run("a", voc=VOC, sbd="benchmark_RELEASE"), run("b", **FOLDERS)):
        assert (out / f"JPEGImages/{A}.jpg").is_symlink() and tree(out) == expected
    (sources / "VOCdevkit").rename(sources / "moved")
    assert tree(run("a", voc="moved/VOC2012", sbd="benchmark_RELEASE")) == expected


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
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert len(finished) == 3
    assert tree(run("second")) == complete
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


def test_aug_adds_the_images_of_its_list(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("out", "--aug")
    assert {path.stem for path in (out / "JPEGImages").iterdir()} == TRAIN | VOC_VAL | AUG
    assert "data.train_list=lists/pascal/train_aug.txt" in capsys.readouterr().out


def test_ready_made_folders_are_linked(run: Run, sources: Path) -> None:
    run("made", "--aug").rename(sources / "have")
    for name in ("out", "have"):  # elsewhere, and in the folder that holds them
        run(name, **READY_MADE)
    assert (sources / f"out/SegmentationClassAug/{A}.png").samefile(sources / f"have/SegmentationClassAug/{A}.png")
    assert len(tree(sources / "out")) == 2 * 7
    (sources / f"have/SegmentationClassAug/{D}.png").unlink()
    with pytest.raises(UserError, match=f"have/SegmentationClassAug lack SegmentationClassAug/{D}.png"):
        run("third", **READY_MADE)


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
    text = "".join(f"{name}\n" for name in sorted(ids))
    assert (len(lines), hashlib.sha256(text.encode()).hexdigest()) == (number, sha)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


MISTAKES: dict[str, tuple[Callable[[Path], object], dict[str, str], str]] = {
    "voc alone": (str, {"voc": "voc.tar"}, "give --voc and --sbd"),
    "cut tar": (lambda at: cut(at / "sbd.tgz"), {}, r"sbd\.tgz is damaged or no tar archive; .*again"),
    "swapped": (str, {"voc": "sbd.tgz", "sbd": "voc.tar"}, rf"sbd\.tgz and .*voc\.tar lack JPEGImages/{A}"),
    "no image": (lambda at: (at / f"{VOC}/JPEGImages/{A}.jpg").unlink(), FOLDERS, f"lack JPEGImages/{A}.*; download"),
    "cut mat": (lambda at: cut(at / f"{SBD}/cls/{H}.mat"), FOLDERS, rf"{H}\.mat is damaged"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line_that_helps(mistake: str, run: Run, sources: Path) -> None:
    spoil, given, message = MISTAKES[mistake]
    spoil(sources)
    with pytest.raises(UserError, match=message) as error:
        run(**given)
    assert "\n" not in str(error.value)


PAYLOAD = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(PAYLOAD).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Knows ranges; /broken closes after half."""

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start == len(PAYLOAD):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(PAYLOAD) - start))
        self.end_headers()
        self.wfile.write(PAYLOAD[start : len(PAYLOAD) // 2 if self.path == "/broken" else None])

    def log_message(self, *_: object) -> None:
        pass


def test_a_broken_download_is_resumed_and_a_wrong_hash_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path, part = tmp_path / "new/file.bin", tmp_path / "new/file.bin.part"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match=r"/broken is incomplete \(150,000 bytes are missing\); run again"):
            download(f"{url}/broken", path, MD5)
        for have in (PAYLOAD[:150_000], PAYLOAD):
            part.write_bytes(have)
            download(f"{url}/file", path, MD5)
            assert path.read_bytes() == PAYLOAD and not part.exists()
            path.unlink()
        part.write_bytes(b"?" * 1000)
        with pytest.raises(UserError, match=f"has MD5 .*, not {MD5}, .*by hand and save it as {path}"):
            download(f"{url}/file", path, MD5)
        assert not part.exists() and not path.exists()
        server.shutdown()
