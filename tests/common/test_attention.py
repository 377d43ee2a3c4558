"""Attention: masks hide keys, the causal flag hides later tokens, position embeddings are distinct."""

from __future__ import annotations

import torch

from common.attention import Attention, modulate, sincos_pos_embed_1d, sincos_pos_embed_2d


def test_masked_keys_have_no_influence():
    attention = Attention(32, 4, context_dim=16).eval()
    x, context = torch.randn(2, 5, 32), torch.randn(2, 7, 16)
    mask = torch.arange(7)[None] < torch.tensor([[4], [7]])
    changed = context.clone()
    changed[0, 4:] = 9
    assert torch.equal(attention(x, context, key_mask=mask), attention(x, changed, key_mask=mask))
    torch.testing.assert_close(attention(x[:1], context[:1], key_mask=mask[:1]), attention(x[:1], context[:1, :4]))


def test_causal_with_and_without_mask_agree():
    attention = Attention(32, 4).eval()
    x = torch.randn(2, 6, 32)
    full = torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(attention(x, causal=True), attention(x, key_mask=full, causal=True))
    changed = x.clone()
    changed[:, 4:] = 0
    torch.testing.assert_close(attention(x, causal=True)[:, :4], attention(changed, causal=True)[:, :4])


def test_position_embeddings_are_distinct_and_modulation_is_identity_at_zero():
    for table in (sincos_pos_embed_1d(50, 16), sincos_pos_embed_2d(6, 7, 16)):
        assert torch.cdist(table, table).fill_diagonal_(9).min() > 1e-2
    x = torch.randn(2, 3, 4)
    assert torch.equal(modulate(x, torch.zeros(2, 4), torch.zeros(2, 4)), x)
