#!/usr/bin/env bash
# Record scripted demonstrations in playtable (CALVIN format and a video set).   e.g. scene=A tasks=eleven episodes=600 out=data/playtable/A
source "$(dirname "$0")/common.sh"
exec python -m envs.record "$@"
