#!/usr/bin/env bash
# All folds of a table as a Slurm array: sbatch scripts/slurm.sh DATASET BACKBONE SHOT [ABLATION] [key=value ...]
# If a task is preempted or out of time, it saves, requeues itself and continues later.
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
while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal ends a wait while the run is still saving
wait "$child" # again, for the run's own exit code
code=$?
[ "$code" -ne 143 ] || exec scontrol requeue "${SLURM_ARRAY_JOB_ID}_$fold"
[ "$code" -eq 0 ] || exit "$code"
exec bash scripts/test_fold.sh "$1" "$2" "$fold" "$3" "${@:4}"
