from __future__ import annotations

import torch

from step3_defi.projector import Projector, pool_token_grid, resize_token_grid
from step3_defi.video_former import VideoFormer

SMALL = {
    "dim": 16,
    "embed_hidden_dim": None,
    "queries": 3,
    "depth": 2,
    "spatial_heads": 2,
    "spatial_head_dim": 4,
    "temporal_heads": 2,
}


def test_vpps_geometry_has_vpps_parameter_count() -> None:
    with torch.device("meta"):
        model = VideoFormer(2560, 16, 2, tokens=256, use_pos_embed=False)
        ours = VideoFormer(2560, 16, 2, tokens=256)
    assert sum(p.numel() for p in model.parameters()) == 17_713_536
    assert sum(p.numel() for p in ours.parameters()) == 17_713_536 + 2 * 384 + 6 * 2 * 384  # views, temporal norms
    assert model.num_tokens == 224


def test_every_token_reads_every_frame_and_view() -> None:
    model = VideoFormer(5, 4, 2, tokens=9, **SMALL)
    features = torch.randn(1, 2, 4, 9, 5, requires_grad=True)
    out = model(features)
    assert out.shape == (1, 12, 16)
    for token in (0, 5, 11):
        (gradient,) = torch.autograd.grad(
            (out[0, token] * torch.randn(16)).sum(), features, retain_graph=True
        )  # a random weighting, because the sum of a normalized output is constant
        assert (gradient[0].abs().sum(-1) > 0).all()


def test_positions_tell_places_apart_and_their_absence_does_not() -> None:
    features = torch.randn(1, 2, 4, 9, 5)
    shuffled = features[:, :, :, torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    swapped = features.flip(1)
    for use_pos_embed, tells in ((True, True), (False, False)):
        model = VideoFormer(5, 4, 2, tokens=9, use_pos_embed=use_pos_embed, **SMALL)
        for other in (shuffled, swapped):
            assert torch.allclose(model(features), model(other), atol=1e-5) != tells


def test_frames_are_told_apart() -> None:
    features = torch.randn(1, 1, 4, 9, 5)
    model = VideoFormer(5, 4, 1, tokens=9, **SMALL)
    assert not torch.allclose(model(features), model(features.flip(2)), atol=1e-3)


def test_projector_and_grids() -> None:
    assert sum(p.numel() for p in Projector(2560, 768, norm=False).parameters()) == 2560 * 768 + 768 + 768 * 768 + 768
    tokens = torch.arange(16.0).view(1, 16, 1).expand(2, 16, 3)
    assert resize_token_grid(tokens, 16) is tokens and resize_token_grid(tokens[None], 64).shape == (1, 2, 64, 3)
    assert torch.equal(pool_token_grid(tokens[None], 2)[0, 0, :, 0], torch.tensor([2.5, 4.5, 10.5, 12.5]))
