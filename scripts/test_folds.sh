#!/usr/bin/env bash
# Evaluate all four folds on five seeds and print their table: bash scripts/test_folds.sh DATASET BACKBONE SHOT [ABLATION]
# [key=value ...]. GPUS and DRY_RUN as in train_folds.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/fold.sh
[ $# -ge 3 ] || { sed -n 2,3p "$0" >&2; exit 2; }
bash scripts/each_fold.sh scripts/test_fold.sh "$@"
results=()
for fold in 0 1 2 3; do
    fold_arguments "$1" "$2" "$fold" "$3" "${@:4}"
    results+=("$run/results.json")
done
do_run python scripts/fold_table.py "${results[@]}"
