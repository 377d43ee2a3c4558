#!/usr/bin/env bash
# Make the virtual environment .venv and install the requirements.
#
#   scripts/setup.sh
#   LOCK=1 PYTHON=python3.11 scripts/setup.sh     the exact versions that were tested, for Python 3.11
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
requirements="requirements${LOCK:+-lock}.txt"

if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
    echo "Python 3.10 to 3.13 is needed; name one with PYTHON=" >&2
    exit 1
fi
if [ ! -f .venv/bin/activate ]; then
    "$python" -m venv .venv
fi
# pip warns about parts of the lock file that do not apply to this machine; these lines are left out.
.venv/bin/python -m pip install --quiet --progress-bar off --no-compile -r "$requirements" \
    2> >(grep -v 'is ignored' >&2)
touch .venv/installed
