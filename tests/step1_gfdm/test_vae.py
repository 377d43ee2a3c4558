"""The wrapper of the VAE, and the stand-in, which is trained on single images but decodes clips."""

import torch

from common.standins import VAELoss, build_tiny_vae
from step1_gfdm import vae


def test_shapes_scale_and_chunks(hub):
    space = vae.load(hub / "svd")
    images = torch.rand(5, 3, 64, 64) * 2 - 1
    latents = space.encode(images)
    assert latents.shape == (5, space.channels, 8, 8) and latents.dtype == torch.float32
    torch.testing.assert_close(latents, space.encode(images, chunk_size=2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(latents, space.module.encode(images).latent_dist.mode() * space.scale)
    drawn = [space.encode(images, sample_posterior=True, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    video = space.decode(latents[None])
    assert video.shape == (1, 5, 3, 64, 64) and video.min() >= 0 and video.max() <= 1
    assert not list(space.parameters()) and not space.state_dict()


def test_the_stand_in_decodes_clips_as_it_decodes_images():
    model = VAELoss(build_tiny_vae())
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0)
    for _ in range(3):
        model({"image": torch.rand(2, 3, 32, 32) * 2 - 1})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    space = vae.FrozenVAE(model.vae)
    latents = torch.randn(1, 4, space.channels, 4, 4)
    torch.testing.assert_close(
        space.decode(latents, chunk_size=4), space.decode(latents, chunk_size=1), atol=1e-4, rtol=1e-4
    )
