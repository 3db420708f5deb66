#!/usr/bin/env bash
# Train all four folds, then evaluate them: bash scripts/train_folds.sh DATASET BACKBONE SHOT [ABLATION] [key=value ...]
# e.g. bash scripts/train_folds.sh pascal resnet50 1. One fold after the other, or with GPUS=0,1,2,3 one on each GPU, with
# its output in train.log of its run folder. Finished folds are skipped, interrupted ones continue. DRY_RUN=1 prints the
# commands.
. "$(dirname "$0")/fold.sh"
require 3 "$@"
each_fold train "$@"
exec bash scripts/test_folds.sh "$@"
