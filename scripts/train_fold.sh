#!/usr/bin/env bash
# Train one fold: bash scripts/train_fold.sh DATASET BACKBONE FOLD SHOT [ABLATION] [key=value ...]
# e.g. bash scripts/train_fold.sh pascal resnet50 0 1, or with pfenet after it for configs/ablation/pfenet.yaml.
# If it was interrupted, the same command continues; if it is finished, it does nothing.
. "$(dirname "$0")/fold.sh"
require 4 "$@"
fold_arguments "$@"
if grep -qs '"finished"' "$run/run.json"; then
    echo "$run is trained"
    exit
fi
do_run python train.py --config "${configs[@]}" "run_dir=$run" resume=auto "${overrides[@]}"
