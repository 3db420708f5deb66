# Sourced by the scripts that train and evaluate folds; the comment at the top of each is its usage.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ ! -x .venv/bin/python ] || export PATH="$PWD/.venv/bin:$PATH"
if [ -z "${DRY_RUN:-}" ] && ! command -v python >/dev/null; then
    echo "error: there is no python; run 'bash scripts/environment.sh requirements.txt' first, which makes .venv" >&2
    exit 2
fi

require() { # COUNT ARGUMENT...: end with the script's usage if there are fewer than COUNT arguments
    [ $# -gt "$1" ] || usage
}

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/$(basename "$0")" >&2
    exit 2
}

# fold_arguments DATASET BACKBONE FOLD SHOT [ABLATION] [key=value ...] sets configs (the fold's YAML and the ablation's),
# overrides, and run (the run folder, named after all that makes another network or another seed).
fold_arguments() {
    local name=$2_fold$3_$4shot word
    configs=(configs/$1/$name.yaml) overrides=() run=runs/$1/$name
    for word in "${@:5}"; do
        case $word in
        run_dir=*) echo "error: leave out $word; the run folder gets its name from the other arguments" >&2; exit 2 ;;
        seed=0) ;;
        seed=*) run+=_seed${word#seed=} ;;
        model.*=* | loss.*=*) word=${word#*.} run+=_${word/=/_} ;;
        *=*) ;;
        *) configs+=(configs/ablation/$word.yaml) run+=_$word ;;
        esac
    done
    for word in "${@:5}"; do [[ $word != *=* ]] || overrides+=("$word"); done
    for word in "${configs[@]}"; do
        [ -e "$word" ] || { echo "error: $word does not exist; see configs/$1 and configs/ablation" >&2; exit 2; }
    done
}

do_run() { # COMMAND...: exec it, so that it gets this script's signals, or print it if DRY_RUN is set
    [ -z "${DRY_RUN:-}" ] || { echo "$*"; exit; }
    exec "$@"
}

# each_fold STEP DATASET BACKBONE SHOT [...] runs scripts/STEP_fold.sh for folds 0 to 3: one after the other, or with
# GPUS=0,1,2,3 one on each GPU. A fold that fails does not stop the others.
each_fold() {
    local step=$1 rest=("${@:5}") failed=0 gpus=() fold place pid pids=()
    one_fold() { bash "scripts/${step}_fold.sh" "$2" "$3" "$1" "$4" "${rest[@]}"; }
    [ -n "${DRY_RUN:-}" ] || IFS=, read -ra gpus <<<"${GPUS:-}"
    if [ ${#gpus[@]} -eq 0 ]; then
        trap 'exit 130' INT
        for fold in 0 1 2 3; do
            one_fold "$fold" "${@:2}" || { echo "error: fold $fold failed" >&2; failed=1; }
        done
    else
        trap 'trap - INT TERM; kill 0' INT TERM
    fi
    for place in "${!gpus[@]}"; do
        (
            code=0
            for ((fold = place; fold < 4; fold += ${#gpus[@]})); do
                fold_arguments "$2" "$3" "$fold" "$4" "${rest[@]}"
                log=$run/$step.log
                mkdir -p "$run"
                echo "fold $fold on GPU ${gpus[place]}: $log"
                CUDA_VISIBLE_DEVICES=${gpus[place]} one_fold "$fold" "${@:2}" >>"$log" 2>&1 ||
                    { echo "error: fold $fold failed: $(tail -n 1 "$log")" >&2; code=1; }
            done
            exit $code
        ) &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    [ $failed -eq 0 ] || { echo "error: correct this, then run the same command again" >&2; exit 1; }
}
