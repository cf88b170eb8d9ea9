#!/usr/bin/env bash
# From a clone to a quantized checkpoint: sets up .venv, trains, freezes, saves, reloads, reports. About a minute on 2 cores
# after the installation. Arguments go to quickstart.py (--help).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
ensure_venv examples
cd "$ROOT"
exec "$VENV_PYTHON" scripts/quickstart.py "$@"
