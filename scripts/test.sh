#!/usr/bin/env bash
# Fast tests, lint and types, from a fresh clone: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt tests/requirements.txt
export OMP_NUM_THREADS=1 # each worker of pytest-xdist uses one core
ruff check .
ruff format --check .
pyrefly check --config .pyrefly.toml
python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
