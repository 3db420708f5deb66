"""Evaluate a checkpoint on the novel classes of its fold.

    python test.py --config configs/pascal/resnet50_fold0_1shot.yaml --checkpoint runs/.../best.pt
                   [--shots 5] [--episodes 1000] [--seeds 0 1 2 3 4] [--out results.json] [key=value ...]

Any checkpoint evaluates at any number of shots. Several seeds give mean and standard deviation.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.ntrenet import NTRENet
from model.weights import sha256_of
from util.build import build_eval_loader, build_eval_sampler, build_index, build_model, select_hardware
from util.checkpoint import load_checkpoint, require_same, saved_config
from util.class_index import ClassIndex
from util.config import Config, add_config_argument, load_config, parse_arguments
from util.engine import BASELINES, NETWORK, evaluate
from util.episodes import Episodes, RecordedEpisodes, write_episodes
from util.errors import UserError, run_command
from util.folds import novel_classes
from util.metrics import Scores
from util.record import environment, over_seeds, peak_memory_mib, require_writable, write_json
from util.visualize import episode_picture, save_picture

PANEL_ROWS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--shots", type=int, help="supports an episode; by default the config's")
    parser.add_argument("--episodes", type=int, help="episodes a seed; by default the config's eval.episodes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one set of episodes each")
    parser.add_argument("--out", type=Path, help="write results here, as JSON")
    parser.add_argument("--baselines", action="store_true", help="also score two predictions that need no training")
    parser.add_argument("--write-episodes", type=Path, metavar="F", help="write the seed's episodes here first")
    parser.add_argument("--episodes-from", type=Path, metavar="F", help="evaluate exactly the episodes of this file")
    parser.add_argument("--panel", type=Path, help="write a picture of a few episodes here, as PNG")
    args, overrides = parse_arguments(parser)
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds must be different whole numbers from 0 on, got {args.seeds}")
    if args.episodes_from is not None and (args.write_episodes or args.episodes or len(args.seeds) > 1):
        raise UserError("--episodes-from settles the episodes: leave out --write-episodes, --episodes and --seeds")
    if args.write_episodes is not None and len(args.seeds) > 1:
        raise UserError("--write-episodes writes the episodes of one seed; give one")
    for path, suffix in ((args.out, ".json"), (args.panel, ".png"), (args.write_episodes, ".jsonl")):
        if path is not None:
            require_writable(path, suffix)
    overrides += [f"data.shots={args.shots}"] if args.shots is not None else []
    overrides += [f"eval.episodes={args.episodes}"] if args.episodes is not None else []
    config = load_config(args.config, overrides)
    hardware = select_hardware(config)
    index = build_index(config, "val")
    sources = episode_sources(args, config, index)
    model, train_seed = load_model(config, args.checkpoint)
    model.to(hardware.device)

    predictors = NETWORK | (BASELINES if args.baselines else {})
    runs: list[dict[str, Scores]] = []
    started = time.perf_counter()
    for title, episodes, count in sources:
        loader = build_eval_loader(config, episodes, count)
        with tqdm(total=count, desc=title, unit="episode", dynamic_ncols=True) as bar:
            runs.append(evaluate(model, loader, config=config, hardware=hardware, predictors=predictors, bar=bar))
    seconds = time.perf_counter() - started

    results: dict[str, Any] = {
        "dataset": config.data.dataset,
        "fold": config.data.fold,
        "folds": config.data.num_folds,
        "shots": config.data.shots,
        "backbone": config.model.backbone,
        "episodes": sources[0][2],
        "episodes_from": None if args.episodes_from is None else str(args.episodes_from),
        "seeds": args.seeds if args.episodes_from is None else [],
        "unit": "percent",
        **over_seeds([run["network"] for run in runs]),
        "train_seed": train_seed,
        "config": config.model_dump(),
        "checkpoint": str(args.checkpoint),
        "checkpoint_sha256": sha256_of(args.checkpoint),
        "list_sha256": index.list_sha256,
        "seconds": seconds,
        "peak_memory_mib": peak_memory_mib(hardware.device),
        "dtype": str(hardware.precision).removeprefix("torch."),
        "environment": environment(hardware.device),
    }
    if args.baselines:
        scored = {name: over_seeds([run[name] for run in runs])["miou"] for name in BASELINES}
        results["baselines"] = {name: {"miou": miou["mean"], "std": miou["std"]} for name, miou in scored.items()}
    print(table(results))
    if args.out is not None:
        write_json(args.out, results)
        print(f"results: {args.out}")
    if args.panel is not None:
        _, episodes, count = sources[0]
        loader = build_eval_loader(config, episodes, min(PANEL_ROWS, count))
        picture = episode_picture(model, loader, rows=PANEL_ROWS, hardware=hardware)
        save_picture(args.panel, picture)
        print(f"picture: {args.panel}")


def episode_sources(args: argparse.Namespace, config: Config, index: ClassIndex) -> list[tuple[str, Episodes, int]]:
    """Title, episodes and their number: one entry a seed, or the file of --episodes-from; writes --write-episodes."""
    root = Path(config.data.root)
    if args.episodes_from is not None:
        novel, shots = novel_classes(config.data), config.data.shots
        recorded = RecordedEpisodes(args.episodes_from, index, root=root, classes=novel, shots=shots)
        return [(args.episodes_from.name, recorded, len(recorded))]
    count = config.eval.episodes
    samplers = [build_eval_sampler(config, index, seed) for seed in args.seeds]
    if args.write_episodes is not None:
        write_episodes(args.write_episodes, samplers[0], count, root=root, class_names=config.data.classes)
        print(f"episodes: {args.write_episodes}")
    return [(f"seed {sampler.seed}", sampler, count) for sampler in samplers]


def load_model(config: Config, path: Path) -> tuple[NTRENet, int | None]:
    """The model of a checkpoint and its training seed; it must have been trained for this config's fold and network.

    A converted checkpoint lists what it does not know of its training ('unknown'); that is taken from ``config``.
    """
    checkpoint = load_checkpoint(path)
    saved, unknown = saved_config(checkpoint, path), checkpoint.get("unknown", ())
    require_same(saved, config, path, unknown=unknown)
    model, _ = build_model(config, "random", deep_stem=checkpoint["weights"]["stem"] == "deep")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(
            f"checkpoint {path} does not fit its own config: {str(error).splitlines()[1].strip()}"
        ) from error
    if "data.fold" in unknown:
        print(
            f"note: checkpoint {path} does not say which fold it was trained on;"
            f" it is tested on fold {config.data.fold} as given"
        )
    return model, None if "seed" in unknown else saved.seed


def table(results: dict[str, Any]) -> str:
    """The results as a person reads them."""

    def cell(score: dict[str, Any]) -> str:
        return f"{score['mean']:5.1f}" + (f" ± {score['std']:.1f}" if len(results["seeds"]) > 1 else "")

    width = max(len(name) for name in (*results["per_class"], "all foreground"))
    lines = [
        "",
        f"{results['dataset']} fold {results['fold']} of {results['folds']}, {results['shots']}-shot,"
        f" {results['backbone']}: {results['episodes']} episodes,"
        f" {results['episodes_from'] or 'seeds ' + ', '.join(map(str, results['seeds']))}",
        *(f"  {name:{width}}  {iou:5.1f}" for name, iou in results["per_class"].items()),
        f"  {'mIoU':{width}}  {cell(results['miou'])}   (this fold alone, not the mean of folds)",
        f"  {'FB-IoU':{width}}  {cell(results['fb_iou'])}",
        f"  {'precision':{width}}  {cell(results['precision'])}",
    ]
    for name, baseline in results.get("baselines", {}).items():
        title = {"all_foreground": "all foreground", "prior": "prior at 0.5"}[name]
        lines.append(f"  {title:{width}}  {baseline['miou']:5.1f}   mIoU without training, same episodes")
    lines.append(f"  {results['seconds']:.0f} s, peak memory {results['peak_memory_mib']:.0f} MiB")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
