#!/usr/bin/env bash
# Is my GPU set up right, and how fast is it? bash scripts/gpu_check.sh [--out gpu_check.md] [--small]
# Tests, a training on the GPU against one on the CPU, and throughput, on one Markdown page. Half an hour or so.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt tests/requirements.txt
python scripts/gpu_check.py "$@"
