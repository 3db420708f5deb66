"""Prepare PASCAL-5i from VOC 2012 and SBD, archives or unpacked folders:

    python scripts/prepare_pascal.py --voc VOCtrainval_11-May-2012.tar --sbd benchmark.tgz --out data/pascal
    python scripts/prepare_pascal.py --download --out data/pascal

Builds OUT/JPEGImages and OUT/SegmentationClassAug (class ids as PNG: VOC's own mask where VOC has one, else SBD's),
then train.txt = VOC train united with SBD train_noval and val.txt = VOC val. Every list is compared with the hash of
the published one. Run it again after an interruption: it goes on where it stood.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import os
import re
import shlex
import signal
import sys
import tarfile
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.io import loadmat  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.download import download
from util.errors import UserError, run_command
from util.images import compare_checksums, read_image, read_mask
from util.progress import progress
from util.synthetic import voc_palette

LARGEST = 64 * 2**20
"""bytes that a photo, a mask or a list may have; theirs have less than a hundredth of it"""

EXPECTED: dict[str, tuple[int, str | None]] = {
    "VOC train": (1464, "aa623bd2c8ce4443a8aaae51c524c0eb165e8e44caf6aa9e3ad33d7b75a3ef20"),
    "SBD train_noval": (5623, "0b2068f7a359d2907431803e1cd63bf6162da37d7d503b589d3b08c6fd0c2432"),
    "train": (5953, "a9bc0a1466deee7a9d4923ae677ec6098f090110a60cb769052a4abad586746c"),
    "val": (1449, "cdc1326d12f69ce5153aa5da04a4d8783e146868d42d19f82f44e74b97ac907d"),
    "train_aug": (10582, None),
}
"""name: number of ids, SHA-256 of the sorted ids, one a line; the last is known by its number alone"""

DOWNLOADS = {
    "voc": (
        "VOCtrainval_11-May-2012.tar",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "6cd6e144f989b92b3379bac3b3de84fd",
    ),
    "sbd": (
        "benchmark.tgz",
        "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "82b4d87ceb2ed10f6038a1cba92111cb",
    ),
    "train_noval": (
        "train_noval.txt",
        "http://home.bharathh.info/pubs/codes/SBD/train_noval.txt",
        "https://www.cs.cornell.edu/~bharathh/train_noval.txt",
        "79bff800c5f0b1ec6b21080a3c066722",
    ),
}
"""file name, official place, where torchvision finds it today, MD5 (torchvision's)"""

VOC_FOLDERS = ("JPEGImages", "SegmentationClass")
VOC_LISTS = ("ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt", "ImageSets/Main/val.txt")
SBD_FOLDERS, SBD_LISTS = ("img", "cls"), ("train.txt", "val.txt")
ID = re.compile(r"\d{4}_\d{6}")
"""ids become file names: a list can name nothing else"""
NUM_CLASSES = 20


@dataclass(frozen=True)
class Source:
    """VOC or SBD, an archive or a folder. Its files go by their names below the data set's own root."""

    path: Path
    prefix: str
    """of the names in the archive"""
    folder: Path | None
    """where an unpacked one has its root; None for an archive"""

    @classmethod
    def open(cls, path: Path, prefix: str, marker: str) -> "Source":
        """The folder may be what the archive was unpacked to, the root itself, or one between."""
        if not path.exists():
            raise UserError(f"{path} does not exist; give the archive or its unpacked folder, or use --download")
        if path.is_file():
            return cls(path, prefix, None)
        for folder in (path / prefix, path / Path(prefix).name, path):
            if (folder / marker).is_dir():
                return cls(path, prefix, folder)
        raise UserError(f"{path} holds no {prefix}{marker}; give the folder that the archive was unpacked to")

    def survey(self, folders: Collection[str], lists: Collection[str]) -> tuple[set[str], list[set[str]]]:
        """Names of all files in ``folders``, and the ids in each of ``lists``."""
        if self.folder:
            names = {f"{name}/{entry.name}" for name in folders for entry in (self.folder / name).glob("*")}
            texts = {name: (self.folder / name).read_bytes() for name in lists if (self.folder / name).is_file()}
        else:
            names, texts = set(), {}
            for name, data in self._members(lists):
                names.add(name)
                if name in lists:
                    texts[name] = data
        for name in lists:
            if name not in texts:
                raise UserError(f"{self.path} lacks {self.prefix}{name}; it is not whole, fetch or unpack it again")
        return names, [parse_ids(texts[name], f"{self.path}: {name}") for name in lists]

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the files in ``names``, in the archive's own order."""
        if self.folder:
            for name in sorted(names):
                yield name, (self.folder / name).read_bytes()
            return
        waiting = set(names)
        for name, data in self._members(names) if waiting else ():
            if name in waiting:
                waiting.remove(name)
                yield name, data
            if not waiting:
                return

    def _members(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Names of the archive's regular files below the prefix; contents of the wanted ones alone.

        Nothing is unpacked to a member's own name: a link or a name like ``../x`` is passed over.
        """
        try:
            with tarfile.open(self.path) as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if not member.isreg() or not name.startswith(self.prefix):
                        continue
                    name = name.removeprefix(self.prefix)
                    if name in wanted and member.size > LARGEST:
                        raise UserError(
                            f"{self.path} holds {name} of {member.size:,} bytes, which is no photo and no mask; delete"
                            " it and download it again"
                        )
                    file = archive.extractfile(member) if name in wanted else None
                    yield name, file.read() if file else b""
        except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
            kind = "is damaged or no tar archive" if "opened" in str(error) else "is truncated or damaged"
            raise UserError(f"{self.path} {kind}; delete it and download it again") from error


class File(NamedTuple):
    """One file to build, and what it is built from."""

    target: Path
    source: Source
    name: str


def main() -> None:
    """Parse the command line, prepare, and say what stands there now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, help="VOCtrainval_11-May-2012.tar, or the folder it was unpacked to")
    parser.add_argument("--sbd", type=Path, help="SBD's benchmark.tgz, or the folder it was unpacked to")
    parser.add_argument("--download", action="store_true", help="fetch what is not given into OUT/downloads (3.4 GB)")
    parser.add_argument("--out", type=Path, default=Path("data/pascal"), help="the data set's root (data/pascal)")
    parser.add_argument("--lists", type=Path, default=Path("lists/pascal"), help="the lists' folder (lists/pascal)")
    parser.add_argument(
        "--train-list",
        choices=("noval", "aug"),
        default="noval",
        help="aug: also write train_aug.txt, the 10582 images of VOC train and all of SBD without VOC val",
    )
    args = parser.parse_args()
    aug = args.train_list == "aug"
    try:
        prepare(args.voc, args.sbd, args.download, args.out, args.lists, aug)
    except OSError as error:
        raise UserError(
            f"{error.filename or args.out}: {error.strerror or error}; check path, rights and free space"
        ) from error
    except BrokenProcessPool as error:
        raise UserError("a converting process died, perhaps for want of memory; run again to continue") from error
    overrides = [f"data.root={args.out}"] if args.out != parser.get_default("out") else []
    if aug or args.lists != parser.get_default("lists"):
        train = "train_aug.txt" if aug else "train.txt"
        overrides += [f"data.train_list={args.lists / train}", f"data.val_list={args.lists / 'val.txt'}"]
    command = "python scripts/check_data.py --config configs/pascal/resnet50_fold0_1shot.yaml"
    print("next:", command, *map(shlex.quote, overrides))


def prepare(voc_path: Path | None, sbd_path: Path | None, fetch: bool, out: Path, list_folder: Path, aug: bool) -> None:
    """The whole way from the sources to the lists."""
    if fetch:
        voc_path = voc_path or fetched("voc", out)
        if sbd_path is None:
            sbd_path = fetched("sbd", out)
            with contextlib.suppress(UserError):  # its places are gone at times; SBD's own lists give the same
                fetched("train_noval", out)
    if voc_path is None or sbd_path is None:
        raise UserError("give --voc and --sbd, archives or unpacked folders, or --download to fetch them")
    voc = Source.open(voc_path, "VOCdevkit/VOC2012/", marker="ImageSets")
    sbd = Source.open(sbd_path, "benchmark_RELEASE/dataset/", marker="cls")

    print(f"reading {voc.path} and {sbd.path}", flush=True)
    voc_names, (voc_train, val, main_val) = voc.survey(VOC_FOLDERS, VOC_LISTS)
    sbd_names, sbd_lists = sbd.survey(SBD_FOLDERS, SBD_LISTS)
    sbd_all = set[str]().union(*sbd_lists)
    published = find_train_noval(sbd)
    noval = parse_ids(published.read_bytes(), str(published)) if published else sbd_all - main_val

    # the masks that lie there tell which ids a wrong list lacks or has too many
    voc_masks, sbd_masks = stems(voc_names, "SegmentationClass"), stems(sbd_names, "cls")
    check("VOC train", voc_train, voc_masks - val, voc.path)
    check("SBD train_noval", noval, sbd_masks - main_val, published or sbd.path)
    check("val", val, voc_masks - voc_train, voc.path)
    lists = {"train": voc_train | noval, "val": val}
    check("train", lists["train"], (voc_masks - val) | (sbd_masks - main_val), sbd.path)
    if aug:
        lists["train_aug"] = (voc_train | sbd_all) - val
        check("train_aug", lists["train_aug"], (voc_masks | sbd_masks) - val, sbd.path)

    files: list[File] = []
    for name in sorted(set[str]().union(*lists.values())):
        in_voc, in_sbd = f"JPEGImages/{name}.jpg", f"img/{name}.jpg"
        image = (sbd, in_sbd) if in_voc not in voc_names and in_sbd in sbd_names else (voc, in_voc)
        mask = (voc, f"SegmentationClass/{name}.png") if name in voc_train | val else (sbd, f"cls/{name}.mat")
        files += [File(out / f"JPEGImages/{name}.jpg", *image), File(out / f"SegmentationClassAug/{name}.png", *mask)]
    if absent := [file for file in files if file.name not in (voc_names if file.source is voc else sbd_names)]:
        source = absent[0].source
        names = some([file.name for file in absent if file.source is source])
        raise UserError(f"{source.path} lacks {names}; it is not whole, fetch or unpack it again")

    for folder in (out / "JPEGImages", out / "SegmentationClassAug", list_folder):
        folder.mkdir(parents=True, exist_ok=True)
    built = build(files)
    for title, ids in {"VOC train": voc_train, "SBD train_noval": noval, **lists}.items():
        print(f"{title:<16}{len(ids):>6} ids  {ids_sha256(ids) if EXPECTED[title][1] else '':<64}  as expected")
    for kind, suffix in (("images", ".jpg"), ("masks", ".png")):
        own = [file.source is voc for file in files if file.target.suffix == suffix]
        print(f"{kind:<16}{len(own):>6}      {sum(own)} from VOC, {len(own) - sum(own)} from SBD")
    print(f"{'files built':<16}{built:>6}      {len(files) - built} were there, in {out}")
    for title, ids in lists.items():
        path = list_folder / f"{title}.txt"
        text = "".join(f"JPEGImages/{name}.jpg SegmentationClassAug/{name}.png\n" for name in sorted(ids)).encode()
        if not path.is_file() or path.read_bytes() != text:
            write_atomically(path, text)
        print(f"{'list':<16}{len(ids):>6}      {path}")


def fetched(kind: str, out: Path) -> Path:
    """A file of ``DOWNLOADS``, from the first of its places that gives it."""
    name, *urls, md5 = DOWNLOADS[kind]
    path = out / "downloads" / name
    for url in urls:
        try:
            download(url, path, md5)
            return path
        except UserError as error:
            problem = error
    raise problem


def find_train_noval(sbd: Source) -> Path | None:
    """The published list, where it lies in the unpacked folder or beside it or the archive."""
    places = [sbd.path.parent] if sbd.folder is None else [sbd.folder, sbd.path, sbd.path.parent]
    return next((place / "train_noval.txt" for place in places if (place / "train_noval.txt").is_file()), None)


def parse_ids(text: bytes, origin: str) -> set[str]:
    """First word of each line. Ids become file names, so nothing but an id passes."""
    ids = {line.split()[0] for line in text.decode(errors="replace").splitlines() if line.strip()}
    for name in sorted(ids):
        if not ID.fullmatch(name):
            raise UserError(f"{origin} holds {name[:50]!r}, which is no image id; fetch it again")
    return ids


def stems(names: set[str], folder: str) -> set[str]:
    """Ids of the files in one of a source's folders."""
    return {Path(name).stem for name in names if name.startswith(folder + "/")}


def ids_sha256(ids: set[str]) -> str:
    """SHA-256 of the sorted ids, one a line."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(ids)).encode()).hexdigest()


def some(words: Collection[str]) -> str:
    """The first few of many, and how many more."""
    return ", ".join(sorted(words)[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def check(title: str, ids: set[str], by_masks: set[str], origin: Path) -> None:
    """Compare a list with the published one; ``by_masks`` are the ids it should hold by the masks that lie there."""
    number, sha256 = EXPECTED[title]
    if len(ids) == number and sha256 in (None, ids_sha256(ids)):
        return
    hint = f"; masks without a line: {some(by_masks - ids)}" if by_masks - ids else ""
    hint += f"; lines without a mask: {some(ids - by_masks)}" if ids - by_masks else ""
    raise UserError(
        f"{title} from {origin} has {len(ids)} ids, SHA-256 {ids_sha256(ids)}; expected {number}, {sha256 or 'any'}"
        f"{hint}; fetch or unpack the original again (no list was written)"
    )


def build(files: list[File]) -> int:
    """Build the files that are not there or cannot be read; how many those were."""
    there = [file.target for file in files if file.target.exists()]
    jobs: list[Future[None]] = []
    with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            checks = pool.map(is_good, there, chunksize=32)
            checked = progress(checks, "checking what is there", len(there), unit="file", disable=not there)
            good = {path for path, fine in zip(there, checked, strict=True) if fine}
            todo = [file for file in files if file.target not in good]
            with progress(desc="building", total=len(todo), unit="file", disable=not todo) as bar:
                for source in dict.fromkeys(file.source for file in todo):
                    targets = {file.name: file.target for file in todo if file.source == source}
                    if source.folder:
                        for name in [name for name in targets if name.endswith(".jpg")]:
                            link_image(source.folder / name, targets.pop(name))
                            bar.update()
                    for name, data in source.read(targets):
                        if name.endswith(".jpg"):
                            write_atomically(targets[name], data)
                            bar.update()
                        else:
                            job = pool.submit(write_mask, data, targets[name], f"{source.path}: {name}")
                            job.add_done_callback(lambda _: bar.update())
                            jobs.append(job)
                for job in jobs:
                    job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(todo)


def is_good(path: Path) -> bool:
    """Whether a picture or mask can be read to its end."""
    try:
        read_mask(path) if path.suffix == ".png" else read_image(path)
    except UserError:
        return False
    return True


def link_image(source: Path, target: Path) -> None:
    """Hard link, else symbolic link, else copy."""
    if target.exists() and target.samefile(source):
        raise UserError(f"image {source} is damaged; unpack it again")
    target.unlink(missing_ok=True)
    source = source.resolve()
    for link in (os.link, os.symlink):
        with contextlib.suppress(OSError):
            link(source, target)
            return
    write_atomically(target, source.read_bytes())


def write_mask(data: bytes, target: Path, origin: str) -> None:
    """VOC's PNG byte for byte, or SBD's GTcls with VOC's palette."""
    try:
        if target.suffix != Path(origin).suffix:
            mask = np.asarray(loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0][0])
            if mask.ndim != 2 or mask.dtype != np.uint8 or mask.max() > NUM_CLASSES:
                raise ValueError(f"{mask.dtype} of shape {mask.shape}, want (H, W) uint8 up to {NUM_CLASSES}")
            image, buffer = Image.fromarray(mask), io.BytesIO()
            image.putpalette(voc_palette())
            image.save(buffer, "PNG")
            data = buffer.getvalue()
        else:
            compare_checksums(data)
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                image.load()
                if image.mode != "P":
                    raise ValueError(f"mode {image.mode}, want a palette")
    except Exception as error:  # SciPy and Pillow raise many kinds for a damaged file
        raise UserError(f"{origin} is damaged ({' '.join(str(error).split())}); fetch or unpack it again") from error
    write_atomically(target, data)


def write_atomically(target: Path, data: bytes) -> None:
    """A file that has its name is whole."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(target)


if __name__ == "__main__":
    run_command(main)
