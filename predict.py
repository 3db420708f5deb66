"""Segment your own images from a few supports, with a checkpoint or without one.

    python predict.py --example --out out/                    # draws an example into out/ first: it needs no images
    python predict.py --support cat.jpg --mask cat.png --query photos/ --out out/
    python predict.py --support s1.jpg s2.jpg --mask m1.png m2.png --query a.jpg b.jpg --out out/ --checkpoint best.pt
    python predict.py --targets targets.yaml --query folder/ --out out/ --checkpoint runs/.../best.pt

A mask is white on black (or 0 and 1), or the alpha of an image, or holds class ids (palette indices or grey) with
--class-id. Instead of masks, give --box x0,y0,x1,y1 around the object in each support. EXIF orientation is applied to
images and masks. Without a checkpoint, --not shows what the target is not (--not-mask or --not-box says where), in the
supports themselves or other images. Folders are searched with their subfolders, hidden files left out. For each query,
NAME_mask.png (0 and 255) and NAME_overlay.jpg are written, and for all, the surest first, results.csv and results.json:
the presence, in [0, 1], says how sure it is that the target is in the image; below 0.5 it probably is not.

Without a checkpoint this is training-free segmentation: ours and not the paper's network. It uses the features of a
frozen ImageNet backbone (model/training_free.py) and OpenCV's GrabCut for the edges.

targets.yaml names several targets; its paths are relative to it:

    dog: {supports: [a.jpg, b.jpg], masks: [a.png, b.png], class_id: 3}     # class_id only for masks of class ids
    cat: {supports: [c.jpg], masks: [c.png]}

Then NAME_labels.png is a palette image: 0 background and 1, 2, ... the targets in this order (labels.json).
"""

from util.command import run_command

import argparse
import errno
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from util.engine.metrics import mask_iou
from util.errors import UserError, first_of
from util.files import write_csv, write_json
from util.photos.example import write_example
from util.photos.images import read_mask_on, read_upright
from util.photos.inputs import (
    TargetFiles,
    encode_target,
    find_ground_truths,
    find_images,
    parse_box,
    read_targets,
    write_masks_of_boxes,
)
from util.photos.outputs import draw, draw_labels, write_outputs
from util.photos.segmenter import Segmenter, add_segmenter_arguments, load_segmenter
from util.progress import progress

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no other query could be written either


def main() -> None:
    args = parse_arguments()
    if args.example:
        support, mask, args.query = write_example(args.out)
        args.support, args.mask = [support], [mask]
        shown = " ".join(map(str, args.query))
        print(f"this is --support {support} --mask {mask} --query {shown} --out {args.out}")
    queries = find_images(args.query, None if args.example else args.out)
    ground_truths = find_ground_truths(args.ground_truth, queries) if args.ground_truth else {}
    if args.targets:
        files = read_targets(args.targets)
    else:
        masks = args.mask or write_masks_of_boxes(args.support, args.box, args.out)
        files = {"": TargetFiles(supports=args.support, masks=masks, class_id=args.class_id)}
    segmenter = load_segmenter(args)
    print(segmenter.about)
    targets = {name: encode_target(segmenter, target) for name, target in files.items()}
    if args.others:
        masks = args.not_mask or write_masks_of_boxes(args.others, args.not_box, args.out, "--not-box")
        others = TargetFiles(supports=args.others, masks=masks, class_id=args.not_class_id)
        targets[""] += encode_target(segmenter, others, negative=True)
    if args.targets:
        write_json(args.out / "labels.json", {str(n): name for n, name in enumerate(["background", *targets])})
    rows, failed = list[dict[str, Any]](), 0
    with progress(total=len(queries), unit="image") as bar:
        for name, path in queries.items():
            try:
                rows += segment_query(segmenter, targets, name, path, ground_truths.get(name), args)
            except (UserError, OSError) as error:  # OSError: the results' names are too long, for example
                if len(queries) == 1 or getattr(error, "errno", None) in NO_ROOM:
                    raise
                failed += 1
                why = error if isinstance(error, UserError) else f"cannot write results of {path}: {error.strerror}"
                bar.write(f"failed: {why}", sys.stderr)
            bar.update()
    sum_up(rows, failed, len(queries), args)


