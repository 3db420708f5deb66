"""Segment your own pictures from a few supports, with a checkpoint or without any.

    python predict.py --support cat.jpg --mask cat.png --query photos/ --out out/
    python predict.py --checkpoint runs/.../best.pt --support s1.jpg s2.jpg --mask m1.png m2.png
                      --query photo.jpg folder/ frames/*.jpg --out out/
    python predict.py --checkpoint runs/.../best.pt --targets targets.yaml --query folder/ --out out/

A mask is 0 and 1, 0 and 255, the alpha of a picture, or class ids (palette or greyscale) with --class-id; instead of
one, --box x0,y0,x1,y1 around the object will do. Pictures and masks are turned as EXIF says; a mask with the stored
size of a turned picture is turned with it. Folders are searched with their subfolders, which are kept below --out; two
queries of one NAME are refused. For each query there will be NAME_mask.png (0 and 255) and NAME_overlay.jpg.

Without a checkpoint this is training-free segmentation: ours and not the paper's network. It uses the features of a
frozen ImageNet backbone (model/training_free.py) and OpenCV's GrabCut for the edges.

targets.yaml names several targets; its paths are relative to it:

    dog: {supports: [a.jpg, b.jpg], masks: [a.png, b.png], class_id: 3}     # class_id only for masks of class ids
    cat: {supports: [c.jpg], masks: [c.png]}

Then NAME_labels.png is a palette picture, 0 background and 1, 2, ... the targets in this order (labels.json).

What is finished is left as it is. Exit code 2 where a query could not be read; the others are done.
"""

from util.command import run_command

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from model.backbones import BACKBONES
from model.weights import sha256_of
from util.engine.metrics import mask_iou
from util.errors import UserError
from util.files import require_writable, write_json
from util.progress import progress
from util.segment.edges import mask_in_box
from util.segment.pictures import Picture, read_mask_on, read_picture, target_mask
from util.segment.predictions import (
    Outputs,
    draw_labels,
    draw_one,
    endings,
    is_finished,
    output_path,
    remove,
    require_same_settings,
    shows_nothing,
    write_outputs,
)
from util.segment.queries import QueryFile, find_ground_truths, find_queries, read_ahead, unread_pictures
from util.segment.segmenter import DEFAULT_BACKBONE, Segmenter, T, load_segmenter
from util.segment.targets import TargetFiles, encode_target, read_targets

ONLY = ""
"""name of the target of --support and --mask"""
Draw = Callable[[np.ndarray], Outputs]


class Tally(NamedTuple):
    """What became of the queries."""

    scores: dict[str, float]
    """IoU in percent of each query that has a ground truth"""
    empty: list[str]
    """names of the pictures in which nothing was found"""
    failed: int


def main() -> None:
    args = parse_arguments()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # util.segment.pictures has a limit of its own
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
    if args.box is not None:
        args.mask = masks_of_boxes(args.support, args.box, args.out)
    files, queries = target_files(args), find_queries(args.query, args.out)
    if unread := unread_pictures(args.query):
        names = ", ".join(path.name for path in unread[:3]) + (", ..." if len(unread) > 3 else "")
        print(f"skipped {len(unread)} pictures that are not read ({names}); convert them to JPEG or PNG")
    ground_truths = {} if args.ground_truth is None else find_ground_truths(args.ground_truth, queries)
    record = args.out / "predict.json"
    require_writable(record, ".json")
    segmenter = load_segmenter(args.checkpoint, args.backbone, args.device)
    print(segmenter.about)
    args.threshold = segmenter.threshold if args.threshold is None else args.threshold
    args.edges = args.checkpoint is None if args.edges is None else args.edges
    targets = {name: encode_target(segmenter, target) for name, target in files.items()}
    require_same_settings(record, settings(args, files), overwrite=args.overwrite)
    if args.targets is not None:
        write_json(args.out / "labels.json", {str(n): name for n, name in enumerate(["background", *targets])})

    wanted = endings(segmenter, labelled=args.targets is not None, maps=args.maps, cutout=args.cutout)
    if args.overwrite:
        remove(args.out, [query.name for query in queries], wanted)
    finished = {query.name for query in queries if is_finished(args.out, query.name, wanted)}
    if finished:
        print(f"{len(finished)} of {len(queries)} queries are finished already; --overwrite does them again")
    tally = predict(queries, finished, ground_truths, drawing(segmenter, targets, args), args)
    conclude(tally, len(queries), args)


