"""Segment your own images from a few supports, with a checkpoint or without one.

    python predict.py --support cat.jpg --mask cat.png --query photos/ --out out/
    python predict.py --support s1.jpg s2.jpg --mask m1.png m2.png --query a.jpg b.jpg --out out/ --checkpoint best.pt
    python predict.py --targets targets.yaml --query folder/ --out out/ --checkpoint runs/.../best.pt

A mask holds 0 and 1, 0 and 255, the alpha of an image, or class ids (palette or greyscale) with --class-id. Instead of
masks, give --box x0,y0,x1,y1 around the object in each support. EXIF orientation is applied to images and masks.
Folders are searched with their subfolders. For each query, NAME_mask.png (0 and 255) and NAME_overlay.jpg are written.
Finished queries are left as they are. If a query cannot be read, the others are done and the exit code is 2.

Without a checkpoint this is training-free segmentation: ours and not the paper's network. It uses the features of a
frozen ImageNet backbone (model/training_free.py) and OpenCV's GrabCut for the edges.

targets.yaml names several targets; its paths are relative to it:

    dog: {supports: [a.jpg, b.jpg], masks: [a.png, b.png], class_id: 3}     # class_id only for masks of class ids
    cat: {supports: [c.jpg], masks: [c.png]}

Then NAME_labels.png is a palette image: 0 background and 1, 2, ... the targets in this order (labels.json).
"""

from util.command import run_command

import argparse
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from model.backbones import BACKBONES
from model.weights import sha256_of
from util.engine.metrics import mask_iou
from util.errors import UserError, first_of
from util.files import require_writable, write_json
from util.photos.images import read_ground_truth, read_upright
from util.photos.predictions import draw, output_path, require_same_settings, write_outputs
from util.photos.queries import Query, find_ground_truths, find_queries
from util.photos.segmenter import DEFAULT_BACKBONE, Segmenter, load_segmenter
from util.photos.targets import TargetFiles, encode_target, parse_box, read_targets, write_masks_of_boxes
from util.progress import progress


def main() -> None:
    args = parse_arguments()
    if args.targets:
        files = read_targets(args.targets)
    else:
        masks = args.mask or write_masks_of_boxes(args.support, args.box, args.out)
        files = {"": TargetFiles(supports=args.support, masks=masks, class_id=args.class_id)}
    queries = find_queries(args.query, args.out)
    ground_truths = find_ground_truths(args.ground_truth, queries) if args.ground_truth else {}
    require_writable(args.out / "predict.json", ".json")
    segmenter = load_segmenter(args.checkpoint, args.backbone, args.device)
    print(segmenter.about)
    args.threshold = segmenter.threshold if args.threshold is None else args.threshold
    args.edges = args.checkpoint is None if args.edges is None else args.edges
    targets = {name: encode_target(segmenter, target) for name, target in files.items()}
    settings = {
        "checkpoint": sha256_of(args.checkpoint) if args.checkpoint else args.backbone or DEFAULT_BACKBONE,
        "targets": {name: target.fingerprint() for name, target in files.items()},
        "threshold": args.threshold,
        "edges": args.edges,
    }
    require_same_settings(args.out / "predict.json", settings, overwrite=args.overwrite)
    if args.targets:
        endings = ["labels.png", "overlay.jpg"]
        write_json(args.out / "labels.json", {str(n): name for n, name in enumerate(["background", *targets])})
    else:
        maps = ("probability", *segmenter.maps) if args.maps else ()
        endings = ["mask.png", "overlay.jpg", *(f"{name}.png" for name in maps), *(["cutout.png"] * args.cutout)]
    segment_queries(segmenter, targets, queries, ground_truths, endings, args)


