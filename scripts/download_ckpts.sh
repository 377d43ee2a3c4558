#!/usr/bin/env bash
# Download third-party weights to ckpts/hub.
#
#   scripts/download_ckpts.sh          all of them
#   scripts/download_ckpts.sh clip     one of svd, clip, t5, dinov2
source "$(dirname "$0")/common.sh"
only="${1:-}"
hub="${DEFI_CKPTS:-ckpts}/hub"

if [ -z "$only" ] || [ "$only" = svd ]; then
    # The single-file copies of the same weights are left out.
    hf download stabilityai/stable-video-diffusion-img2vid --local-dir "$hub/svd" \
        --exclude svd.safetensors svd_image_decoder.safetensors
fi
if [ -z "$only" ] || [ "$only" = clip ]; then
    hf download openai/clip-vit-base-patch32 --local-dir "$hub/clip"
fi
if [ -z "$only" ] || [ "$only" = t5 ]; then
    hf download google-t5/t5-base --local-dir "$hub/t5"
fi
if [ -z "$only" ] || [ "$only" = dinov2 ]; then
    hf download timm/vit_base_patch14_reg4_dinov2.lvd142m --local-dir "$hub/dinov2"
fi
