"""Whether bf16 makes a machine faster; the setting "auto" asks here, so that one config serves every machine."""

from __future__ import annotations

import torch


def bf16_pays(device: torch.device) -> bool:
    """True for GPUs and for CPUs with bf16 instructions; other CPUs emulate bf16 and are slower than in fp32."""
    if device.type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
