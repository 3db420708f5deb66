"""Prepare PASCAL-5i from VOC 2012 and SBD, archives or unpacked folders, or from ready-made folders:

    python scripts/prepare_pascal.py --voc VOCtrainval_11-May-2012.tar --sbd benchmark.tgz --out data/pascal
    python scripts/prepare_pascal.py --download --out data/pascal
    python scripts/prepare_pascal.py --masks SegmentationClassAug --images JPEGImages --out data/pascal

Builds OUT/JPEGImages and OUT/SegmentationClassAug (class ids as PNG: VOC's own mask where VOC has one, else SBD's) for
the images of lists/pascal/train.txt (VOC train united with SBD train_noval) and val.txt (VOC val); ready-made folders
are linked. Then the masks are counted into the class index of each list, and those that hold 255 are compared with the
published number. Run it again after an interruption: it goes on where it stood.
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
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
from PIL import Image
from scipy.io import loadmat

from util.data.class_index import load_class_index, read_list
from util.data.download import download
from util.data.images import compare_checksums, encoded, read_class_ids, read_image
from util.data.pool import on_all_cores
from util.data.published import LISTS, published
from util.data.synthetic import voc_palette
from util.errors import UserError, first_of
from util.files import write_bytes
from util.progress import progress

LARGEST = 64 * 2**20
"""a photo or mask of more bytes is refused; the official ones have less than a hundredth of it"""
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
}
"""file name, official place, where torchvision finds it today, MD5 (torchvision's)"""

NUM_CLASSES = 20


@dataclass(frozen=True)
class Source:
    """VOC or SBD, an archive or a folder, or a ready-made folder. Its files go by their names below its own root."""

    path: Path
    prefix: str
    """what the names in the archive begin with; a ready-made folder has none"""
    folder: Path | None
    """the root of an unpacked one; None for an archive"""

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

    def names(self, folders: Collection[Path]) -> set[str]:
        """Of the files in ``folders``."""
        if self.folder:
            files = [folder / entry.name for folder in folders for entry in (self.folder / folder).glob("*")]
        else:
            files = [Path(name) for name, _ in self._members(()) if Path(name).parent in folders]
        return {file.as_posix() for file in files}

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


Sources = dict[str, list[tuple[Source, str]]]
"""the places where an image and a mask may lie, best first: a source, and the name there for an id"""


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
        raise UserError(
            f"{error.filename or args.out}: {error.strerror or error}; check path, rights and free space"
        ) from error
    overrides = [f"data.root={args.out}"] if args.out != parser.get_default("out") else []
    if aug or args.lists != parser.get_default("lists"):
        train = "train_aug.txt" if aug else "train.txt"
        overrides += [f"data.train_list={args.lists / train}", f"data.val_list={args.lists / 'val.txt'}"]
    command = "python scripts/check_data.py --config configs/pascal/resnet50_fold0_1shot.yaml"
    print("next:", command, *map(shlex.quote, overrides))


def find_sources(args: argparse.Namespace) -> Sources:
    """What the command line names."""
    if args.masks or args.images:
        if not (args.masks and args.images) or args.voc or args.sbd or args.download:
            raise UserError("--masks and --images go together, and without --voc, --sbd and --download")
        for folder in (args.masks, args.images):
            if not folder.is_dir():
                raise UserError(f"{folder} is no folder; give --masks and --images, one of ID.png and one of ID.jpg")
        images, masks = (Source(folder.absolute(), "", folder.absolute()) for folder in (args.images, args.masks))
        return {"image": [(images, "{}.jpg")], "mask": [(masks, "{}.png")]}
    voc_path, sbd_path = (
        getattr(args, kind) or (fetched(kind, args.out) if args.download else None) for kind in ("voc", "sbd")
    )
    if voc_path is None or sbd_path is None:
        raise UserError(
            "give --voc and --sbd, archives or unpacked folders, or --masks and --images, ready-made folders, or"
            " --download to fetch what is not given"
        )
    voc = Source.open(voc_path, "VOCdevkit/VOC2012/", marker="JPEGImages")
    sbd = Source.open(sbd_path, "benchmark_RELEASE/dataset/", marker="cls")
    return {
        "image": [(voc, "JPEGImages/{}.jpg"), (sbd, "img/{}.jpg")],
        "mask": [(voc, "SegmentationClass/{}.png"), (sbd, "cls/{}.mat")],
    }


def prepare(sources: Sources, out: Path, list_folder: Path, titles: list[str]) -> None:
    """The whole way from the sources to files that are as published."""
    places = [place for kind in sources.values() for place in kind]
    names = dict[Source, set[str]]()
    for source in dict.fromkeys(source for source, _ in places):
        print(f"reading {source.path}", flush=True)
        names[source] = source.names({Path(name).parent for of, name in places if of == source})
    lists = {title: read_list(LISTS / f"pascal/{title}.txt", out) for title in titles}
    files: list[File] = []
    for kind, candidates in sources.items():
        absent = []
        for target in sorted({getattr(item, kind) for items in lists.values() for item in items}):
            there = [File(target, source, name.format(target.stem)) for source, name in candidates]
            there = [file for file in there if file.name in names[file.source]]
            files += there[:1]
            absent += [] if there else [target.stem]
        if absent:
            where = " and ".join(str(source.path) for source, _ in candidates)
            raise UserError(
                f"{where} lack the {kind} of {first_of(absent, separator=', ')}; not whole, fetch or unpack them again"
            )

    for folder in {file.target.parent for file in files} | {list_folder}:
        folder.mkdir(parents=True, exist_ok=True)
    built = build(files)
    for kind, suffix in (("images", ".jpg"), ("masks", ".png")):
        own = Counter(file.source.path for file in files if file.target.suffix == suffix)
        print(f"{kind:<12}{own.total():>6}  {', '.join(f'{count} from {path}' for path, count in own.items())}")
    print(f"{'files built':<12}{built:>6}  {len(files) - built} were there, in {out}")
    for title, items in lists.items():
        path, text = list_folder / f"{title}.txt", (LISTS / f"pascal/{title}.txt").read_bytes()
        if not path.is_file() or path.read_bytes() != text:
            write_bytes(path, text)
        known, ignored = published(items), int((load_class_index(path, out, NUM_CLASSES).ignored > 0).sum())
        print(f"{'list':<12}{len(items):>6}  {path}: {known.title if known else 'unknown'}; {ignored} masks hold 255")
        if known and known.ignored not in (None, ignored):
            raise UserError(
                f"{ignored} masks of {path} hold 255, of the published ones {known.ignored}: they are others, or have"
                f" lost VOC's ignored border, which costs points; move {items[0].mask.parent} away and build the masks"
                " from the official archives (--voc, --sbd)"
            )


def fetched(kind: str, out: Path) -> Path:
    """A file of ``DOWNLOADS``, from the first of its places that gives it."""
    name, *urls, md5 = DOWNLOADS[kind]
    path = out / "downloads" / name
    *first, last = urls
    for url in first:
        with contextlib.suppress(UserError):
            download(url, path, md5)
            return path
    download(last, path, md5)
    return path


class RawMask(NamedTuple):
    """A mask as its source has it."""

    data: bytes
    target: Path
    origin: str
    """names the source in messages"""


def build(files: list[File]) -> int:
    """Build the files that are not there or cannot be read; how many those were."""
    there = [file.target for file in files if file.target.exists()]
    sound = on_all_cores(is_good, there, "checking what is there", unit="file")
    good = {path for path, fine in zip(there, sound, strict=True) if fine}
    todo = [file for file in files if file.target not in good]
    masks: list[RawMask] = []
    with progress(desc="building", total=len(todo), unit="file", disable=not todo) as bar:
        for source in dict.fromkeys(file.source for file in todo):
            targets = {file.name: file.target for file in todo if file.source == source}
            if source.folder:
                for name in [name for name in targets if name.endswith(".jpg") or not source.prefix]:
                    link(source.folder / name, targets.pop(name))
                    bar.update()
            for name, data in source.read(targets):
                if name.endswith(".jpg"):
                    write_bytes(targets[name], data, force=False)
                else:
                    masks.append(RawMask(data, targets[name], f"{source.path}: {name}"))
                bar.update()
    on_all_cores(write_mask, masks, "converting masks", unit="mask")
    return len(todo)


def is_good(path: Path) -> bool:
    """Whether a picture or mask can be read to its end."""
    try:
        read_class_ids(path) if path.suffix == ".png" else read_image(path)
    except UserError:
        return False
    return True


def link(source: Path, target: Path) -> None:
    """Hard link, else symbolic link, else copy; ``target`` is never missing in between."""
    if target.exists() and target.samefile(source):
        if is_good(target):
            return  # another preparation has linked it meanwhile
        raise UserError(f"{source} is damaged; unpack it again")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    for make_link in (os.link, os.symlink):
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
            make_link(source.resolve(), temporary)
            temporary.replace(target)
            temporary.unlink(missing_ok=True)  # it stays where both were one file already
            return
    write_bytes(target, source.read_bytes(), force=False)


def write_mask(mask: RawMask) -> None:
    """Write VOC's PNG byte for byte, or SBD's GTcls with VOC's palette."""
    data, target, origin = mask
    try:
        if target.suffix != Path(origin).suffix:
            ids = np.asarray(loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0][0])
            if ids.ndim != 2 or ids.dtype != np.uint8 or ids.max() > NUM_CLASSES:
                raise ValueError(f"{ids.dtype} of shape {ids.shape}, want (H, W) uint8 up to {NUM_CLASSES}")
            picture = Image.fromarray(ids)
            picture.putpalette(voc_palette())
            data = encoded(picture, "PNG")
        else:
            compare_checksums(data)
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                image.load()
                if image.mode != "P":
                    raise ValueError(f"mode {image.mode}, want a palette")
    except Exception as error:  # SciPy and Pillow raise many kinds for a damaged file
        raise UserError(f"{origin} is damaged ({' '.join(str(error).split())}); fetch or unpack it again") from error
    write_bytes(target, data, force=False)


if __name__ == "__main__":
    run_command(main)
