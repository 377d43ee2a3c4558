#!/usr/bin/env bash
# Convert a published data set to a video set.
#
#   scripts/step1_convert.sh source=bridge root=<folder> out=data/opensource_robotdata/bridge
source "$(dirname "$0")/common.sh"
launch step1_gfdm.convert "$@"