def drawing(segmenter: Segmenter[Any, T], targets: dict[str, T], args: argparse.Namespace) -> Draw:
    """Choose what is drawn of a query's pixels."""
    how = {"threshold": args.threshold, "edges": args.edges}
    if args.targets is not None:
        return lambda pixels: draw_labels(segmenter, targets, pixels, **how)
    return lambda pixels: draw_one(segmenter, targets[ONLY], pixels, maps=args.maps, cutout=args.cutout, **how)


def predict(
    queries: list[QueryFile], finished: set[str], ground_truths: dict[str, Path], draw: Draw, args: argparse.Namespace
) -> Tally:
    """Write the outputs of every query that is not finished; those that are finished are scored as well.

    Raises:
        UserError: the only query cannot be read; of several, the others are done.
    """
    to_read = [query for query in queries if ground_truths or query.name not in finished]
    scores, empty, failed = dict[str, float](), list[str](), 0
    with progress(total=len(to_read), unit="picture", disable=not to_read) as bar:
        for query, reading in read_ahead(to_read):
            try:
                picture = reading.result()
                ground_truth = read_ground_truth(ground_truths.get(query.name), picture, args.class_id)
            except UserError as error:
                if len(queries) == 1:
                    raise
                failed += 1
                bar.write(f"failed: {error}", sys.stderr)
            else:
                if query.name not in finished:
                    outputs = draw(picture.pixels)
                    write_outputs(args.out, query.name, outputs)
                    empty += [query.name] if shows_nothing(outputs) else []
                if ground_truth is not None:
                    scores[query.name] = 100 * mask_iou(written_mask(args.out, query.name), ground_truth)
                    bar.set_postfix_str(f"mean IoU {fmean(scores.values()):.1f}", refresh=False)
            bar.update()
    return Tally(scores, empty, failed)


def conclude(tally: Tally, count: int, args: argparse.Namespace) -> None:
    """Say what was found, and what to try where nothing was.

    Raises:
        UserError: some of the ``count`` queries failed.
    """
    if tally.scores:
        mean = fmean(tally.scores.values())
        write_json(args.out / "iou.json", {"unit": "percent", "mean": mean, "queries": tally.scores})
        print(f"mean IoU of {len(tally.scores)} queries: {mean:.1f}")
    if tally.empty:
        print(
            f"nothing found in {len(tally.empty)} of {count} pictures ({', '.join(tally.empty[:3])}"
            f"{', ...' if len(tally.empty) > 3 else ''}); try a lower --threshold (now {args.threshold:g}), --maps to"
            " see what the segmenter sees, a support that looks more like these pictures, or several"
            + (", or leave out --checkpoint for training-free segmentation" if args.checkpoint else "")
        )
    if tally.failed:
        raise UserError(f"{tally.failed} of {count} queries failed, named above; the others are done, in {args.out}")
    print(f"results: {args.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of a trained network; training-free segmentation without")
    parser.add_argument(
        "--backbone", choices=sorted(BACKBONES), help=f"of training-free segmentation; by default {DEFAULT_BACKBONE}"
    )
    parser.add_argument("--support", type=Path, nargs="+", help="pictures that show the target")
    parser.add_argument("--mask", type=Path, nargs="+", help="where it is, one for each support")
    parser.add_argument(
        "--box", type=box, nargs="+", help="x0,y0,x1,y1 around it instead of --mask; GrabCut does the rest"
    )
    parser.add_argument("--class-id", type=int, help="value of the target in masks of class ids, 255 is ignored")
    parser.add_argument("--targets", type=Path, metavar="YAML", help="several targets, instead of --support and --mask")
    parser.add_argument("--query", type=Path, nargs="+", required=True, help="pictures, and folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--threshold", type=float, help="of the probability; by default the segmenter's own")
    parser.add_argument(
        "--edges",
        action=argparse.BooleanOptionalAction,
        help="draw borders along the picture's edges (GrabCut); by default only without a checkpoint",
    )
    parser.add_argument("--maps", action="store_true", help="also NAME_{probability,prior,bg,distractor}.png, grey")
    parser.add_argument("--cutout", action="store_true", help="also NAME_cutout.png, transparent but for the target")
    parser.add_argument(
        "--ground-truth", "--truth", type=Path, help="mask, or folder of masks named like the queries: IoU in iou.json"
    )
    parser.add_argument("--overwrite", action="store_true", help="do again what is finished")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    if args.targets is None and (args.support is None or (args.mask is None) == (args.box is None)):
        raise UserError("say what is to be found: --support and --mask, or --support and --box, or --targets")
    of_one = (args.support, args.mask, args.box, args.class_id, args.maps, args.ground_truth, args.cutout)
    if args.targets is not None and any(of_one):
        raise UserError(
            "--targets takes the place of --support, --mask, --box and --class-id; --maps, --ground-truth and --cutout"
            " are for one target"
        )
    if args.box is not None and (args.class_id is not None or len(args.box) != len(args.support)):
        raise UserError("each support needs a --box of its own, in the same order, and a box has no --class-id")
    if args.checkpoint is not None and args.backbone is not None:
        raise UserError("--backbone is for training-free segmentation; a checkpoint has its own: leave out one of them")
    if args.threshold is not None and not 0 < args.threshold < 1:
        raise UserError(f"--threshold must lie between 0 and 1, got {args.threshold:g}")
    return args


