#!/usr/bin/env bash
# Train one fold: bash scripts/train_fold.sh DATASET BACKBONE FOLD SHOT [key=value ...]
# e.g. bash scripts/train_fold.sh pascal resnet50 0 1. Interrupted, the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 4 ] || { sed -n 2,3p "$0" >&2; exit 2; }
config=configs/$1/$2_fold$3_$4shot.yaml
shift 4
exec python train.py --config "$config" resume=auto "$@"
