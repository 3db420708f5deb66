#!/usr/bin/env bash
# Table 3 on one data set: bash scripts/ladder.sh [CONFIG.yaml] [key=value ...]
# Trains and evaluates the table's rows on folds 0 to 3 from training seeds 0, 1 and 2. CONFIG is the embedded data set's
# by default; its data.fold is set. Runs that have results are skipped, so the command can be stopped and continued.
# Part of it: ROWS="bgem full printed+bgem_doem ours+model.fem_prior=false" (files of configs/ablation and settings, joined by
# +; full is none), FOLDS="0 2", SEEDS="0". EPISODES=1000 are evaluated on each fold. DIAGNOSE=1 also runs
# scripts/diagnose.py on each run. DRY_RUN=1 prints the commands.
# Then: python scripts/report.py runs/ladder --lines scripts/results.jsonl
. "$(dirname "$0")/fold.sh"
config=configs/synthetic/efficientnet_lite0_fold0_1shot.yaml
if [[ ${1:-} == *.yaml ]]; then
    config=$1
    shift
fi
[ -e "$config" ] || { echo "error: $config does not exist" >&2; exit 2; }
trap 'exit 130' INT
[[ ! $config =~ ^configs/(synthetic(_small)?)/ ]] ||
    (do_run python scripts/make_synthetic.py ${BASH_REMATCH[2]:+--small} --out "data/${BASH_REMATCH[1]}") || exit
name=$(basename "$(dirname "$config")")/$(basename "${config/_fold[0-9]/}" .yaml)
failed=()
for seed in ${SEEDS:-0 1 2}; do
    for row in ${ROWS:-pfenet bgem bgem_doem full}; do
        for fold in ${FOLDS:-0 1 2 3}; do
            run=runs/ladder/$name/${row}_fold${fold}_seed$seed
            [ ! -e "$run/results.json" ] || continue
            files=("$config") settings=("data.fold=$fold")
            for part in ${row//+/ }; do
                case $part in
                full) ;;
                *=*) settings+=("$part") ;;
                *) files+=("configs/ablation/$part.yaml") ;;
                esac
            done
            common=(--config "${files[@]}" "${settings[@]}" "$@")
            trained=("${common[@]}" --checkpoint "$run/best.pt" --episodes "${EPISODES:-1000}")
            (do_run python train.py "${common[@]}" "seed=$seed" "run_dir=$run" resume=auto) &&
                { [ -z "${DIAGNOSE:-}" ] || (do_run python scripts/diagnose.py "${trained[@]}" --out "$run/diagnosis.json"); } &&
                (do_run python test.py "${trained[@]}" --out "$run/results.json") || failed+=("$run")
        done
    done
done
[ ${#failed[@]} -eq 0 ] || { echo "error: without results: ${failed[*]}; the same command tries them again" >&2; exit 1; }
