#!/usr/bin/env bash
# All folds of a table as a Slurm array: sbatch scripts/slurm.sh DATASET BACKBONE SHOT [ABLATION] [key=value ...]
# Preempted or out of time, a task saves, goes back into the queue, and continues where it was.
#SBATCH --job-name=ntrenet
#SBATCH --array=0-3
#SBATCH --gpus=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=48G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=runs/slurm-%A_%a.log
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ $# -ge 3 ] || { sed -n 2,3p "$0" >&2; exit 2; }
fold=${SLURM_ARRAY_TASK_ID:?run this with sbatch}

bash scripts/train_fold.sh "$1" "$2" "$fold" "$3" "${@:4}" &
child=$!
trap 'kill -TERM "$child"' TERM
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # the trap ended the first wait; the run is saving
    wait "$child"
    code=$?
done
if [ "$code" -eq 143 ]; then
    exec scontrol requeue "${SLURM_ARRAY_JOB_ID}_$fold"
fi
[ "$code" -eq 0 ] || exit "$code"
exec bash scripts/test_fold.sh "$1" "$2" "$fold" "$3" "${@:4}"
