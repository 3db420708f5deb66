#!/usr/bin/env bash
# Evaluate one trained fold on five seeds: bash scripts/test_fold.sh DATASET BACKBONE FOLD SHOT [ABLATION] [key=value ...]
# Reads best.pt of the run and writes results.json next to it; does nothing if results.json is newer.
. "$(dirname "$0")/fold.sh"
require 4 "$@"
fold_arguments "$@"
if [ "$run/results.json" -nt "$run/best.pt" ]; then
    echo "$run is evaluated"
    exit
fi
do_run python test.py --config "${configs[@]}" --checkpoint "$run/best.pt" --seeds 0 1 2 3 4 --out "$run/results.json" \
    "${overrides[@]}"
