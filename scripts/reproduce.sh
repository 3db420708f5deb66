#!/usr/bin/env bash
# Train and evaluate a table or figure of the paper: bash scripts/reproduce.sh table1|table2|table3|table4|fig6
#     [DATASET BACKBONE] [key=value ...]
# Tables 3 and 4 and figure 6 take another data set and backbone, such as: table3 synthetic efficientnet_lite0.
# SEEDS="0 1" trains each network from several seeds; GPUS as in train_folds.sh; DRY_RUN=1 prints every command.
# Finished folds are skipped. Then: python scripts/report.py runs --out report.md
. "$(dirname "$0")/fold.sh"
require 1 "$@"
table=$1 dataset=pascal backbone=resnet50 failed=0
shift
if [ $# -ge 2 ] && [[ $1 != *=* && $2 != *=* ]]; then
    dataset=$1 backbone=$2
    shift 2
fi
overrides=("$@")
trap 'exit 130' INT
folds() { # SHOT [ABLATION or key=value]
    local seed
    for seed in ${SEEDS:-0}; do
        bash scripts/train_folds.sh "$dataset" "$backbone" "$@" "seed=$seed" "${overrides[@]}" || failed=1
    done
}
case $table in
table1) for backbone in vgg16_bn resnet50 resnet101; do folds 1; folds 5; done ;;
table2) dataset=coco; for backbone in resnet50 resnet101; do folds 1; folds 5; done ;;
table3) for ablation in pfenet bgem bgem_doem; do folds 1 $ablation; done; folds 1 ;;
table4) for ablation in negatives_non_target negatives_bg; do folds 1 $ablation; done; folds 1 ;;
fig6) for channels in 128 384 512 640 768; do folds 1 model.prototype_channels=$channels; done; folds 1 ;;
*) usage ;;
esac
exit $failed
