"""The transformers: causal over frames, masks that belong to their sample, attention weights equal to SDPA's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.attention import Attention
from step2_gidm.transformer import SpatialTransformer, SpatioTemporalTransformer, attention_weights


def test_first_frame_never_sees_the_second_and_the_second_sees_the_first() -> None:
    model = SpatioTemporalTransformer(6, 8, num_tokens=5, num_layers=3, num_heads=2)
    x = torch.randn(2, 2, 5, 6)
    changed = x.clone()
    changed[:, 1] += torch.randn(2, 5, 6)
    assert torch.equal(model(x)[:, 0], model(changed)[:, 0])
    changed = x.clone()
    changed[:, 0, 3] += torch.randn(2, 6)
    assert (model(x)[:, 1] - model(changed)[:, 1]).abs().max() > 1e-4


def test_a_sample_is_the_same_alone_and_beside_longer_sentences() -> None:
    lengths = [1, 4, 2]
    text = torch.randn(3, 4, 8)
    mask = torch.arange(4)[None] < torch.tensor(lengths)[:, None]
    for model, x in (
        (SpatioTemporalTransformer(6, 8, num_tokens=5, num_layers=2, num_heads=2), torch.randn(3, 2, 5, 6)),
        (SpatialTransformer(6, 8, out_dim=6, num_tokens=5, num_layers=2, num_heads=2), torch.randn(3, 5, 6)),
    ):
        together = model(x, text, mask)
        for i, length in enumerate(lengths):
            alone = model(x[i : i + 1], text[i : i + 1, :length], mask[i : i + 1, :length])
            assert torch.allclose(together[i], alone[0], atol=1e-5)
        other = text.clone()
        other[1] += torch.randn(4, 8)  # a sentence without padding: only the output of its own sample changes
        moved = (model(x, other, mask) - together).abs().flatten(1).amax(1)
        assert moved[1] > 1e-4 and moved[0] == 0 and moved[2] == 0


def test_positions_tell_tokens_apart() -> None:
    model = SpatialTransformer(6, 8, out_dim=6, num_tokens=4, num_layers=1, num_heads=2)
    out = model(torch.ones(1, 4, 6))
    assert (out[0, 0] - out[0, 1]).abs().max() > 1e-4


def test_attention_weights_are_what_sdpa_uses() -> None:
    attention = Attention(8, 2)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    values = attention.to_v(x).unflatten(-1, (2, -1)).transpose(1, 2)
    out = attention.to_out((attention_weights(attention, x, mask) @ values).transpose(1, 2).flatten(2))
    assert torch.allclose(out, attention(x, key_mask=mask), atol=1e-6)


def test_every_attention_goes_through_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    real: Callable[..., Tensor] = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **options: calls.append(options) or real(*args, **options)
    )
    text, mask = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    SpatioTemporalTransformer(6, 8, num_tokens=5, num_layers=3, num_heads=2)(torch.randn(2, 2, 5, 6), text, mask)
    assert [call["is_causal"] for call in calls] == [False, True] * 3 and all(
        (call["attn_mask"] is None) == call["is_causal"] for call in calls
    )
    calls.clear()
    SpatialTransformer(6, 8, out_dim=6, num_tokens=5, num_layers=4, num_heads=2)(torch.randn(2, 5, 6), text, mask)
    assert len(calls) == 4 and not any(call["is_causal"] for call in calls)
