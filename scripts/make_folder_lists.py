"""Lists for a data set of one folder a class, such as FSS-1000.

    python scripts/make_folder_lists.py --root data/fss --out lists/fss

ROOT holds a folder for each class, named as the class, and a folder holds pictures with their masks: 1.jpg with 1.png
and so on. A mask is black and white, the class in white (util/data/readers.py: read_binary_mask). Written are

  OUT/classes.txt                    all classes, in the order of their ids
  OUT/{train,val,test}_classes.txt   which of them are trained on, validate and test
  OUT/train.txt                      'image mask' lines of the classes that are trained on
  OUT/val.txt                        those of the other classes

Of the classes 24 % test and 24 % validate, drawn by --seed. Where OUT holds test_classes.txt or val_classes.txt
already, as lists/fss holds the published test classes, these classes are taken. What a config must say is printed.
"""

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.command import run_command

import yaml

from util.data.images import FORMATS
from util.errors import UserError, first_of
from util.files import require_writable, write_text

SHARE = 0.24
"""share of the classes that test, and share of those that validate"""
PHOTOS = tuple(suffix for kind, suffixes in FORMATS.items() if kind != "PNG" for suffix in suffixes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root", type=Path, required=True, help="folder of the classes' folders; data.root of the config"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the lists")
    parser.add_argument("--seed", type=int, default=0, help="of the split of the classes")
    args = parser.parse_args()
    lines = find_lines(args.root)
    chosen = split(sorted(lines), args.out, args.seed)
    names = {"classes": sorted(lines)} | {f"{part}_classes": sorted(chosen[part]) for part in ("train", "val", "test")}
    pictures = {
        "train": [line for name in names["train_classes"] for line in lines[name]],
        "val": [line for name in sorted(chosen["val"] | chosen["test"]) for line in lines[name]],
    }
    paths = {title: args.out / f"{title}.txt" for title in names | pictures}
    for path in paths.values():
        require_writable(path, ".txt")
    for title, rows in (names | pictures).items():
        write_text(paths[title], "".join(f"{row}\n" for row in rows))
        print(f"{len(rows):7,}  {paths[title]}")
    data = {
        "root": str(args.root),
        **{f"{title}_list": str(paths[title]) for title in pictures},
        "reader": "class_folders",
        "classes": str(paths["classes"]),
        "base_classes": str(paths["train_classes"]),
        "folds": [str(paths["val_classes"]), str(paths["test_classes"])],
    }
    print(
        f"\nfor a config such as configs/base/fss.yaml:\n\n{yaml.safe_dump({'data': data}, sort_keys=False).rstrip()}"
    )


def find_lines(root: Path) -> dict[str, list[str]]:
    """Find the 'image mask' lines of each class, relative to ``root``, by the class's name.

    Raises:
        UserError: ``root`` is no folder or holds fewer than 3 classes, a picture has no mask, or a name has a space.
    """
    if not root.is_dir():
        raise UserError(f"folder {root} does not exist")
    lines: dict[str, list[str]] = {}
    bare = []
    for image in sorted(path for path in root.glob("*/*") if path.suffix.lower() in PHOTOS):
        mask = image.with_suffix(".png")
        if not mask.exists():
            bare.append(str(image))
        name = f"{image.relative_to(root).as_posix()} {mask.relative_to(root).as_posix()}"
        if len(name.split()) != 2 or not name.isprintable():
            raise UserError(f"{image} has a space or an unprintable character in its name; rename it")
        lines.setdefault(image.parent.name, []).append(name)
    if bare:
        raise UserError(f"these pictures have no mask, of the same name with .png: {first_of(bare, separator=', ')}")
    if len(lines) < 3:
        raise UserError(
            f"{root} holds {len(lines)} folders with pictures ({', '.join(PHOTOS)}); there must be 3 classes"
        )
    return lines


def split(names: list[str], out: Path, seed: int) -> dict[str, set[str]]:
    """Split the classes into 'train', 'val' and 'test': as files in ``out`` say, the others drawn by the seed.

    Raises:
        UserError: such a file names a class that has no folder, or the files leave no class to train on.
    """
    chosen: dict[str, set[str]] = {}
    for part in ("test", "val"):
        path = out / f"{part}_classes.txt"
        if path.exists():
            chosen[part] = set(path.read_text(encoding="utf-8").split())
            if unknown := sorted(chosen[part].difference(names)):
                raise UserError(f"{path} names classes without a folder: {first_of(unknown, separator=', ')}")
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    for part in ("test", "val"):
        left = [name for name in drawn if not any(name in taken for taken in chosen.values())]
        chosen.setdefault(part, set(left[: max(1, round(SHARE * len(names)))]))
    chosen["train"] = set(names) - chosen["test"] - chosen["val"]
    if not chosen["train"] or chosen["test"] & chosen["val"]:
        raise UserError(f"the classes in {out} leave none to train on, or validate and test on the same; correct them")
    return chosen


if __name__ == "__main__":
    run_command(main)
