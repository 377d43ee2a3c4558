#!/usr/bin/env bash
# Step 3: couple both models and finetune the policy.
#
#   scripts/step3_train_calvin.sh scale=tiny|small|full [experiment=defi/<row>] [name=<name>]
source "$(dirname "$0")/common.sh"
launch step3_defi.train "$@"
