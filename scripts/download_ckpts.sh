#!/usr/bin/env bash
# Fetch third-party weights into ckpts/hub.   scripts/download_ckpts.sh [stable-video-diffusion-img2vid|clip-vit-base-patch32|t5-base|dinov2_vitb14_reg]
source "$(dirname "$0")/common.sh"
get() { [ -z "${only:-}" ] || [ "$only" = "$2" ] || return 0; hf download "$1" --local-dir "${DEFI_CKPTS:-ckpts}/hub/$2" ${3:-}; }
only="${1:-}"
get stabilityai/stable-video-diffusion-img2vid stable-video-diffusion-img2vid "--exclude svd.safetensors svd_image_decoder.safetensors"
get openai/clip-vit-base-patch32 clip-vit-base-patch32
get google-t5/t5-base t5-base
get timm/vit_base_patch14_reg4_dinov2.lvd142m dinov2_vitb14_reg
