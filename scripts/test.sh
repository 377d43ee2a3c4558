#!/usr/bin/env bash
# Install where needed, then lint and test.   scripts/test.sh [pytest arguments]
set -euo pipefail
if [ ! -f "$(dirname "$0")/../.venv/installed" ]; then
    "$(dirname "$0")/setup.sh"
fi
source "$(dirname "$0")/common.sh"
ruff check .
exec python -m pytest -q "$@"
