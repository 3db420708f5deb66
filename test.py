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
import textwrap
import time
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

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
MOST_CLASSES, ENDS = 40, 10
"""of more than MOST_CLASSES novel classes, as FSS-1000 has, the table shows ENDS of the worst and of the best"""
TITLES = {
    "all_foreground": "all foreground",
    "prior": "prior at 0.5",
    "training_free": "training-free",
    "training_free_edges": "training-free, edges",
}
"""of the baselines"""


def main() -> None:
    args, overrides = read_arguments()
    config = load_config(args.config, overrides)
    hardware = select_hardware(config)
    return_freed_memory()
    index = build_index(config, "val")
    episodes = choose_episodes(args, config, index)
    network = None if args.checkpoint is None else load_network(config, hardware, args.checkpoint)
    free = load_training_free(config, hardware, network) if args.baselines else None
    baseline = None if args.baseline_checkpoint is None else load_baseline(config, hardware, args.baseline_checkpoint)
    started = time.perf_counter()
    counts = {} if network is None else run_network(network, index, episodes, args, config, hardware)
    seconds = time.perf_counter() - started if network is not None else 0.0
    if free is not None:
        counts |= run_training_free(free, index, episodes, config)
    results = {
        **describe(args, config, index, network, len(episodes[0])),
        **score(counts, episodes, config, network),
        "seconds": seconds,
        "peak_memory_mib": peak_memory_mib(hardware.device),
        "dtype": str(hardware.precision).removeprefix("torch."),
        "environment": environment(hardware.device),
    }
    print(table(results))
    if args.out is not None:
        write_json(args.out, results)
        print(f"results: {args.out}")
    if network is not None:
        draw(args, config, hardware, network.model, baseline, EpisodeList(index, episodes[0]), counts["network"])


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Options of the command line, checked, and what they and its ``key=value`` change in the config."""
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
    return args, overrides


def check_arguments(args: argparse.Namespace) -> None:
    """Find out before the work what contradicts itself or cannot be written."""
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds must be different whole numbers from 0 on, got {args.seeds}")
    if args.episodes_from is not None and (args.write_episodes or args.episodes or len(args.seeds) > 1):
        raise UserError("--episodes-from settles the episodes: leave out --write-episodes, --episodes and --seeds")
    if args.write_episodes is not None and len(args.seeds) > 1:
        raise UserError("--write-episodes writes the episodes of one seed; give one")
    if args.checkpoint is None and not args.baselines:
        raise UserError("say what is to be evaluated: --checkpoint, --baselines (what needs no training), or both")
    check_panels(args)
    for path, suffix in ((args.out, ".json"), (args.panel, ".png"), (args.write_episodes, ".jsonl")):
        if path is not None:
            require_writable(path, suffix)


def check_panels(args: argparse.Namespace) -> None:
    """Check the options that draw pictures, likewise before anything is loaded."""
    if args.save_panels is not None and args.save_panels < 1:
        raise UserError(f"--save-panels must be at least 1, got {args.save_panels}")
    if args.baseline_checkpoint is not None and args.save_panels is None:
        raise UserError("--baseline-checkpoint shows in the panels only; give --save-panels N as well")
    if args.checkpoint is None and (args.panel or args.save_panels):
        raise UserError("--panel and --save-panels show a network: give --checkpoint as well")
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


class Network(NamedTuple):
    """A checkpoint's network, and what is known of its training."""

    model: NTRENet
    threshold: float
    """chosen on base classes, 0.5 where none was"""
    trained: dict[str, Any]
    """the sections of its config that an evaluation does not use, and its seed if known"""


