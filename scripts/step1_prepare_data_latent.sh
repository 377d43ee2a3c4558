#!/usr/bin/env bash
# Videos -> latents of the SVD-VAE.   e.g. scale=tiny data=data/playtable/A/videos_set
source "$(dirname "$0")/common.sh"
launch step1_gfdm.encode "$@"
