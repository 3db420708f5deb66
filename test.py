"""Evaluate a checkpoint on the novel classes of its fold.

    python test.py --config configs/pascal/resnet50_fold0_1shot.yaml --checkpoint runs/.../best.pt
                   [--shots 5] [--episodes 1000] [--seeds 0 1 2 3 4] [--out results.json] [key=value ...]
    python test.py --config configs/pascal/resnet50_fold0_1shot.yaml --baselines

Any checkpoint evaluates at any number of shots. Several seeds give mean and standard deviation. --baselines adds what
needs no training, on the same episodes: everything is target, the prior mask at 0.5, and training-free segmentation
(ours, not the paper's: model/training_free.py) without and with edges; without a checkpoint, the last two alone.
"""

from util.command import run_command

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from model.ntrenet import NTRENet
from model.training_free import build_training_free, on_backbone
from model.weights import sha256_of
from util.config import Config, add_config_argument, load_config, parse_arguments
from util.data.class_index import ClassIndex
from util.data.episodes import EpisodeFiles, EpisodeList, read_episodes, write_episodes
from util.data.folds import novel_classes
from util.engine.build import (
    Hardware,
    build_eval_loader,
    build_eval_sampler,
    build_index,
    build_saved_model,
    select_hardware,
)
from util.engine.checkpoint import load_checkpoint, require_same, saved_config
from util.engine.loops import BASELINES, NETWORK, Predictor, evaluate
from util.engine.memory import peak_memory_mib, return_freed_memory
from util.engine.metrics import scores
from util.engine.record import environment, over_seeds
from util.engine.rounds import batched
from util.errors import UserError
from util.files import require_writable, write_json
from util.progress import progress
from util.segment.baselines import evaluate_training_free
from util.segment.panels import save_panels
from util.segment.segmenter import TrainingFreeSegmenter
from util.segment.visualize import draw_rows, episode_rows, save_picture