def load_network(config: Config, hardware: Hardware, path: Path) -> Network:
    """The network of a checkpoint, which must have been trained for this config's fold and network.

    A converted checkpoint lists what it does not know of its training ('unknown'); that is taken from ``config``.
    """
    checkpoint = load_checkpoint(path)
    saved, unknown = saved_config(checkpoint, path), checkpoint.get("unknown", ())
    require_same(saved, config, path, unknown=unknown)
    model = build_saved_model(config, checkpoint, path).to(hardware.device)
    if "data.fold" in unknown:
        print(
            f"note: checkpoint {path} does not say which fold it was trained on;"
            f" it is tested on fold {config.data.fold} as given"
        )
    known = saved.model_dump(include={"loss", "train"} if "seed" in unknown else {"loss", "train", "seed"})
    return Network(model, checkpoint.get("threshold", 0.5), known)


def load_baseline(config: Config, hardware: Hardware, path: Path) -> NTRENet:
    """The model of another checkpoint of the same fold, whatever its ablation."""
    checkpoint = load_checkpoint(path)
    saved = saved_config(checkpoint, path)
    scales = {"fem_scales": config.model.fem_scales}
    given = config.model_copy(update={"model": saved.model.model_copy(update=scales)})
    require_same(saved, given, path, unknown=checkpoint.get("unknown", ()))
    return build_saved_model(given, checkpoint, path).to(hardware.device)


def load_training_free(config: Config, hardware: Hardware, network: Network | None) -> TrainingFreeSegmenter:
    """The method on the network's own backbone; without a network, on the one that the config names."""
    name, weights = config.model.backbone, config.model.weights
    free = build_training_free(name, weights=weights) if network is None else on_backbone(name, network.model.backbone)
    return TrainingFreeSegmenter(free, name, hardware)


def run_network(
    network: Network,
    index: ClassIndex,
    episodes: list[list[EpisodeFiles]],
    args: argparse.Namespace,
    config: Config,
    hardware: Hardware,
) -> dict[str, np.ndarray]:
    """Counts of the network, at its checkpoint's threshold too where that is not 0.5, and of what it can be held to."""
    together = list(chain.from_iterable(episodes))  # so that seeds share what images give
    logit = math.log(network.threshold / (1 - network.threshold))
    calibrated: dict[str, Predictor] = {"calibrated": lambda output: output.logits - logit} if logit else {}
    predictors = NETWORK | calibrated | (BASELINES if args.baselines else {})
    print(f"what episodes share takes at most {config.eval.cache_gib:g} GiB at a time (eval.cache_gib)", flush=True)
    with progress(total=len(together), desc="evaluation", unit="episode") as bar:
        return evaluate(
            network.model, index, together, config=config, hardware=hardware, predictors=predictors, bar=bar
        )


def run_training_free(
    free: TrainingFreeSegmenter, index: ClassIndex, episodes: list[list[EpisodeFiles]], config: Config
) -> dict[str, np.ndarray]:
    """Counts of training-free segmentation, without and with edges."""
    together = list(chain.from_iterable(episodes))
    with progress(total=len(together), desc="without training", unit="episode") as bar:
        return evaluate_training_free(free, index, together, cache_gib=config.eval.cache_gib, bar=bar)


def score(
    counts: dict[str, np.ndarray], episodes: list[list[EpisodeFiles]], config: Config, network: Network | None
) -> dict[str, Any]:
    """The part of the results that is scores: of the network, calibrated, and of the baselines."""
    names = {c: config.data.classes[c - 1] for c in novel_classes(config.data)}
    class_ids = np.array([episode.class_id for of_seed in episodes for episode in of_seed])
    seeds = [list(numbers) for numbers in batched(range(len(class_ids)), len(episodes[0]))]
    found = {name: over_seeds([scores(rows[n], class_ids[n], names) for n in seeds]) for name, rows in counts.items()}
    results: dict[str, Any] = found.get("network", {})
    if baselines := {name: found[name]["miou"] for name in found if name in TITLES}:
        results["baselines"] = {name: {"miou": m["mean"], "std": m["std"]} for name, m in baselines.items()}
    if network is not None and "calibrated" in found:
        results["calibrated"] = {"threshold": network.threshold, **found["calibrated"]}
    return results


