"""Evaluate a checkpoint on the novel classes of its fold.

    python test.py --config configs/pascal/resnet50_fold0_1shot.yaml --checkpoint runs/.../best.pt
                   [--shots 5] [--episodes 1000] [--seeds 0 1 2 3 4] [--out results.json] [key=value ...]
    python test.py --config configs/pascal/resnet50_fold0_1shot.yaml --baselines
    python test.py --config configs/pascal/resnet50_fold0_1shot.yaml --method package.module:function
    python test.py --config configs/pascal/resnet50_fold0_1shot.yaml --episodes-from F.jsonl --predictions DIR

Any checkpoint evaluates at any number of shots. Several seeds give mean and standard deviation. --method evaluates a
Python function on the same episodes, --predictions masks on disk (scripts/README.md has both). --baselines adds
predictions that need no training: everything is target, the prior mask at 0.5, and training-free segmentation (ours,
not the paper's: model/training_free.py) without and with edges. None of these needs a checkpoint.
"""

from util.command import run_command

import argparse
import hashlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from model.training_free import build_training_free, on_backbone
from model.weights import sha256_of
from util.config import Config, add_config_argument, flatten, load_config, parse_arguments, protocol_of
from util.data.class_index import ClassIndex
from util.data.episodes import EpisodeFiles, EpisodeList, episode_lines, read_episodes, write_episodes
from util.data.folds import novel_classes
from util.engine.build import Hardware, build_eval_loader, build_eval_sampler, build_index, build_model, select_hardware
from util.engine.checkpoint import TrainedNetwork, load_across, load_network
from util.engine.evaluation import BASELINES, NETWORK, Method, NetworkMethod, Predictor, evaluate
from util.engine.log import peak_memory_mib
from util.engine.metrics import interval, resampled_miou, scores
from util.engine.outside import FolderMethod, FunctionMethod, load_function
from util.engine.panels import draw_rows, episode_rows, save_panels, save_picture
from util.engine.record import environment
from util.engine.results import over_seeds, table
from util.errors import UserError
from util.files import require_writable, write_json
from util.photos.baselines import TrainingFreeMethod
from util.photos.segmenter import TrainingFreeSegmenter, known_backbone
from util.progress import progress


