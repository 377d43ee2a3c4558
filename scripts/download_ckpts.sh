#!/usr/bin/env bash
# Fetch third-party weights into ckpts/hub.   scripts/download_ckpts.sh [svd|clip|t5|dinov2]
source "$(dirname "$0")/common.sh"
get() { [ -z "${only:-}" ] || [ "$only" = "$2" ] || return 0; hf download "$1" --local-dir "${DEFI_CKPTS:-ckpts}/hub/$2" ${3:-}; }
only="${1:-}"
get stabilityai/stable-video-diffusion-img2vid svd "--exclude svd.safetensors svd_image_decoder.safetensors"
get openai/clip-vit-base-patch32 clip
get google-t5/t5-base t5
get timm/vit_base_patch14_reg4_dinov2.lvd142m dinov2
