"""Prepare PASCAL-5i from VOC 2012 and SBD (archives or unpacked folders), or from ready-made folders:

    python scripts/prepare_pascal.py --voc VOCtrainval_11-May-2012.tar --sbd benchmark.tgz --out data/pascal
    python scripts/prepare_pascal.py --download --out data/pascal
    python scripts/prepare_pascal.py --masks SegmentationClassAug --images JPEGImages --out data/pascal

Builds OUT/JPEGImages and OUT/SegmentationClassAug (class ids as PNG: VOC's own mask if VOC has one, else SBD's) for the
images of lists/pascal/train.txt (VOC train united with SBD train_noval) and val.txt (VOC val); files of folders are
linked. Then the masks are counted into the class index of each list, and the number of masks that hold 255 is compared
with the published one. After an interruption, run it again: it continues.
"""

import argparse
import contextlib
import gzip
import io
import os
import shlex
import sys
import tarfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
from scipy.io import loadmat

from util.data.class_index import Item, load_class_index, read_list
from util.data.download import download
from util.data.images import encoded_mask
from util.data.pool import on_all_cores
from util.data.published import LISTS, published
from util.errors import UserError, first_of
from util.files import write_bytes
from util.progress import progress

LARGEST = 64 * 2**20
"""bytes; the official images and masks have less than a hundredth of it"""
DOWNLOADS = {
    "voc": (
        "VOCtrainval_11-May-2012.tar",
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "6cd6e144f989b92b3379bac3b3de84fd",
    ),
    "sbd": (
        "benchmark.tgz",
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "82b4d87ceb2ed10f6038a1cba92111cb",
    ),
}
"""file name, address and MD5, as in torchvision"""
NUM_CLASSES = 20


@dataclass(frozen=True)
class Source:
    """VOC or SBD as an archive or a folder, or a ready-made folder. File names are relative to its own root."""

    path: Path
    prefix: str
    """of the names in the archive; a ready-made folder has none"""
    folder: Path | None
    """root of an unpacked source; None for an archive"""

    @classmethod
    def open(cls, path: Path, prefix: str, marker: str) -> "Source":
        """The folder may be the one that the archive was unpacked to, the root itself, or one between."""
        if not path.exists():
            raise UserError(f"{path} does not exist; give the archive or its unpacked folder, or use --download")
        if path.is_file():
            return cls(path, prefix, None)
        for folder in (path / prefix, path / Path(prefix).name, path):
            if (folder / marker).is_dir():
                return cls(path, prefix, folder)
        raise UserError(f"{path} holds no {prefix}{marker}; give the folder that the archive was unpacked to")

    def names(self, folders: Collection[Path]) -> set[str]:
        """Names of the files in ``folders``."""
        if self.folder:
            files = [folder / entry.name for folder in folders for entry in (self.folder / folder).glob("*")]
        else:
            files = [Path(name) for name, _ in self._members(()) if Path(name).parent in folders]
        return {file.as_posix() for file in files}

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the files in ``names``."""
        if self.folder:
            yield from ((name, (self.folder / name).read_bytes()) for name in sorted(names))
        elif names:
            yield from ((name, data) for name, data in self._members(names) if name in names)

    def _members(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Names of the archive's regular files below the prefix; contents of the wanted ones only.

        Nothing is unpacked to a member's own name, so links and names like ``../x`` do no harm.
        """
        try:
            with tarfile.open(self.path) as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if not member.isreg() or not name.startswith(self.prefix):
                        continue
                    name = name.removeprefix(self.prefix)
                    if name in wanted and member.size > LARGEST:
                        raise UserError(f"{self.path} holds {name} of {member.size:,} bytes, which is no image or mask")
                    file = archive.extractfile(member) if name in wanted else None
                    yield name, file.read() if file else b""
        except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
            raise UserError(f"{self.path} is damaged or no tar archive; delete it and download it again") from error


Sources = dict[str, list[tuple[Source, str]]]
"""for 'image' and 'mask' the sources in order of preference, and the name of an id's file there"""