def main() -> None:
    args, overrides = read_arguments()
    config = load_config(args.config, overrides)
    hardware, index = select_hardware(config), build_index(config, "val")
    episodes = choose_episodes(args, config, index)
    together = [episode for of_seed in episodes for episode in of_seed]  # so that seeds share features
    network = None
    if args.across:
        network, config = load_across(config, hardware, args.checkpoint)
    elif args.checkpoint is not None:
        network = load_network(config, hardware, args.checkpoint)
    counts: dict[str, np.ndarray] = {}
    began = time.perf_counter()
    for title, method in choose_methods(args, config, hardware, index, together, network):
        # only a network gains by batches; with others the bar would move late
        batch = config.eval.batch_size if isinstance(method, NetworkMethod) else 1
        batched = config.model_copy(update={"eval": config.eval.model_copy(update={"batch_size": batch})})
        with progress(total=len(together), desc=title, unit="episode") as bar:
            counts |= evaluate(method, index, together, config=batched, bar=bar)
    seconds = time.perf_counter() - began
    results = {
        **describe(args, config, index, network, episodes),
        **score(counts, episodes, config, network),
        "seconds": seconds,
        "peak_memory_mib": peak_memory_mib(hardware.device),
        "dtype": str(hardware.precision).removeprefix("torch."),
        "environment": environment(hardware.device),
        # of each episode, seed after seed: true negatives, false positives, false negatives, true positives
        "counts": {name: [" ".join(map(str, row)) for row in rows.tolist()] for name, rows in counts.items()},
    }
    print(table(results))
    if args.out is not None:
        write_json(args.out, results)
        print(f"results: {args.out}")
    first_seed = EpisodeList(index, episodes[0])
    if args.panel is not None and network is not None:
        loader = build_eval_loader(config, first_seed, range(min(4, len(episodes[0]))))
        save_picture(args.panel, draw_rows(episode_rows(network.model, loader, hardware=hardware)))
        print(f"image: {args.panel}")
    if args.save_panels is not None and network is not None and args.checkpoint is not None:
        folder, of_first = args.checkpoint.parent / "panels", counts["network"][: len(episodes[0])]
        save_panels(folder, args.save_panels, network.model, first_seed, of_first, config, hardware)
        print(f"panels: {folder}, all of them in {folder / 'contact_sheet.png'}")


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read and check the options of the command line, and its ``key=value`` overrides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--across", action="store_true", help="the checkpoint was trained on other data")
    parser.add_argument("--method", metavar="M:F", help="evaluate this function (supports, masks, query) -> mask")
    parser.add_argument("--predictions", type=Path, metavar="DIR", help="evaluate DIR/0.png ... for --episodes-from")
    parser.add_argument("--shots", type=int, help="supports of an episode; by default the config's")
    parser.add_argument("--episodes", type=int, help="episodes of a seed; by default the config's eval.episodes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one set of episodes for each")
    parser.add_argument("--out", type=Path, help="write results here, as JSON")
    parser.add_argument("--baselines", action="store_true", help="also score predictions that need no training")
    parser.add_argument(
        "--backbone", type=known_backbone, help="of training-free segmentation (timm:NAME); by default the network's"
    )
    parser.add_argument("--weights", default="imagenet", metavar="F", help="weights file of --backbone")
    parser.add_argument("--write-episodes", type=Path, metavar="F", help="write the seed's episodes here first")
    parser.add_argument("--episodes-from", type=Path, metavar="F", help="evaluate exactly the episodes of this file")
    parser.add_argument("--panel", type=Path, help="write an image of the first episodes here, as PNG")
    parser.add_argument("--save-panels", type=int, metavar="N", help="draw the N best, worst and random episodes")
    args, overrides = parse_arguments(parser)
    refuse_contradictions(args)
    for path, suffix in ((args.out, ".json"), (args.panel, ".png"), (args.write_episodes, ".jsonl")):
        if path is not None:
            require_writable(path, suffix)
    overrides += [f"data.shots={args.shots}"] if args.shots is not None else []
    overrides += [f"eval.episodes={args.episodes}"] if args.episodes is not None else []
    return args, overrides


def refuse_contradictions(args: argparse.Namespace) -> None:
    """Refuse options that make no sense, or not together."""
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds must be different whole numbers from 0 on, got {args.seeds}")
    if args.episodes_from and (args.write_episodes or args.episodes or len(args.seeds) > 1):
        raise UserError("--episodes-from sets the episodes: leave out --write-episodes, --episodes and --seeds")
    if args.write_episodes and len(args.seeds) > 1:
        raise UserError("--write-episodes writes the episodes of one seed; give one")
    evaluated = [given for given in (args.checkpoint, args.method, args.predictions) if given is not None]
    if not evaluated and not args.baselines:
        raise UserError("nothing to evaluate: give --checkpoint, --method, --predictions or --baselines")
    if len(evaluated) > 1:
        raise UserError("give one of --checkpoint, --method and --predictions; report.py --compare compares two")
    if args.across and args.checkpoint is None:
        raise UserError("--across tests a network on other data than it was trained on: give --checkpoint as well")
    if args.predictions and not args.episodes_from:
        raise UserError("--predictions are of written episodes: give --episodes-from F.jsonl as well")
    if (args.backbone or args.weights != "imagenet") and not (args.backbone and args.baselines):
        raise UserError("--backbone is of --baselines, and --weights of --backbone; a network's is model.backbone=...")
    if args.checkpoint is None and (args.panel or args.save_panels):
        raise UserError("--panel and --save-panels show a network: give --checkpoint as well")


def choose_episodes(args: argparse.Namespace, config: Config, index: ClassIndex) -> list[list[EpisodeFiles]]:
    """Return one list for each seed, or the one of --episodes-from; writes --write-episodes."""
    root, count = Path(config.data.root), config.eval.episodes
    if args.episodes_from is not None:
        novel, shots = novel_classes(config.data), config.data.shots
        return [read_episodes(args.episodes_from, index, root=root, classes=novel, shots=shots)]
    samplers = [build_eval_sampler(config, index, seed) for seed in args.seeds]
    if args.write_episodes is not None:
        write_episodes(args.write_episodes, samplers[0], count, root=root, class_names=config.data.classes)
        print(f"episodes: {args.write_episodes}")
    return [[sampler(number) for number in range(count)] for sampler in samplers]


