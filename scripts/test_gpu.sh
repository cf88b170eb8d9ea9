#!/usr/bin/env bash
# The tests marked gpu, on a CUDA machine, with the Python at hand (PYTHON names another). Arguments go to pytest.
# GRUQAT_TEST_WORKERS processes share the GPU, as most of the time goes into compiling kernels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
"$python" - <<'PY'
import sys
from importlib.metadata import version

import torch

if not torch.cuda.is_available():
    sys.exit("scripts/test_gpu.sh needs a CUDA device")
print(f"== {torch.cuda.get_device_name()}, " + ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "transformers")))
PY
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
cores="$("$python" -c 'import os; print(len(os.sched_getaffinity(0)))')"
workers="${GRUQAT_TEST_WORKERS:-$((cores > 8 ? 8 : cores))}"
parallel=()
if "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n "$workers" --dist worksteal); fi
exec "$python" -m pytest -m gpu "${parallel[@]}" "$@"
