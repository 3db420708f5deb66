# Sourced by the scripts that train and evaluate folds. Their usage is the comment at their top.
# Where the quick start made an environment, it is used.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -x .venv/bin/python ]; then
    export PATH="$PWD/.venv/bin:$PATH"
elif [ -z "${DRY_RUN:-}" ] && ! command -v python >/dev/null; then
    echo "error: there is no python; run 'bash scripts/environment.sh requirements.txt', which makes .venv, first" >&2
    exit 2
fi

require() { # COUNT ARGUMENT...: end with the script's usage where there are fewer arguments
    [ $# -gt "$1" ] || usage
}

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/$(basename "$0")" >&2
    exit 2
}

# fold_arguments DATASET BACKBONE FOLD SHOT [ABLATION] [key=value ...] sets configs (a fold's YAML and the ablation's),
# run (its folder) and overrides.
fold_arguments() {
    local name=$2_fold$3_$4shot word
    configs=(configs/$1/$name.yaml) overrides=()
    run=runs/$1/$name
    for word in "${@:5}"; do
        case $word in
        *=*) overrides+=("$word") ;;
        *) configs+=(configs/ablation/$word.yaml) run=${run}_$word ;;
        esac
    done
    for word in "${overrides[@]}"; do
        case $word in
        seed=0) ;;
        seed=*) run=${run}_seed${word#seed=} ;;
        run_dir=*) echo "error: leave out $word; the run's folder is $run" >&2; exit 2 ;;
        esac
    done
    for word in "${configs[@]}"; do
        [ -e "$word" ] || { echo "error: there is no $word; ls configs/$1 configs/ablation shows what there is" >&2; exit 2; }
    done
}

do_run() { # COMMAND...: become it, which thus gets this script's signals, or with DRY_RUN print it
    if [ -n "${DRY_RUN:-}" ]; then
        echo "$*"
    else
        exec "$@"
    fi
}

# each_fold STEP DATASET BACKBONE SHOT [...]: scripts/STEP_fold.sh for folds 0 to 3, in turn or GPUS=0,1,2,3 side by side.
# A fold that fails does not stop the others; the exit code tells.
each_fold() {
    local step=$1 rest=("${@:5}") failed=() fold place gpus workers
    each() { bash "scripts/${step}_fold.sh" "$2" "$3" "$1" "$4" "${rest[@]}"; }
    if [ -z "${GPUS:-}" ] || [ -n "${DRY_RUN:-}" ]; then
        trap 'exit 130' INT
        for fold in 0 1 2 3; do
            each "$fold" "${@:2}" || failed+=("$fold")
        done
    else
        IFS=, read -ra gpus <<<"$GPUS"
        trap 'trap - INT TERM; kill 0' INT TERM
        for place in "${!gpus[@]}"; do
            ( # the folds of this GPU, in turn
                code=0
                for ((fold = place; fold < 4; fold += ${#gpus[@]})); do
                    fold_arguments "$2" "$3" "$fold" "$4" "${rest[@]}"
                    mkdir -p "$run"
                    log=$run/$step.log
                    echo "fold $fold on GPU ${gpus[place]}: $log"
                    CUDA_VISIBLE_DEVICES=${gpus[place]} each "$fold" "${@:2}" >>"$log" 2>&1 ||
                        { echo "error: fold $fold failed; its last words: $(tail -n 1 "$log")" >&2; code=1; }
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
}
