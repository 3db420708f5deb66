#!/usr/bin/env bash
# Table 3 on one data set: bash scripts/ladder.sh [CONFIG.yaml] [key=value ...]
# Trains and evaluates the table's rows on folds 0 to 3 from training seeds 0, 1 and 2; without a CONFIG on the embedded data
# set. Any other config serves as well; its data.fold is set. What has results is skipped, so that the command can be stopped
# and continued. A part: ROWS="bgem full" (files of configs/ablation; full is none), FOLDS="0 2", SEEDS="0". A fold is
# evaluated on EPISODES=1000. DIAGNOSE=1 also runs scripts/diagnose.py on each. DRY_RUN=1 prints the commands.
# Then: python scripts/report.py runs/ladder --lines scripts/results.jsonl
. "$(dirname "$0")/fold.sh"
config=configs/synthetic/efficientnet_lite0_fold0_1shot.yaml
if [[ ${1:-} == *.yaml ]]; then
    config=$1
    shift
fi
trap 'exit 130' INT
for file in "$config" $(for row in ${ROWS:-}; do [ "$row" = full ] || echo "configs/ablation/$row.yaml"; done); do
    [ -e "$file" ] || { echo "error: there is no $file" >&2; exit 2; }
done
case $config in configs/synthetic/*) (do_run python scripts/make_synthetic.py --out data/synthetic) || exit ;; esac
name=$(basename "$(dirname "$config")")/$(basename "${config/_fold[0-9]/}" .yaml)
failed=()
for seed in ${SEEDS:-0 1 2}; do
    for row in ${ROWS:-pfenet bgem bgem_doem full}; do
        for fold in ${FOLDS:-0 1 2 3}; do
            run=runs/ladder/$name/${row}_fold${fold}_seed$seed
            [ -e "$run/results.json" ] && continue
            same=(--config "$config")
            [ "$row" = full ] || same+=("configs/ablation/$row.yaml")
            same+=("data.fold=$fold" "$@")
            tested=("${same[@]}" --checkpoint "$run/best.pt" --episodes "${EPISODES:-1000}")
            (do_run python train.py "${same[@]}" "seed=$seed" "run_dir=$run" resume=auto) &&
                { [ -z "${DIAGNOSE:-}" ] || (do_run python scripts/diagnose.py "${tested[@]}" --out "$run/diagnosis.json"); } &&
                (do_run python test.py "${tested[@]}" --out "$run/results.json") || failed+=("$run")
        done
    done
done
[ ${#failed[@]} -eq 0 ] || { echo "error: without results: ${failed[*]}; the same command tries them again" >&2; exit 1; }
