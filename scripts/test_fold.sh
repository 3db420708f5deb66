#!/usr/bin/env bash
# Evaluate one trained fold on five seeds: bash scripts/test_fold.sh DATASET BACKBONE FOLD SHOT [key=value ...]
# Reads runs/DATASET/BACKBONE_foldFOLD_SHOTshot/best.pt and writes results.json beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 4 ] || { sed -n 2,3p "$0" >&2; exit 2; }
name=$2_fold$3_$4shot
config=configs/$1/$name.yaml
run=runs/$1/$name
shift 4
exec python test.py --config "$config" --checkpoint "$run/best.pt" --seeds 0 1 2 3 4 --out "$run/results.json" "$@"
