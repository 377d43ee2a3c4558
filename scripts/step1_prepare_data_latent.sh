#!/usr/bin/env bash
# Step 1: encode videos to latents with the VAE of Stable Video Diffusion.
#
#   scripts/step1_prepare_data_latent.sh scale=tiny videos=data/playtable/A/videos_set
source "$(dirname "$0")/common.sh"
launch step1_gfdm.encode "$@"
