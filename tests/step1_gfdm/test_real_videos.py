"""Steps on real Bridge, RT-1 and Something-Something videos: encoded by `encode`, mixed, trained by the common loop."""

import numpy as np
import torch

from common.loop import Loop
from common.mixture import collate
from step1_gfdm import GFDM
from step1_gfdm import unet as svd_unet
from step1_gfdm import vae as svd_vae
from step1_gfdm.dataset import build_mixture
from step1_gfdm.encode import encode_set
from step1_gfdm.objective import EDM

WHOLE = {"clip": {"span": "episode"}, "max_frames": 100}
SETS = {"bridge": {"weight": 1, **WHOLE}, "rt1": {"weight": 3, **WHOLE}, "sthv2": {"weight": 2, **WHOLE, "human": True}}


def test_loss_falls_on_real_videos(shared_data, hub, tmp_path):
    vae = svd_vae.load(hub / "svd")
    for name, videos in (("bridge", 3), ("rt1", 3), ("sthv2", 4)):
        assert encode_set(shared_data / "video_samples" / name, tmp_path / name, vae, image_size=64) == {
            "encoded": videos
        }
    samples = build_mixture(tmp_path, SETS, split="val", num_frames=4, latent_shape=(vae.channels, 8, 8), length=64)
    model = GFDM(str(hub / "svd"), str(hub / "clip"), objective=EDM(), image_size=64, num_frames=4)
    held = collate([samples.sample(i, np.random.default_rng(i)) for i in range(16)])
    assert len({i.split("/annotation")[0] for i in held["id"]}) == 3

    @torch.no_grad()
    def loss():
        torch.manual_seed(1)
        return model.eval()(held)["loss"].item()

    before = loss()
    loop = Loop(
        output_dir=str(tmp_path / "run"),
        max_steps=25,
        batch_size=8,
        optimizer={"lr": 1e-3, "weight_decay": 1e-2},
        log_every=5,
    )
    model = loop.fit(model, samples)
    assert loss() < 0.8 * before


def test_real_svd_latents_train(shared_data):
    """The published Bridge latents, 4 x 32 x 32, through a UNet of SVD's channels."""
    samples = build_mixture(
        shared_data / "video_samples", {"bridge": {"weight": 1, **WHOLE}}, split="val", num_frames=4
    )
    unet = svd_unet.build(
        {
            **svd_unet.SVD_UNET,
            "block_out_channels": [32, 32, 32, 32],
            "num_attention_heads": [1, 1, 1, 1],
            "layers_per_block": 1,
            "cross_attention_dim": 64,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 96,
        }
    )
    batch = collate([samples.sample(i, np.random.default_rng(i)) for i in range(2)])

    def net(x, time):
        condition = batch["latents"][:, :1].expand(-1, 4, -1, -1, -1) / 0.18215
        return unet(
            torch.cat([x, condition], 2),
            time,
            encoder_hidden_states=torch.zeros(2, 20, 64),
            added_time_ids=torch.tensor([[7.0, 127.0, 0.0]]).repeat(2, 1),
        ).sample

    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3)
    losses = []
    for _ in range(6):
        loss = EDM().training_loss(net, batch["latents"], generator=torch.Generator().manual_seed(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