def describe(
    args: argparse.Namespace, config: Config, index: ClassIndex, network: Network | None, episodes: int
) -> dict[str, Any]:
    """The part of the results that says what was evaluated, on what."""
    trained = {} if network is None else network.trained
    return {
        "dataset": config.data.dataset,
        "fold": config.data.fold,
        "folds": config.data.num_folds,
        "shots": config.data.shots,
        "backbone": config.model.backbone,
        "episodes": episodes,
        "episodes_from": None if args.episodes_from is None else str(args.episodes_from),
        "seeds": args.seeds if args.episodes_from is None else [],
        "unit": "percent",
        "train_seed": trained.get("seed"),
        "config": config.model_dump() | trained,
        "checkpoint": args.checkpoint and str(args.checkpoint),
        "checkpoint_sha256": args.checkpoint and sha256_of(args.checkpoint),
        "list_sha256": index.list_sha256,
    }


def draw(
    args: argparse.Namespace,
    config: Config,
    hardware: Hardware,
    model: NTRENet,
    baseline: NTRENet | None,
    source: EpisodeList,
    counts: np.ndarray,
) -> None:
    """--panel and --save-panels, of the first seed's episodes."""
    count = len(source.episodes)
    if args.panel is not None:
        loader = build_eval_loader(config, source, range(min(PANEL_ROWS, count)))
        save_picture(args.panel, draw_rows(episode_rows(model, loader, hardware=hardware)))
        print(f"picture: {args.panel}")
    if args.save_panels is not None:
        folder = args.checkpoint.parent / "panels"
        save_panels(folder, args.save_panels, model, baseline, source, counts[:count], config, hardware)
        print(f"panels: {folder}, all of them in {folder / 'contact_sheet.png'}")


def table(results: dict[str, Any]) -> str:
    """The results as a person reads them."""

    def cell(score: dict[str, Any]) -> str:
        return f"{score['mean']:.1f}" + (f" ± {score['std']:.1f}" if len(results["seeds"]) > 1 else "")

    heading = (
        f"{results['dataset']} fold {results['fold']} of {results['folds']}, {results['shots']}-shot,"
        f" {results['backbone']}: {results['episodes']} episodes,"
        f" {results['episodes_from'] or 'seeds ' + ', '.join(map(str, results['seeds']))}"
    )
    rows: list[list[str]] = []
    if "miou" in results:
        rows += class_rows(results["per_class"])
        rows.append(["mIoU", cell(results["miou"]), "(this fold alone, not the mean of folds)"])
        rows += [["FB-IoU", cell(results["fb_iou"])], ["precision", cell(results["precision"])]]
    if (other := results.get("calibrated")) is not None:
        why = f"mIoU at {other['threshold']:g}, the threshold chosen on base classes; all above is at 0.5"
        rows.append(["calibrated", cell(other["miou"]), why])
    for name, baseline in results.get("baselines", {}).items():
        rows.append([TITLES[name], f"{baseline['miou']:.1f}", "mIoU without training, same episodes"])
    if "miou" in results:
        rows.append(["time", f"{results['seconds']:.0f} s"])
        rows.append(["peak memory", f"{results['peak_memory_mib']:.0f} MiB"])
    return f"\n{heading}\n" + textwrap.indent(tabulate(rows, tablefmt="plain", disable_numparse=True), "  ")


def class_rows(per_class: dict[str, float]) -> list[list[str]]:
    """Return a row for each class; of many classes only the worst and the best, because --out has all of them."""
    if len(per_class) <= MOST_CLASSES:
        return [[name, f"{iou:.1f}"] for name, iou in per_class.items()]
    ordered = [[name, f"{per_class[name]:.1f}"] for name in sorted(per_class, key=lambda name: per_class[name])]
    between = f"{len(ordered) - 2 * ENDS} classes between these are in the file of --out"
    return [*ordered[:ENDS], ["...", "", between], *ordered[-ENDS:]]


if __name__ == "__main__":
    run_command(main)
