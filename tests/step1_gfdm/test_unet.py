"""The truncated pass equals hooks on the full pass, and the UNet has the size of SVD's."""

import pytest
import torch
import torch.nn.functional as F

from common.frozen import MissingWeights
from step1_gfdm import unet as svd_unet

# the four levels of SVD, narrower
SMALL = {
    **svd_unet.SVD_UNET,
    "block_out_channels": [32, 32, 64, 64],
    "num_attention_heads": [1, 1, 2, 2],
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 96,
    "num_frames": 4,
}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return svd_unet.build(SMALL).eval()


def inputs(unet, side=16, frames=4, batch=2, tokens=20):
    config = unet.config
    return (
        torch.randn(batch, frames, config.in_channels, side, side),
        torch.full((batch,), 1.6378),
        torch.randn(batch, tokens, config.cross_attention_dim),
        torch.tensor([[7.0, 127.0, 0.0]]).repeat(batch, 1),
    )


@pytest.mark.parametrize("up_block_indices", [(0,), (0, 1), (1,), (1, 2), (0, 3)])
@pytest.mark.parametrize("side", [16, 12])
@torch.no_grad()
def test_truncated_equals_hooks_on_the_full_pass(unet, up_block_indices, side):
    sample, time, text, ids = inputs(unet, side)
    outputs = {}
    handles = [
        unet.up_blocks[index].register_forward_hook(lambda m, i, o, index=index: outputs.update({index: o}))
        for index in up_block_indices
    ]
    unet(sample, time, encoder_hidden_states=text, added_time_ids=ids)
    for handle in handles:
        handle.remove()
    grid = outputs[max(up_block_indices)].shape[-2:]
    expected = torch.cat([F.interpolate(outputs[index], size=grid, mode="nearest") for index in up_block_indices], 1)
    expected = expected.view(2, 4, expected.shape[1], -1).transpose(2, 3)
    got = svd_unet.features(unet, sample, time, text=text, time_ids=ids, up_block_indices=up_block_indices)
    assert torch.equal(got, expected)
    assert got.shape == (2, 4, *svd_unet.feature_shape(unet, up_block_indices, side))


@torch.no_grad()
def test_the_rest_is_not_computed_and_nothing_stays_behind(unet):
    sample, time, text, ids = inputs(unet)
    ran = []
    late = {"up2": unet.up_blocks[2], "up3": unet.up_blocks[3], "out": unet.conv_out, "up1": unet.up_blocks[1]}
    handles = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in late.items()]
    keys, before = list(unet.state_dict()), unet(sample, time, encoder_hidden_states=text, added_time_ids=ids).sample
    assert sorted(ran) == ["out", "up1", "up2", "up3"]
    ran.clear()
    svd_unet.features(unet, sample, time, text=text, time_ids=ids)
    assert ran == ["up1"]
    for handle in handles:
        handle.remove()
    assert list(unet.state_dict()) == keys and not any(block._forward_hooks for block in unet.up_blocks)
    assert torch.equal(unet(sample, time, encoder_hidden_states=text, added_time_ids=ids).sample, before)


def test_features_pass_gradients(unet):
    sample, time, text, ids = inputs(unet)
    svd_unet.features(unet, sample, time, text=text, time_ids=ids).square().mean().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in unet.conv_out.parameters())
    unet.zero_grad(set_to_none=True)


def test_full_size_on_the_meta_device():
    unet = svd_unet.build(device="meta")
    assert sum(p.numel() for p in unet.parameters()) == 1_524_623_082
    assert svd_unet.feature_shape(unet, (0, 1), 32) == (256, 2560)


def test_the_stand_in_has_three_levels(hub):
    unet = svd_unet.load(hub / "svd")
    sample, time, text, ids = inputs(unet, side=8)
    assert (
        svd_unet.features(unet, sample, time, text=text, time_ids=ids).shape[2:]
        == svd_unet.feature_shape(unet, (0, 1), 8)
        == (64, 128)
    )


def test_refusals(unet, tmp_path):
    with pytest.raises(ValueError, match="up_block_indices"):
        svd_unet.feature_shape(unet, (4,), 16)
    with pytest.raises(MissingWeights, match="not found in"):
        svd_unet.load(tmp_path / "svd")
