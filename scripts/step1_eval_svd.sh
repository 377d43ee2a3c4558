#!/usr/bin/env bash
# Step 1: measure a forward model and draw its forecasts.   e.g. path=ckpts/gfdm/full
source "$(dirname "$0")/common.sh"
launch step1_gfdm.eval "$@"
