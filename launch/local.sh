#!/usr/bin/env bash
# Runs the program on this machine, from a fresh virtual environment the first time:
#   launch/local.sh [--config configs/X.py] [--workdir DIR] [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ! -e .venv/installed ]]; then  # not the folder: an installation may have been broken off
  "${PYTHON:-python3}" -m venv .venv
  .venv/bin/pip install --quiet -e .
  touch .venv/installed
fi
exec .venv/bin/python -m lance_jax.main "$@"
