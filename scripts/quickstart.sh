#!/usr/bin/env bash
# From a fresh clone to a trained and evaluated NTRENet on a CPU: bash scripts/quickstart.sh [configs/ablation/FILE.yaml ...]
# Writes results.json, panel.png and checkpoints to runs/quickstart, or to runs/quickstart_FILE. The same command continues
# an interrupted run.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt
cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
export OMP_NUM_THREADS=$((cores > 1 ? cores - 1 : 1)) # one core is left for the loader
config=(configs/synthetic/efficientnet_lite0_fold0_1shot.yaml "$@")
run=runs/quickstart
for file in "$@"; do run+=_$(basename "$file" .yaml); done
python scripts/make_synthetic.py --out data/synthetic
python train.py --config "${config[@]}" "run_dir=$run" resume=auto
python test.py --config "${config[@]}" --checkpoint "$run/best.pt" --baselines \
    --out "$run/results.json" --panel "$run/panel.png"
