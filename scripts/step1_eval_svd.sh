#!/usr/bin/env bash
# Step 1: measure a forward model and draw its forecasts.
#
#   scripts/step1_eval_svd.sh path=ckpts/gfdm/full videos=<video set>
source "$(dirname "$0")/common.sh"
launch step1_gfdm.eval "$@"
