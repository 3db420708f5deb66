#!/usr/bin/env bash
# Evaluate one trained fold on five seeds: bash scripts/test_fold.sh DATASET BACKBONE FOLD SHOT [ABLATION] [key=value ...]
# Reads the run's best.pt and writes results.json beside it; does nothing where that stands already.
. "$(dirname "$0")/fold.sh"
require 4 "$@"
fold_arguments "$@"
if [ "$run/results.json" -nt "$run/best.pt" ]; then
    echo "$run is evaluated"
    exit
fi
do_run python test.py --config "${configs[@]}" --checkpoint "$run/best.pt" --seeds 0 1 2 3 4 --out "$run/results.json" \
    "${overrides[@]}"
