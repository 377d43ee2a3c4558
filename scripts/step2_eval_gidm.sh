#!/usr/bin/env bash
# Step 2: measure an inverse model and draw its attention.
#
#   scripts/step2_eval_gidm.sh path=ckpts/gidm/full
source "$(dirname "$0")/common.sh"
launch step2_gidm.eval "$@"
