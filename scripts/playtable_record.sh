#!/usr/bin/env bash
# Record scripted demonstrations in playtable, in the format of CALVIN and as a video set.
#
#   scripts/playtable_record.sh scene=A tasks=eleven episodes=600 out=data/playtable/A
source "$(dirname "$0")/common.sh"
exec python -m envs.record "$@"
