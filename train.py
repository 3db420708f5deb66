"""Train one fold: python train.py --config configs/pascal/resnet50_fold0_1shot.yaml [ABLATION.yaml] [key=value ...]

Writes into run_dir: config.yaml, run.json (environment, hashes, starts), metrics.jsonl (one line for each evaluation),
last.pt and the checkpoint before it, best.pt and TensorBoard events. resume=auto continues exactly; Ctrl-C, SIGTERM and
a closed terminal save first. torchrun --nproc_per_node=N train.py ... trains on N processes, with the same result.
"""

from util.command import run_command

import argparse
import itertools
from contextlib import closing

from util.config import add_config_argument, load_config, parse_arguments
from util.engine.build import open_data, select_hardware, training_batches
from util.engine.distributed import run_folder
from util.engine.log import TrainingLog
from util.engine.training import announce, start_or_resume, stoppable, train_epoch
from util.engine.validation import finish_best, validate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    args, overrides = parse_arguments(parser)
    config = load_config(args.config, overrides)
    with run_folder(config):
        hardware = select_hardware(config)
        data = open_data(config)
        training = start_or_resume(config, hardware, data.list_sha256)
        epoch_steps, epochs, total_steps = config.train.schedule(len(data.train_sampler))
        announce(training, data, total_steps)

        batches = training_batches(config, data.train_sampler, start=training.step, stop=total_steps)
        with closing(TrainingLog(training, total_steps)) as log, closing(batches), stoppable(training, log) as stop:
            while training.finished_step < total_steps:
                epoch = training.finished_step // epoch_steps + 1
                end = min(epoch * epoch_steps, total_steps)
                rest_of_epoch = itertools.islice(batches, end - training.step)
                train_epoch(training, log.timed(rest_of_epoch, f"epoch {epoch}/{epochs}"), total_steps, log, stop)
                due = epoch % config.eval.every == 0 or end == total_steps
                miou = validate(training, data, log, stop) if due else -1.0
                improved = training.finish_epoch(end, miou)
                if improved if config.eval.select == "miou" else end == total_steps:
                    training.save_best()
                training.save_last()
                stop.check()
            finish_best(training, data, log, stop)


if __name__ == "__main__":
    run_command(main)
