#!/usr/bin/env bash
# Step 1: pretrain the forward model.   e.g. scale=tiny|small|full experiment=gfdm/<row> name=<artifact>
source "$(dirname "$0")/common.sh"
launch step1_gfdm.train "$@"
