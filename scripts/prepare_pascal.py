"""Prepare PASCAL-5i from VOC 2012 and SBD (archives or unpacked folders), or from ready-made folders:

    python scripts/prepare_pascal.py --voc VOCtrainval_11-May-2012.tar --sbd benchmark.tgz --out data/pascal
    python scripts/prepare_pascal.py --download --out data/pascal
    python scripts/prepare_pascal.py --masks SegmentationClassAug --images JPEGImages --out data/pascal

Builds OUT/JPEGImages and OUT/SegmentationClassAug (class ids as PNG: VOC's own mask if VOC has one, else SBD's) for the
images of lists/pascal/train.txt (VOC train united with SBD train_noval) and val.txt (VOC val); files of folders are
linked, or copied if the file system has no links. After an interruption, run it again: it continues.
scripts/check_data.py then checks the result.
"""

import argparse
import io
import shlex
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import numpy as np
from scipy.io import loadmat

from util.data.class_index import read_list
from util.data.download import download
from util.data.images import encoded_mask
from util.data.pool import on_all_cores
from util.data.published import LISTS
from util.errors import UserError, first_of
from util.files import link_or_copy, write_bytes
from util.progress import progress

DOWNLOADS = {
    "voc": (
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "6cd6e144f989b92b3379bac3b3de84fd",
    ),
    "sbd": (
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "82b4d87ceb2ed10f6038a1cba92111cb",
    ),
}
"""address and MD5, as in torchvision"""


class Source(NamedTuple):
    """VOC or SBD as an archive or an unpacked folder, or a ready-made folder."""

    path: Path
    prefix: str  # of the names in an archive
    names: dict[str, str]
    """for JPEGImages and SegmentationClassAug, the name of an id's file below the prefix or in the folder"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, help="VOCtrainval_11-May-2012.tar, or the folder it was unpacked to")
    parser.add_argument("--sbd", type=Path, help="SBD's benchmark.tgz, or the folder it was unpacked to")
    parser.add_argument("--download", action="store_true", help="fetch what is not given into OUT/downloads (3.4 GB)")
    parser.add_argument("--masks", type=Path, help="instead: a ready-made folder, such as SegmentationClassAug")
    parser.add_argument("--images", type=Path, help="with --masks: the folder of their images, such as JPEGImages")
    parser.add_argument("--out", type=Path, default=Path("data/pascal"), help="the data set's root (data/pascal)")
    parser.add_argument("--aug", action="store_true", help="also train_aug.txt: VOC train and all of SBD but VOC val")
    args = parser.parse_args()
    prepare(find_sources(args), args.out, ["train", "val"] + ["train_aug"] * args.aug)
    overrides = [f"data.root={args.out}"] if args.out != parser.get_default("out") else []
    overrides += ["data.train_list=lists/pascal/train_aug.txt"] if args.aug else []
    command = "python scripts/check_data.py --config configs/pascal/resnet50_fold0_1shot.yaml"
    print("next:", command, *map(shlex.quote, overrides))


def find_sources(args: argparse.Namespace) -> list[Source]:
    """The sources that the command line names; the first that has a file is used."""
    if args.masks and args.images:
        return [
            Source(args.images, "", {"JPEGImages": "{}.jpg"}),
            Source(args.masks, "", {"SegmentationClassAug": "{}.png"}),
        ]
    if not args.download and None in (args.voc, args.sbd):
        raise UserError(
            "give --voc and --sbd, archives or unpacked folders, or --masks and --images, ready-made folders, or"
            " --download to fetch what is not given"
        )
    paths = {"voc": args.voc, "sbd": args.sbd}
    for kind, (url, md5) in DOWNLOADS.items():
        if paths[kind] is None:
            paths[kind] = args.out / "downloads" / Path(url).name
            download(url, paths[kind], md5)
    voc = {"JPEGImages": "JPEGImages/{}.jpg", "SegmentationClassAug": "SegmentationClass/{}.png"}
    sbd = {"JPEGImages": "img/{}.jpg", "SegmentationClassAug": "cls/{}.mat"}
    return [
        find_root(Source(paths["voc"], "VOCdevkit/VOC2012/", voc), "JPEGImages"),
        find_root(Source(paths["sbd"], "benchmark_RELEASE/dataset/", sbd), "cls"),
    ]


def find_root(source: Source, marker: str) -> Source:
    """The source itself if it is an archive, else with the folder below its path that holds the files."""
    path, prefix, names = source
    if zipfile.is_zipfile(path):
        raise UserError(f"{path} is a zip archive; unzip it and give the folder")
    if path.is_file():
        return source
    for place in (prefix, f"{Path(prefix).name}/", "", "*/", "*/*/"):  # the last ones: Kaggle's zip
        for found in path.glob(f"{place}{marker}"):
            return Source(found.parent, prefix, names)
    raise UserError(f"{path} is no archive and holds no {prefix}{marker}; give the archive or the unpacked folder")


def prepare(sources: list[Source], out: Path, titles: list[str]) -> None:
    """Build the files of the lists that do not exist yet."""
    items = [item for title in titles for item in read_list(LISTS / f"pascal/{title}.txt", out)]
    files = sorted({path for item in items for path in (item.image, item.mask)})
    absent = [file for file in files if not file.exists()]
    print(f"{out}: {len(files) - len(absent)} of {len(files)} files exist", flush=True)
    for source in sources:
        build(source, [file for file in absent if not file.exists()])
    if lacking := [str(file.relative_to(out)) for file in absent if not file.exists()]:
        raise UserError(
            f"{' and '.join(str(source.path) for source in sources)} lack {first_of(lacking, separator=', ')};"
            " download or unpack them again"
        )


def build(source: Source, targets: list[Path]) -> None:
    """Build the target files that the source has."""
    kinds = source.names
    by_name = {kinds[file.parent.name].format(file.stem): file for file in targets if file.parent.name in kinds}
    matrices: list[tuple[bytes, Path]] = []
    with progress(desc=f"reading {source.path.name}", total=len(by_name), unit="file", disable=not by_name) as bar:
        for name, content in read(source, by_name):
            target = by_name[name]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # a symbolic link to a folder that was moved
            if name.endswith(".mat"):
                matrices.append((content.read_bytes() if isinstance(content, Path) else content, target))
            elif isinstance(content, Path):
                link_or_copy(content, target)
            else:
                write_bytes(target, content, force=False)
            bar.update()
    on_all_cores(write_mask, matrices, "converting masks", unit="mask")


def read(source: Source, names: Collection[str]) -> Iterator[tuple[str, Path | bytes]]:
    """Name and path or content of each file in ``names`` that the source has. Nothing is unpacked to its own name."""
    if source.path.is_dir():
        yield from ((name, source.path / name) for name in names if (source.path / name).exists())
        return
    try:
        with tarfile.open(source.path) as archive:
            for member in archive if names else ():
                name = member.name.removeprefix("./").removeprefix(source.prefix)
                if name in names and (file := archive.extractfile(member) if member.isreg() else None):
                    yield name, file.read()
    except (EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{source.path} is damaged or no tar archive; delete it and download it again") from error


def write_mask(matrix: tuple[bytes, Path]) -> None:
    """Write the mask of one of SBD's .mat files: its content and the target."""
    data, target = matrix
    try:
        ids = np.asarray(loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0][0])
    except Exception as error:  # SciPy raises many kinds for a damaged file
        raise UserError(f"SBD's {target.stem}.mat is damaged ({error}); download or unpack it again") from error
    write_bytes(target, encoded_mask(ids), force=False)


if __name__ == "__main__":
    run_command(main)