def predictors(network: TrainedNetwork | None, baselines: bool) -> dict[str, Predictor]:
    """Return the predictions to score: of the network at 0.5, at its calibrated threshold, and the baselines."""
    if network is None:
        return BASELINES
    logit = math.log(network.threshold / (1 - network.threshold))
    calibrated: dict[str, Predictor] = {"calibrated": lambda output: output.logits - logit} if logit else {}
    return NETWORK | calibrated | (BASELINES if baselines else {})


def choose_methods(
    args: argparse.Namespace,
    config: Config,
    hardware: Hardware,
    index: ClassIndex,
    episodes: list[EpisodeFiles],
    network: TrainedNetwork | None,
) -> Iterator[tuple[str, Method]]:
    """Yield what to evaluate, with its title: the checkpoint, the function or the folder, and the baselines."""
    if args.method is not None:
        yield args.method, FunctionMethod(load_function(args.method), args.method)
    if args.predictions is not None:
        yield str(args.predictions), FolderMethod(args.predictions, index, episodes, config.eval.square)
    if network is None and not args.baselines:
        return
    model = build_model(config)[0].to(hardware.device) if network is None else network.model
    yield "evaluation", NetworkMethod(model, config, hardware, predictors(network, args.baselines))
    if args.baselines:
        name = args.backbone or config.model.backbone
        if args.backbone is None:
            free = on_backbone(name, model.backbone, config.model.weights)
        else:
            free = build_training_free(name, weights=args.weights)
        yield "training-free", TrainingFreeMethod(TrainingFreeSegmenter(free, name, hardware))


def score(
    counts: dict[str, np.ndarray], episodes: list[list[EpisodeFiles]], config: Config, network: TrainedNetwork | None
) -> dict[str, Any]:
    """Score the network, at its calibrated threshold too, or the method, and the baselines, over the seeds."""
    names = {c: config.data.classes[c - 1] for c in novel_classes(config.data)}
    class_ids = np.array([[episode.class_id for episode in of_seed] for of_seed in episodes])
    found: dict[str, Any] = {}
    for name, rows in counts.items():
        seeds = rows.reshape(len(episodes), -1, 4)
        found[name] = over_seeds([scores(*seed, names) for seed in zip(seeds, class_ids, strict=True)])
        found[name]["miou"]["interval"] = interval(100 * resampled_miou(seeds, class_ids, len(names)))
    results: dict[str, Any] = found.pop("network", None) or found.pop("method", {})
    if network is not None and "calibrated" in found:
        results["calibrated"] = {"threshold": network.threshold, **found.pop("calibrated")}
    return results | ({"baselines": found} if found else {})


def describe(
    args: argparse.Namespace,
    config: Config,
    index: ClassIndex,
    network: TrainedNetwork | None,
    episodes: list[list[EpisodeFiles]],
) -> dict[str, Any]:
    """Describe what was evaluated, on which data."""
    trained = {} if network is None else network.trained
    together, names = [episode for of_seed in episodes for episode in of_seed], config.data.classes
    lines = episode_lines(together, index, root=Path(config.data.root), class_names=names)
    return {
        "dataset": config.data.dataset,
        "fold": config.data.fold,
        "folds": config.data.num_folds,
        "shots": config.data.shots,
        "backbone": config.model.backbone,
        "trained_on": None if network is None else network.trained_on,
        "protocol": protocol_of(dict(flatten(config.model_dump()))),
        "method": args.method or (args.predictions and str(args.predictions)),
        "episodes": len(episodes[0]),
        "episodes_sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
        "episode_classes": [names[episode.class_id - 1] for episode in together],
        "episodes_from": None if args.episodes_from is None else str(args.episodes_from),
        "seeds": args.seeds if args.episodes_from is None else [],
        "unit": "percent",
        "train_seed": trained.get("seed"),
        "config": config.model_dump() | trained,
        "checkpoint": args.checkpoint and str(args.checkpoint),
        "checkpoint_sha256": args.checkpoint and sha256_of(args.checkpoint),
        "list_sha256": index.list_sha256,
    }


if __name__ == "__main__":
    run_command(main)
