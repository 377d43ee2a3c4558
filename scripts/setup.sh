#!/usr/bin/env bash
# Make .venv and install.   PYTHON=python3.11 LOCK=1 scripts/setup.sh   (LOCK=1: the exact tested versions, Python 3.11)
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { echo "Python 3.10 to 3.13 is needed; set PYTHON=" >&2; exit 1; }
[ -f .venv/bin/activate ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --progress-bar off --no-compile -r "requirements${LOCK:+-lock}.txt" 2> >(grep -v 'is ignored' >&2)
touch .venv/installed
