#!/usr/bin/env bash
# Lint and all tests, in two processes. Arguments go to pytest: bash scripts/test.sh -m "not slow" tests/test_bundle.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

cd "$ROOT"
"$PY" -m ruff check .
"$PY" -m pytest -q -n 2 --dist loadfile "$@"
