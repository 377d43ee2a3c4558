#!/usr/bin/env bash
# Roll a policy out.
#
#   scripts/step3_rollout_calvin.sh policy=ckpts/defi/full rollout=full out=outputs/rollout
#   scripts/step3_rollout_calvin.sh policy=expert env=playtable scene=D sequences=100 out=outputs/expert
source "$(dirname "$0")/common.sh"
launch step3_defi.eval "$@"
