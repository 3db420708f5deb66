#!/usr/bin/env bash
# From a fresh clone to a trained and evaluated NTRENet on a CPU: bash scripts/quickstart.sh [configs/ablation/FILE.yaml]
# Leaves runs/quickstart/results.json, runs/quickstart/panel.png and the checkpoints, with a FILE in runs/quickstart_FILE.
# Run again, it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt
cores=$(python -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
export OMP_NUM_THREADS=$((cores > 1 ? cores - 1 : 1)) # one core is left to the loader
config=(configs/synthetic/efficientnet_lite0_fold0_1shot.yaml "$@")
run=runs/quickstart
[ $# -eq 0 ] || run+=_$(basename "$1" .yaml)
python scripts/make_synthetic.py --out data/synthetic
python train.py --config "${config[@]}" "run_dir=$run" resume=auto
python test.py --config "${config[@]}" --checkpoint "$run/best.pt" --baselines \
    --out "$run/results.json" --panel "$run/panel.png"
