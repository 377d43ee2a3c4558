from __future__ import annotations

import pytest
import torch
from torch import Tensor

from step3_defi.released.vpp_adapter import VPPAdapter

STREAMS = {"video": (12, 4), "latent": (3, 6)}
UNUSED = 689_280 + 302_208 + 90_240  # goal_emb, proprio_emb and pos_emb: in VPP's weights, but never used by its code


def awake(**changes: float) -> VPPAdapter:
    """An adapter with weights as large as trained ones, so that every path matters."""
    adapter = VPPAdapter(STREAMS, 7, dim=16, encoder_layers=2, decoder_layers=2, num_heads=2, **changes)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapter


def inputs(count: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(count, 7), {name: torch.randn(count, *size) for name, size in STREAMS.items()}


def test_published_sizes() -> None:
    with torch.device("meta"):
        release, vpp = (
            VPPAdapter(streams, 512) for streams in ({"video": (224, 384), "latent": (4, 768)}, {"video": (224, 384)})
        )
    assert sum(p.numel() for p in release.parameters()) == 22_897_927 - UNUSED
    assert sum(p.numel() for p in vpp.parameters()) == 22_602_631 - UNUSED
    assert round(sum(p.numel() for p in release.encoder.parameters()) / 1e6, 2) == 7.09
    assert round(sum(p.numel() for p in release.decoder.parameters()) / 1e6, 1) == 13.0


def test_action_i_sees_context_tokens_up_to_i_and_actions_up_to_itself() -> None:
    adapter = awake().eval()
    context = adapter.encode(*inputs(1))
    assert context.tokens.shape == (1, 10, 16)
    tokens, noisy = context.tokens.detach().requires_grad_(), torch.randn(1, 10, 7, requires_grad=True)
    out = adapter(noisy, torch.ones(1), context._replace(tokens=tokens))
    for i in range(10):
        for gradient in torch.autograd.grad(out[0, i].sum(), (tokens, noisy), retain_graph=True):
            touched = gradient[0].abs().sum(-1) > 0
            assert touched.tolist() == [j <= i for j in range(10)]


def test_latent_actions_reach_the_decoder_through_the_encoder_alone() -> None:
    adapter = awake().eval()
    goal, streams = inputs(1)
    before = adapter.encode(goal, streams).tokens
    assert not torch.allclose(
        before, adapter.encode(goal, {**streams, "latent": streams["latent"] + 1}).tokens, atol=1e-3
    )
    late = torch.cat(
        [streams["video"][:, :9], streams["video"][:, 9:].flip(1)], dim=1
    )  # tokens 10 and later, after the goal
    swapped = adapter.encode(goal, {"video": late, "latent": streams["latent"].flip(1)}).tokens
    assert torch.allclose(before, swapped, atol=1e-5), "nothing has a position"


def test_draws_share_a_context_but_nothing_else() -> None:
    adapter = awake().eval()
    goal, streams = inputs(2)
    noisy, sigma = torch.randn(6, 10, 7), torch.rand(6) + 0.1
    together = adapter(noisy, sigma, adapter.encode(goal, streams))
    repeated = adapter.encode(goal.repeat_interleave(3, 0), {k: v.repeat_interleave(3, 0) for k, v in streams.items()})
    assert torch.allclose(together, adapter(noisy, sigma, repeated), atol=1e-5)


@pytest.mark.parametrize("kind", ["attention_dropout", "residual_dropout", "mlp_dropout"])
def test_each_dropout_acts_in_training_only(kind: str) -> None:
    rates = {"attention_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0, kind: 0.5}
    adapter, (goal, streams) = awake(**rates), inputs(1)

    def twice() -> bool:
        contexts = [adapter.encode(goal, streams) for _ in range(2)]
        outs = [adapter(torch.ones(1, 10, 7), torch.ones(1), contexts[0]) for _ in range(2)]
        return torch.equal(contexts[0].tokens, contexts[1].tokens) and torch.equal(*outs)

    assert not twice()
    adapter.eval()
    assert twice()


def test_foreign_streams_are_named() -> None:
    with pytest.raises(ValueError, match=r"\['latent', 'video'\], got \['picture'\]"):
        awake().encode(torch.randn(1, 7), {"picture": torch.randn(1, 5, 4)})
