#!/usr/bin/env bash
# Step 1: pretrain the forward model.
#
#   scripts/step1_train_svd.sh scale=tiny|small|full [experiment=gfdm/<row>] [name=<name>]
source "$(dirname "$0")/common.sh"
launch step1_gfdm.train "$@"
