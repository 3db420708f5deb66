#!/usr/bin/env bash
# bash scripts/each_fold.sh SCRIPT DATASET BACKBONE SHOT [...]: SCRIPT for folds 0 to 3, in turn or GPUS=0,1,2,3 side by side.
# A fold that fails does not stop the others; the exit code tells.
set -uo pipefail
cd "$(dirname "$0")/.."
. scripts/fold.sh
script=$1 dataset=$2 backbone=$3 shot=$4
rest=("${@:5}")
failed=()

if [ -z "${GPUS:-}" ] || [ -n "${DRY_RUN:-}" ]; then
    trap 'exit 130' INT
    for fold in 0 1 2 3; do
        bash "$script" "$dataset" "$backbone" "$fold" "$shot" "${rest[@]}" || failed+=("$fold")
    done
else
    IFS=, read -ra gpus <<<"$GPUS"
    trap 'trap - INT TERM; kill 0' INT TERM
    for place in "${!gpus[@]}"; do
        ( # the folds of this GPU, in turn
            code=0
            for ((fold = place; fold < 4; fold += ${#gpus[@]})); do
                fold_arguments "$dataset" "$backbone" "$fold" "$shot" "${rest[@]}"
                mkdir -p "$run"
                log=$run/$(basename "$script" _fold.sh).log
                echo "fold $fold on GPU ${gpus[place]}: $log"
                CUDA_VISIBLE_DEVICES=${gpus[place]} bash "$script" "$dataset" "$backbone" "$fold" "$shot" "${rest[@]}" \
                    >>"$log" 2>&1 || { echo "error: fold $fold failed; its last words: $(tail -n 1 "$log")" >&2; code=1; }
            done
            exit $code
        ) &
        workers[place]=$!
    done
    for place in "${!gpus[@]}"; do
        wait "${workers[place]}" || failed+=("of GPU ${gpus[place]}")
    done
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "error: folds ${failed[*]} failed; mend what they say, then run the same command again" >&2
    exit 1
fi
