#!/usr/bin/env bash
# Install where needed, then lint and test.   scripts/test.sh [pytest arguments]
set -euo pipefail
[ -f "$(dirname "$0")/../.venv/installed" ] || "$(dirname "$0")/setup.sh"
source "$(dirname "$0")/common.sh"
ruff check .
exec python -m pytest -q "$@"
