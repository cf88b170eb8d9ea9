#!/usr/bin/env bash
# Lint and tests, in an environment of their own. Arguments go to pytest, e.g. `scripts/test.sh -m slow` or `scripts/test.sh -k monarch`.
# GRUQAT_TRANSFORMERS=5.17.0 tests against the oldest supported transformers; GRUQAT_TEST_WORKERS=0 runs in one process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
ensure_venv dev
cd "$ROOT"
if [ "$(uname -s)" = Linux ] && [ -z "${GRUQAT_TRANSFORMERS:-}" ] && ! "$VENV_PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)'; then
    _pip_install -r requirements/interpreter.txt || echo "== no triton here: the kernels are not tested in its interpreter"
fi

lint=0
if [ -z "${GRUQAT_TRANSFORMERS:-}" ]; then
    echo "== ruff"
    "$VENV_PYTHON" -m ruff check --output-format concise . || lint=$?
fi

cores="$("$VENV_PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
workers="${GRUQAT_TEST_WORKERS:-$((cores > 8 ? 8 : cores))}"
# As pip does with a package that it installs: imports are judged as users have them, also where PYTHONDONTWRITEBYTECODE is set.
"$VENV_PYTHON" -m compileall -q gruqat_hf
versions="$("$VENV_PYTHON" -c 'from importlib.metadata import version as v; print("torch", v("torch") + ", transformers", v("transformers"))')"
echo "== pytest in $workers processes, $versions"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$VENV_PYTHON" -m pytest -n "$workers" --dist worksteal "$@"
if [ "$lint" -ne 0 ]; then
    echo "== the tests passed, but ruff has complaints (above)" >&2
fi
exit "$lint"
