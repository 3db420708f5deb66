# Sourced by the scripts that train and evaluate. fold_arguments DATASET BACKBONE FOLD SHOT [ABLATION] [key=value ...]
# sets: configs (a fold's YAML and the ablation's), run (its folder) and overrides. `do_run` ends the script by becoming
# a command, which thus gets its signals, or with DRY_RUN prints it.
# Where the quick start made an environment, it is used.
if [ -x .venv/bin/python ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi

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

do_run() {
    if [ -n "${DRY_RUN:-}" ]; then
        echo "$*"
    else
        exec "$@"
    fi
}
