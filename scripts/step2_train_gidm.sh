#!/usr/bin/env bash
# Step 2: pretrain the inverse model.   e.g. scale=tiny|small|full experiment=gidm/<row> name=<artifact>
source "$(dirname "$0")/common.sh"
launch step2_gidm.train "$@"