PANEL_ROWS = 4
TITLES = {
    "all_foreground": "all foreground",
    "prior": "prior at 0.5",
    "training_free": "training-free",
    "training_free_edges": "training-free, edges",
}
"""of the baselines"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--shots", type=int, help="supports an episode; by default the config's")
    parser.add_argument("--episodes", type=int, help="episodes a seed; by default the config's eval.episodes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one set of episodes each")
    parser.add_argument("--out", type=Path, help="write results here, as JSON")
    parser.add_argument("--baselines", action="store_true", help="also score what needs no training")
    parser.add_argument("--write-episodes", type=Path, metavar="F", help="write the seed's episodes here first")
    parser.add_argument("--episodes-from", type=Path, metavar="F", help="evaluate exactly the episodes of this file")
    parser.add_argument("--panel", type=Path, help="write a picture of the first episodes here, as PNG")
    parser.add_argument(
        "--save-panels",
        type=int,
        metavar="N",
        help="pictures of the N best, worst and random episodes of the first seed, into panels/ beside the checkpoint",
    )
    parser.add_argument(
        "--baseline-checkpoint",
        type=Path,
        metavar="F",
        help="of an ablation such as PFENet: its prediction in the panels",
    )
    args, overrides = parse_arguments(parser)
    check_arguments(args)
    overrides += [f"data.shots={args.shots}"] if args.shots is not None else []
    overrides += [f"eval.episodes={args.episodes}"] if args.episodes is not None else []
    config = load_config(args.config, overrides)
    hardware = select_hardware(config)
    return_freed_memory()
    index = build_index(config, "val")
    episodes = choose_episodes(args, config, index)  # one list a seed
    together = [episode for of_seed in episodes for episode in of_seed]  # so that seeds share what images give
    model, baseline, trained, counts, seconds = None, None, dict[str, Any](), dict[str, np.ndarray](), 0.0
    if args.checkpoint is not None:
        model, trained = load_model(config, args.checkpoint)
        model.to(hardware.device)
    if args.baselines:
        free = load_training_free(config, hardware, model)
    if args.baseline_checkpoint is not None:
        baseline = load_baseline(config, args.baseline_checkpoint).to(hardware.device)
    if model is not None:
        threshold = load_checkpoint(args.checkpoint).get("threshold", 0.5)
        predictors = NETWORK | calibrated(threshold) | (BASELINES if args.baselines else {})
        print(f"what episodes share takes at most {config.eval.cache_gib:g} GiB at a time (eval.cache_gib)", flush=True)
        started = time.perf_counter()
        with progress(total=len(together), desc="evaluation", unit="episode") as bar:
            counts = evaluate(model, index, together, config=config, hardware=hardware, predictors=predictors, bar=bar)
        seconds = time.perf_counter() - started
    if args.baselines:
        with progress(total=len(together), desc="without training", unit="episode") as bar:
            counts |= evaluate_training_free(free, index, together, cache_gib=config.eval.cache_gib, bar=bar)

    names = {c: config.data.classes[c - 1] for c in novel_classes(config.data)}
    class_ids = np.array([episode.class_id for episode in together])
    seeds = batched(range(len(together)), len(episodes[0]))
    by_seed = {
        name: [scores(table[list(n)], class_ids[list(n)], names) for n in seeds] for name, table in counts.items()
    }
    results: dict[str, Any] = {
        "dataset": config.data.dataset,
        "fold": config.data.fold,
        "folds": config.data.num_folds,
        "shots": config.data.shots,
        "backbone": config.model.backbone,
        "episodes": len(episodes[0]),
        "episodes_from": None if args.episodes_from is None else str(args.episodes_from),
        "seeds": args.seeds if args.episodes_from is None else [],
        "unit": "percent",
        **(over_seeds(by_seed["network"]) if args.checkpoint else {}),
        "train_seed": trained.get("seed"),
        "config": config.model_dump() | trained,
        "checkpoint": args.checkpoint and str(args.checkpoint),
        "checkpoint_sha256": args.checkpoint and sha256_of(args.checkpoint),
        "list_sha256": index.list_sha256,
        "seconds": seconds,
        "peak_memory_mib": peak_memory_mib(hardware.device),
        "dtype": str(hardware.precision).removeprefix("torch."),
        "environment": environment(hardware.device),
    }
    if args.baselines:
        scored = {name: over_seeds(by_seed[name])["miou"] for name in by_seed if name in TITLES}
        results["baselines"] = {name: {"miou": miou["mean"], "std": miou["std"]} for name, miou in scored.items()}
    if "calibrated" in by_seed:
        results["calibrated"] = {"threshold": threshold, **over_seeds(by_seed["calibrated"])}
    print(table(results))
    if args.out is not None:
        write_json(args.out, results)
        print(f"results: {args.out}")
    if model is None:
        return
    source = EpisodeList(index, episodes[0])
    if args.panel is not None:
        loader = build_eval_loader(config, source, range(min(PANEL_ROWS, len(episodes[0]))))
        save_picture(args.panel, draw_rows(episode_rows(model, loader, hardware=hardware)))
        print(f"picture: {args.panel}")
    if args.save_panels is not None:
        folder = args.checkpoint.parent / "panels"
        save_panels(
            folder, args.save_panels, model, baseline, source, counts["network"][: len(episodes[0])], config, hardware
        )
        print(f"panels: {folder}, all of them in {folder / 'contact_sheet.png'}")


def check_arguments(args: argparse.Namespace) -> None:
    """Find out before the work what contradicts itself or cannot be written."""
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds must be different whole numbers from 0 on, got {args.seeds}")
    if args.episodes_from is not None and (args.write_episodes or args.episodes or len(args.seeds) > 1):
        raise UserError("--episodes-from settles the episodes: leave out --write-episodes, --episodes and --seeds")
    if args.write_episodes is not None and len(args.seeds) > 1:
        raise UserError("--write-episodes writes the episodes of one seed; give one")
    if args.save_panels is not None and args.save_panels < 1:
        raise UserError(f"--save-panels must be at least 1, got {args.save_panels}")
    if args.baseline_checkpoint is not None and args.save_panels is None:
        raise UserError("--baseline-checkpoint shows in the panels only; give --save-panels N as well")
    if args.checkpoint is None and not args.baselines:
        raise UserError("say what is to be evaluated: --checkpoint, --baselines (what needs no training), or both")
    if args.checkpoint is None and (args.panel or args.save_panels):
        raise UserError("--panel and --save-panels show a network: give --checkpoint as well")
    for path, suffix in ((args.out, ".json"), (args.panel, ".png"), (args.write_episodes, ".jsonl")):
        if path is not None:
            require_writable(path, suffix)
    if args.save_panels is not None and args.checkpoint.exists():
        require_writable(args.checkpoint.parent / "panels/contact_sheet.png", ".png")


def choose_episodes(args: argparse.Namespace, config: Config, index: ClassIndex) -> list[list[EpisodeFiles]]:
    """One list a seed, or the one of --episodes-from; writes --write-episodes."""
    root = Path(config.data.root)
    if args.episodes_from is not None:
        novel, shots = novel_classes(config.data), config.data.shots
        return [read_episodes(args.episodes_from, index, root=root, classes=novel, shots=shots)]
    count = config.eval.episodes
    samplers = [build_eval_sampler(config, index, seed) for seed in args.seeds]
    if args.write_episodes is not None:
        write_episodes(args.write_episodes, samplers[0], count, root=root, class_names=config.data.classes)
        print(f"episodes: {args.write_episodes}")
    return [[sampler(number) for number in range(count)] for sampler in samplers]


def load_baseline(config: Config, path: Path) -> NTRENet:
    """The model of another checkpoint of the same fold, whatever its ablation."""
    saved = saved_config(load_checkpoint(path), path).model
    scales = {"fem_scales": config.model.fem_scales}
    model, _ = load_model(config.model_copy(update={"model": saved.model_copy(update=scales)}), path)
    return model


def calibrated(threshold: float) -> dict[str, Predictor]:
    """The network cut at the threshold of its checkpoint, where that is another than the paper's 0.5."""
    logit = math.log(threshold / (1 - threshold))
    return {} if threshold == 0.5 else {"calibrated": lambda output: output.logits - logit}