def segment_queries(
    segmenter: Segmenter,
    targets: dict[str, Any],
    queries: list[Query],
    ground_truths: dict[str, Path],
    endings: list[str],
    args: argparse.Namespace,
) -> None:
    """Read, segment and write the queries that are not finished; score all that have a ground truth; sum up."""
    outputs_of = {query: [output_path(args.out, query.name, ending) for ending in endings] for query in queries}
    for path in (path for paths in outputs_of.values() for path in paths if args.overwrite):
        path.unlink(missing_ok=True)  # all of them first: if this run is interrupted, no old ones look finished
    finished = {query for query, paths in outputs_of.items() if all(path.exists() for path in paths)}
    if finished:
        print(f"{len(finished)} of {len(queries)} queries are finished already; --overwrite does them again")
    scores, empty, failed = dict[str, float](), list[str](), 0
    todo = [query for query in queries if ground_truths or query not in finished]
    with progress(total=len(todo), unit="image", disable=not todo) as bar:
        for query in todo:
            try:
                image = read_upright(query.path)
                ground_truth = read_ground_truth(ground_truths.get(query.name), image, args.class_id)
                if query not in finished:
                    outputs = draw(segmenter, targets, image.pixels, endings, args.threshold, args.edges)
                    write_outputs(args.out, query.name, outputs)
                    empty += [] if np.asarray(outputs[endings[0]]).any() else [query.name]
                if ground_truth is not None:
                    with Image.open(outputs_of[query][0]) as mask:
                        scores[query.name] = 100 * mask_iou(np.asarray(mask) > 0, ground_truth)
            except UserError as error:
                if len(queries) == 1:
                    raise
                failed += 1
                bar.write(f"failed: {error}", sys.stderr)
            bar.update()
    sum_up(scores, empty, failed, len(queries), args)


def sum_up(scores: dict[str, float], empty: list[str], failed: int, count: int, args: argparse.Namespace) -> None:
    if scores:
        mean = fmean(scores.values())
        write_json(args.out / "iou.json", {"unit": "percent", "mean": mean, "queries": scores})
        print(f"mean IoU of {len(scores)} queries: {mean:.1f}")
    if empty:
        print(
            f"nothing found in {len(empty)} of {count} images ({first_of(empty, 3, ', ')}); try a lower --threshold"
            f" (now {args.threshold:g}), --maps to see what the segmenter sees, or supports more like these images"
            + (", or leave out --checkpoint for training-free segmentation" if args.checkpoint else "")
        )
    if failed:
        raise UserError(f"{failed} of {count} queries failed, named above; the others are done, in {args.out}")
    print(f"results: {args.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="of a trained network; without it, segmentation is training-free")
    add("--backbone", choices=sorted(BACKBONES), help=f"of training-free segmentation, default {DEFAULT_BACKBONE}")
    add("--support", type=Path, nargs="+", help="images that show the target")
    add("--mask", type=Path, nargs="+", help="where the target is, one for each support")
    add("--box", type=parse_box, nargs="+", metavar="BOX", help="x0,y0,x1,y1 around the target, instead of --mask")
    add("--class-id", type=int, help="value of the target in masks of class ids; 255 is ignored")
    add("--targets", type=Path, metavar="YAML", help="several targets, instead of --support and --mask")
    add("--query", type=Path, nargs="+", required=True, help="images, and folders of images")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--threshold", type=float, help="of the probability; by default the segmenter's own")
    edges = "draw borders along the image's edges (GrabCut); by default only without a checkpoint"
    add("--edges", action=argparse.BooleanOptionalAction, help=edges)
    add("--maps", action="store_true", help="also NAME_{probability,prior,bg,distractor}.png, grey")
    add("--cutout", action="store_true", help="also NAME_cutout.png, transparent but for the target")
    add("--ground-truth", type=Path, help="mask, or folder of masks named like the queries: IoU in iou.json")
    add("--overwrite", action="store_true", help="do finished queries again")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    of_one = (args.support, args.mask, args.box, args.class_id, args.maps, args.ground_truth, args.cutout)
    if args.targets and any(of_one):
        raise UserError(
            "--targets cannot be combined with --support, --mask, --box, --class-id, --maps, --cutout, --ground-truth"
        )
    if not args.targets and (not args.support or bool(args.mask) == bool(args.box)):
        raise UserError("say what to find: --support with --mask or --box, or --targets")
    if args.box and (args.class_id is not None or len(args.box) != len(args.support)):
        raise UserError("give one --box for each --support, and no --class-id with it")
    if args.checkpoint and args.backbone:
        raise UserError("--backbone is for training-free segmentation, without --checkpoint")
    if args.threshold is not None and not 0 < args.threshold < 1:
        raise UserError(f"--threshold must lie between 0 and 1, got {args.threshold:g}")
    return args


if __name__ == "__main__":
    run_command(main)