class File(NamedTuple):
    """One file to build, and the file that it is made from."""

    target: Path
    source: Source
    name: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, help="VOCtrainval_11-May-2012.tar, or the folder it was unpacked to")
    parser.add_argument("--sbd", type=Path, help="SBD's benchmark.tgz, or the folder it was unpacked to")
    parser.add_argument("--download", action="store_true", help="fetch what is not given into OUT/downloads (3.4 GB)")
    parser.add_argument("--masks", type=Path, help="instead: a ready-made folder, such as SegmentationClassAug")
    parser.add_argument("--images", type=Path, help="with --masks: the folder of their images, such as JPEGImages")
    parser.add_argument("--out", type=Path, default=Path("data/pascal"), help="the data set's root (data/pascal)")
    parser.add_argument("--lists", type=Path, default=Path("lists/pascal"), help="the lists' folder (lists/pascal)")
    parser.add_argument(
        "--train-list",
        choices=("noval", "aug"),
        default="noval",
        help="aug: also for train_aug.txt, the 10582 images of VOC train and all of SBD without VOC val",
    )
    args = parser.parse_args()
    aug = args.train_list == "aug"
    try:
        prepare(find_sources(args), args.out, args.lists, ["train", "val"] + ["train_aug"] * aug)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{error.filename or args.out}: {reason}; check path, permissions and free space") from error
    overrides = [f"data.root={args.out}"] if args.out != parser.get_default("out") else []
    if aug or args.lists != parser.get_default("lists"):
        train = "train_aug.txt" if aug else "train.txt"
        overrides += [f"data.train_list={args.lists / train}", f"data.val_list={args.lists / 'val.txt'}"]
    command = "python scripts/check_data.py --config configs/pascal/resnet50_fold0_1shot.yaml"
    print("next:", command, *map(shlex.quote, overrides))


def find_sources(args: argparse.Namespace) -> Sources:
    """The sources that the command line names."""
    if args.masks or args.images:
        if not (args.masks and args.images) or args.voc or args.sbd or args.download:
            raise UserError("--masks and --images go together, and without --voc, --sbd and --download")
        for folder in (args.masks, args.images):
            if not folder.is_dir():
                raise UserError(f"{folder} is no folder; give --masks and --images, one of ID.png and one of ID.jpg")
        images, masks = (Source(folder.absolute(), "", folder.absolute()) for folder in (args.images, args.masks))
        return {"image": [(images, "{}.jpg")], "mask": [(masks, "{}.png")]}
    if not args.download and None in (args.voc, args.sbd):
        raise UserError(
            "give --voc and --sbd, archives or unpacked folders, or --masks and --images, ready-made folders, or"
            " --download to fetch what is not given"
        )
    paths = {"voc": args.voc, "sbd": args.sbd}
    for kind, (name, url, md5) in DOWNLOADS.items():
        if paths[kind] is None:
            paths[kind] = args.out / "downloads" / name
            download(url, paths[kind], md5)
    voc = Source.open(paths["voc"], "VOCdevkit/VOC2012/", marker="JPEGImages")
    sbd = Source.open(paths["sbd"], "benchmark_RELEASE/dataset/", marker="cls")
    return {
        "image": [(voc, "JPEGImages/{}.jpg"), (sbd, "img/{}.jpg")],
        "mask": [(voc, "SegmentationClass/{}.png"), (sbd, "cls/{}.mat")],
    }


def prepare(sources: Sources, out: Path, list_folder: Path, titles: list[str]) -> None:
    """Build the files of the lists from the sources, write the lists, and check the masks."""
    lists = {title: read_list(LISTS / f"pascal/{title}.txt", out) for title in titles}
    files = find_files(sources, [item for items in lists.values() for item in items])
    for folder in {file.target.parent for file in files} | {list_folder}:
        folder.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if not file.target.exists()]
    build(missing)
    print(f"{out}: {len(missing)} files built, {len(files) - len(missing)} were there")
    for title, items in lists.items():
        path, text = list_folder / f"{title}.txt", (LISTS / f"pascal/{title}.txt").read_bytes()
        if not path.is_file() or path.read_bytes() != text:
            write_bytes(path, text)
        check_border(path, out, items)


