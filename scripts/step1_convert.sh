#!/usr/bin/env bash
# A published data set -> a video set.   scripts/step1_convert.sh source=bridge in=<folder> out=data/opensource_robotdata/bridge
source "$(dirname "$0")/common.sh"
launch step1_gfdm.convert "$@"
