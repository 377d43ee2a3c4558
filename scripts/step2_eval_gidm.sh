#!/usr/bin/env bash
# Step 2: measure an inverse model and draw its attention.   e.g. path=ckpts/gidm/full
source "$(dirname "$0")/common.sh"
launch step2_gidm.eval "$@"
