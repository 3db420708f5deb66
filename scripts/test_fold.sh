#!/usr/bin/env bash
# Evaluate one trained fold on five seeds: bash scripts/test_fold.sh DATASET BACKBONE FOLD SHOT [ABLATION] [key=value ...]
# Reads the run's best.pt and writes results.json beside it; does nothing where that stands already.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/fold.sh
[ $# -ge 4 ] || { sed -n 2,3p "$0" >&2; exit 2; }
fold_arguments "$@"
if [ "$run/results.json" -nt "$run/best.pt" ]; then
    echo "$run is evaluated"
    exit
fi
do_run python test.py --config "${configs[@]}" --checkpoint "$run/best.pt" --seeds 0 1 2 3 4 --out "$run/results.json" \
    "${overrides[@]}"
