#!/usr/bin/env bash
# Step 3: couple and finetune.   e.g. scale=tiny|small|full experiment=defi/<row> name=<artifact>
source "$(dirname "$0")/common.sh"
launch step3_defi.train "$@"
