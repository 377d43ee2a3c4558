#!/usr/bin/env bash
# Step 2: pretrain the inverse model.
#
#   scripts/step2_train_gidm.sh scale=tiny|small|full [experiment=gidm/<row>] [name=<name>]
source "$(dirname "$0")/common.sh"
launch step2_gidm.train "$@"