def segment_query(
    segmenter: Segmenter,
    targets: dict[str, list[Any]],
    name: str,
    path: Path,
    truth: Path | None,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Segment one query and write its files; return a row of the results for each target."""
    image = read_upright(path)
    ground_truth = None if truth is None else read_mask_on(image, truth, args.class_id, may_be_empty=True)
    query = segmenter.encode_query(image.pixels)
    found = {
        target: segmenter.segment_encoded(encoded, query, threshold=args.threshold, edges=args.edges)
        for target, encoded in targets.items()
    }
    if args.targets:
        write_outputs(args.out, name, draw_labels(found, image.pixels))
    else:
        write_outputs(args.out, name, draw(found[""], image.pixels, maps=args.maps, cutout=args.cutout))
    rows = []
    for target, one in found.items():
        row = {"query": name, **({"target": target} if target else {}), "presence": round(one.presence, 4)}
        row |= {"share": round(float(one.mask.mean()), 6)}
        rows.append(row if ground_truth is None else row | {"iou": 100 * mask_iou(one.mask, ground_truth)})
    return rows


def sum_up(rows: list[dict[str, Any]], failed: int, count: int, args: argparse.Namespace) -> None:
    """Write results.json and results.csv, the surest first, and say what was found."""
    empty = [row["query"] for row in rows if not row["share"]]
    absent = [f"{row.get('target', 'it')} in {row['query']}" for row in rows if row["presence"] < 0.5]
    if rows:
        rows.sort(key=lambda row: -row["presence"])
        ious = [row["iou"] for row in rows if "iou" in row]
        write_json(args.out / "results.json", {"mean_iou": fmean(ious) if ious else None, "queries": rows})
        write_csv(args.out / "results.csv", rows)
        if ious:
            print(f"mean IoU of {len(ious)} queries: {fmean(ious):.1f}")
    if absent:
        print(f"probably not there, {len(absent)} of {len(rows)}: {first_of(absent, 3, ', ')} (results.csv has all)")
    if empty:
        print(
            f"nothing found in {len(empty)} of {count} images ({first_of(empty, 3, ', ')}); try a lower --threshold,"
            " --maps to see what the segmenter sees, or supports more like these images"
        )
    if failed:
        raise UserError(f"{failed} of {count} queries failed, named above; the others are done, in {args.out}")
    print(f"results: {args.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_segmenter_arguments(parser)
    target = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--support", type=Path, nargs="+", help="images that show the target")
    target("--mask", type=Path, nargs="+", help="where the target is, one for each support")
    target("--box", type=parse_box, nargs="+", metavar="BOX", help="x0,y0,x1,y1 around the target, instead of --mask")
    target("--targets", type=Path, metavar="YAML", help="several targets, instead of --support and --mask")
    add("--not", type=Path, nargs="+", metavar="IMAGE", dest="others", help="images that show what the target is not")
    other = parser.add_mutually_exclusive_group().add_argument
    other("--not-mask", type=Path, nargs="+", metavar="MASK", help="where that is, one for each")
    other("--not-box", type=parse_box, nargs="+", metavar="BOX", help="the same as boxes")
    add("--not-class-id", type=int, help="its value in masks of class ids")
    add("--class-id", type=int, help="value of the target in masks of class ids; 255 is ignored")
    target("--example", action="store_true", help="draw a support, its mask and two queries into --out, and take them")
    add("--query", type=Path, nargs="+", help="images, and folders of images")
    add("--out", type=Path, required=True, help="folder for the results; files of the same names are replaced")
    add("--threshold", type=float, help="of the probability; by default the segmenter's own")
    edges = "draw borders along the image's edges (GrabCut); by default only without a checkpoint"
    add("--edges", action=argparse.BooleanOptionalAction, help=edges)
    add("--maps", action="store_true", help="also NAME_{probability,prior,bg,distractor}.png, grey")
    add("--cutout", action="store_true", help="also NAME_cutout.png, transparent but for the target")
    add("--ground-truth", type=Path, help="mask, or folder of masks named like the queries: IoU in the results")
    args = parser.parse_args()
    args.edges = args.checkpoint is None if args.edges is None else args.edges
    alone = (args.support, args.class_id, args.others, args.maps, args.cutout, args.ground_truth)
    if args.targets and any(alone):
        raise UserError("--targets excludes --support, --class-id, --not, --maps, --cutout and --ground-truth")
    if (args.others is None) != (args.not_mask is None and args.not_box is None):
        raise UserError("--not goes with --not-mask or --not-box")
    if not args.targets and not args.support and not args.example:
        raise UserError("--mask and --box need --support")
    if bool(args.query) == args.example or (args.example and args.support):
        raise UserError("--query says which images to search; --example brings its own, and its own support")
    if args.threshold is not None and not 0 < args.threshold < 1:
        raise UserError(f"--threshold must lie between 0 and 1, got {args.threshold:g}")
    return args


if __name__ == "__main__":
    run_command(main)