def box(text: str) -> tuple[int, int, int, int]:
    try:
        x0, y0, x1, y1 = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box must be x0,y0,x1,y1 in whole pixels, such as 40,30,220,310; got {text}") from None
    return x0, y0, x1, y1


def masks_of_boxes(supports: list[Path], boxes: list[tuple[int, int, int, int]], out: Path) -> list[Path]:
    """Write the mask of each support's box into ``out``, where it can be looked at and corrected."""
    masks = []
    for number, (support, (x0, y0, x1, y1)) in enumerate(zip(supports, boxes, strict=True), 1):
        picture = read_picture(support).pixels
        height, width = picture.shape[:2]
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UserError(f"--box {x0},{y0},{x1},{y1} does not lie in {support}, which is {width} x {height} pixels")
        name = f"box{number}_{support.stem}"
        write_outputs(out, name, {"mask.png": Image.fromarray(mask_in_box(picture, (x0, y0, x1, y1)))})
        masks.append(output_path(out, name, "mask.png"))
        print(f"{masks[-1]} is what was made of --box; correct it and give it as --mask if it is wrong")
    return masks


def target_files(args: argparse.Namespace) -> dict[str, TargetFiles]:
    """Name the files of each target; the only one of --support and --mask has no name."""
    if args.targets is not None:
        return read_targets(args.targets)
    supports, masks = ([str(path) for path in paths] for paths in (args.support, args.mask))
    return {ONLY: TargetFiles(supports=supports, masks=masks, class_id=args.class_id).below(Path())}


def settings(args: argparse.Namespace, files: dict[str, TargetFiles]) -> dict[str, Any]:
    """Return what the predictions in a folder depend on, apart from the queries."""
    free = f"training-free, {args.backbone or DEFAULT_BACKBONE}"
    return {
        "checkpoint": free if args.checkpoint is None else sha256_of(args.checkpoint),
        "targets": {name: target.fingerprint() for name, target in files.items()},
        "threshold": args.threshold,
        "edges": args.edges,
    }


def written_mask(out: Path, name: str) -> np.ndarray:
    with Image.open(output_path(out, name, "mask.png")) as mask:
        return np.asarray(mask) > 0


def read_ground_truth(path: Path | None, picture: Picture, class_id: int | None) -> np.ndarray | None:
    """Read a mask of 1 target, 0 other, 255 ignored, of the picture's size; None where there is no file."""
    return None if path is None else target_mask(read_mask_on(picture, path), class_id, str(path))


if __name__ == "__main__":
    run_command(main)