def find_files(sources: Sources, items: list[Item]) -> list[File]:
    """The files to build for the items' images and masks; a UserError if the sources lack one."""
    pairs = [pair for kind in sources.values() for pair in kind]
    names = dict[Source, set[str]]()
    for source in dict.fromkeys(source for source, _ in pairs):
        print(f"reading {source.path}", flush=True)
        names[source] = source.names({Path(name).parent for other, name in pairs if other == source})
    files: list[File] = []
    for kind, candidates in sources.items():
        absent = []
        for target in sorted({getattr(item, kind) for item in items}):
            found = [File(target, source, name.format(target.stem)) for source, name in candidates]
            found = [file for file in found if file.name in names[file.source]]
            files += found[:1]
            absent += [] if found else [target.stem]
        if absent:
            searched = " and ".join(str(source.path) for source, _ in candidates)
            ids = first_of(absent, separator=", ")
            raise UserError(f"{searched} lack the {kind} of {ids}; download or unpack them again")
    return files


def check_border(list_path: Path, root: Path, items: tuple[Item, ...]) -> None:
    """Count the masks of a list into its class index; a UserError if another number than published hold 255."""
    ignored = int((load_class_index(list_path, root, NUM_CLASSES).ignored > 0).sum())
    official = published(items)
    title = official.title if official else "unknown"
    print(f"{list_path}: {len(items)} lines, {title}; {ignored} masks hold 255")
    if official and official.ignored != ignored:
        raise UserError(
            f"{ignored} masks of {list_path} hold 255, of the published ones {official.ignored}: they are different, or"
            f" have lost VOC's ignored border, which costs points; move {items[0].mask.parent} away and build the masks"
            " from the official archives (--voc, --sbd)"
        )


def build(files: list[File]) -> None:
    """Build files that do not exist yet."""
    matrices: list[tuple[bytes, Path, str]] = []
    with progress(desc="building", total=len(files), unit="file", disable=not files) as bar:
        for source in dict.fromkeys(file.source for file in files):
            targets = {file.name: file.target for file in files if file.source == source}
            if source.folder:
                for name in [name for name in targets if not name.endswith(".mat")]:
                    link(source.folder / name, targets.pop(name))
                    bar.update()
            for name, data in source.read(targets):
                if name.endswith(".mat"):
                    matrices.append((data, targets[name], f"{source.path}: {name}"))
                else:
                    write_bytes(targets[name], data, force=False)
                bar.update()
    on_all_cores(write_mask, matrices, "converting masks", unit="mask")


def link(source: Path, target: Path) -> None:
    """Hard link, else symbolic link, else copy."""
    target.unlink(missing_ok=True)  # a symbolic link to a folder that was moved
    for make_link in (os.link, os.symlink):
        with contextlib.suppress(OSError):
            make_link(source.resolve(), target)
            return
    write_bytes(target, source.read_bytes(), force=False)


def write_mask(matrix: tuple[bytes, Path, str]) -> None:
    """Write the mask of one of SBD's .mat files: its content, the target, and its name for messages."""
    data, target, origin = matrix
    try:
        ids = np.asarray(loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0][0])
        if ids.ndim != 2 or ids.dtype != np.uint8 or ids.max() > NUM_CLASSES:
            raise ValueError(f"{ids.dtype} of shape {ids.shape}, want (H, W) uint8 up to {NUM_CLASSES}")
    except Exception as error:  # SciPy raises many kinds for a damaged file
        raise UserError(f"{origin} is damaged ({' '.join(str(error).split())}); download or unpack it again") from error
    write_bytes(target, encoded_mask(ids), force=False)


if __name__ == "__main__":
    run_command(main)
