#!/usr/bin/env bash
# Train all four folds, then evaluate them: bash scripts/train_folds.sh DATASET BACKBONE SHOT [ABLATION] [key=value ...]
# e.g. bash scripts/train_folds.sh pascal resnet50 1. One fold after the other, or GPUS=0,1,2,3 for a fold a GPU, each
# with its screen in train.log of its run. What is finished is skipped and what was interrupted continues.
# DRY_RUN=1 prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { sed -n 2,5p "$0" >&2; exit 2; }
bash scripts/each_fold.sh scripts/train_fold.sh "$@"
exec bash scripts/test_folds.sh "$@"
