#!/usr/bin/env bash
# Roll a policy out.   e.g. env=playtable scene=D policy=ckpts/defi/full sequences=1000 out=outputs/rollout
source "$(dirname "$0")/common.sh"
launch step3_defi.eval "$@"