def load_training_free(config: Config, hardware: Hardware, model: NTRENet | None) -> TrainingFreeSegmenter:
    """The method on the network's own backbone; without a network, on the one that the config names."""
    name, weights = config.model.backbone, config.model.weights
    free = build_training_free(name, weights=weights) if model is None else on_backbone(name, model.backbone)
    return TrainingFreeSegmenter(free, name, hardware)


def load_model(config: Config, path: Path) -> tuple[NTRENet, dict[str, Any]]:
    """The model of a checkpoint, which must have been trained for this config's fold and network.

    A converted checkpoint lists what it does not know of its training ('unknown'); that is taken from ``config``.

    Returns:
        also how it was trained: the sections of its config that an evaluation does not use, and its seed if known
    """
    checkpoint = load_checkpoint(path)
    saved, unknown = saved_config(checkpoint, path), checkpoint.get("unknown", ())
    require_same(saved, config, path, unknown=unknown)
    model = build_saved_model(config, checkpoint, path)
    if "data.fold" in unknown:
        print(
            f"note: checkpoint {path} does not say which fold it was trained on;"
            f" it is tested on fold {config.data.fold} as given"
        )
    known = saved.model_dump(include={"loss", "train"} if "seed" in unknown else {"loss", "train", "seed"})
    return model, known


def table(results: dict[str, Any]) -> str:
    """The results as a person reads them."""

    def cell(score: dict[str, Any]) -> str:
        return f"{score['mean']:5.1f}" + (f" ± {score['std']:.1f}" if len(results["seeds"]) > 1 else "")

    width = max(len(name) for name in (*results.get("per_class", ()), *TITLES.values()))
    lines = [
        "",
        f"{results['dataset']} fold {results['fold']} of {results['folds']}, {results['shots']}-shot,"
        f" {results['backbone']}: {results['episodes']} episodes,"
        f" {results['episodes_from'] or 'seeds ' + ', '.join(map(str, results['seeds']))}",
    ]
    if "miou" in results:
        lines += [
            *(f"  {name:{width}}  {iou:5.1f}" for name, iou in results["per_class"].items()),
            f"  {'mIoU':{width}}  {cell(results['miou'])}   (this fold alone, not the mean of folds)",
            f"  {'FB-IoU':{width}}  {cell(results['fb_iou'])}",
            f"  {'precision':{width}}  {cell(results['precision'])}",
        ]
    if (other := results.get("calibrated")) is not None:
        why = f"mIoU at {other['threshold']:g}, the threshold chosen on base classes; all above is at 0.5"
        lines.append(f"  {'calibrated':{width}}  {cell(other['miou'])}   {why}")
    for name, baseline in results.get("baselines", {}).items():
        lines.append(f"  {TITLES[name]:{width}}  {baseline['miou']:5.1f}   mIoU without training, same episodes")
    if "miou" in results:
        lines.append(f"  {results['seconds']:.0f} s, peak memory {results['peak_memory_mib']:.0f} MiB")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
