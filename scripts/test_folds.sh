#!/usr/bin/env bash
# Evaluate all four folds on five seeds and print their table: bash scripts/test_folds.sh DATASET BACKBONE SHOT [ABLATION]
# [key=value ...]. GPUS and DRY_RUN as in train_folds.sh.
. "$(dirname "$0")/fold.sh"
require 3 "$@"
each_fold test "$@"
runs=()
for fold in 0 1 2 3; do
    fold_arguments "$1" "$2" "$fold" "$3" "${@:4}"
    runs+=("$run")
done
do_run python scripts/report.py "${runs[@]}"
