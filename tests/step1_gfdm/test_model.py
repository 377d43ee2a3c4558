"""GFDM: the contract of imagine, what is trained, and the artifact, which is a diffusers pipeline folder."""

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from safetensors.torch import load_file, save_file

from common import artifact
from step1_gfdm import GFDM
from step1_gfdm.objective import DDPM, EDM


def make(hub, **options):
    return GFDM(
        str(hub / "svd"), str(hub / "clip"), **{"objective": EDM(), "image_size": 64, "num_frames": 4, **options}
    )


@pytest.fixture(scope="module")
def gfdm(hub):
    torch.manual_seed(0)
    model = make(hub).eval()
    with torch.no_grad():  # the text has hardly any influence in an untrained UNet
        for name, parameter in model.unet.named_parameters():
            if "attn2" in name:
                parameter.mul_(3)
    return model


IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
TEXT = ["open the drawer", "push the red block to the left", "open the drawer"]


@torch.no_grad()
def test_imagine_is_seeded_and_independent_of_the_batch(gfdm):
    full = gfdm.imagine(IMAGES, TEXT, seed=1)
    assert full.shape == (3, gfdm.num_frames, gfdm.num_tokens, gfdm.feature_dim) and torch.isfinite(full).all()
    assert torch.equal(full, gfdm.imagine(IMAGES, TEXT, seed=1))
    for i in range(3):
        torch.testing.assert_close(
            gfdm.imagine(IMAGES[i : i + 1], TEXT[i : i + 1], seed=1)[0], full[i], atol=1e-4, rtol=1e-4
        )
    assert not torch.allclose(full, gfdm.imagine(IMAGES, TEXT, seed=2), atol=1e-2)
    torch.testing.assert_close(
        gfdm.imagine(IMAGES[:1].repeat(2, 1, 1, 1), TEXT[:1] * 2).diff(dim=0).abs().max(),
        torch.tensor(0.0),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("trains", [False, True])
def test_no_pass_has_more_rows_than_cudas_grid(gfdm, monkeypatch, trains):
    """A latent of 8 x 8 has 64 rows: under a limit of 130 rows, three images take two passes, with the same result."""
    rows, block = [], gfdm.unet.down_blocks[0].attentions[0].temporal_transformer_blocks[0]
    handle = block.attn1.register_forward_pre_hook(
        lambda _, args, options: rows.append((args or tuple(options.values()))[0].shape[0]), with_kwargs=True
    )
    gfdm.requires_grad_(trains)
    whole = gfdm.imagine(IMAGES, TEXT, seed=1)
    monkeypatch.setattr("step1_gfdm.model.MAX_ROWS", 130)
    parts = gfdm.imagine(IMAGES, TEXT, seed=1)
    handle.remove()
    gfdm.requires_grad_(True)
    assert rows == [192, 128, 64] and parts.requires_grad == trains
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_text_and_image_matter(gfdm):
    same = IMAGES[:1].repeat(2, 1, 1, 1)
    assert gfdm.imagine(same, TEXT[:2]).diff(dim=0).abs().max() > 1e-4
    assert gfdm.imagine(IMAGES[:2], TEXT[:1] * 2).diff(dim=0).abs().max() > 1e-2


def test_imagine_gives_gradients_only_to_a_model_that_trains(hub):
    model = make(hub)
    assert model.imagine(IMAGES[:1], TEXT[:1]).requires_grad
    model.requires_grad_(False)
    assert not model.imagine(IMAGES[:1], TEXT[:1]).requires_grad


@torch.no_grad()
def test_denoise_steps_and_conditioning_switches_change_the_features(hub):
    base = make(hub).eval().imagine(IMAGES[:1], TEXT[:1])
    for change in (
        {"denoise_steps": 3},
        {"fps": 400},
        {"text_positions": True},
        {"unscaled_condition": False},
        {"objective": DDPM()},
    ):
        assert not torch.equal(make(hub, **change).eval().imagine(IMAGES[:1], TEXT[:1]), base), change
    assert make(hub, up_block_indices=(1,)).num_tokens == 64
    wide = make(hub, unet={"block_out_channels": [64, 64, 96]})
    assert wide.feature_dim == 160 and wide.imagine(IMAGES[:1], TEXT[:1]).shape == (1, 4, 64, 160)


def batch(model, frames=4):
    side = model.latent_size
    return {"id": list("abc"), "text": TEXT, "latents": torch.randn(3, frames, model.vae.channels, side, side)}


@pytest.mark.parametrize("objective", [EDM(), DDPM(), DDPM(prediction_type="v_prediction")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_unet_parameter_gets_a_gradient_and_nothing_else_trains(hub, objective, checkpointing):
    model = make(hub, objective=objective, gradient_checkpointing=checkpointing).train()
    with torch.no_grad():  # zero-initialised output layers would pass no gradient to the layers before them
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.02)
    model(batch(model))["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    # cross-attention over one token has constant weights; over 20 tokens it does not
    silent = [n for n, p in model.named_parameters() if not p.grad.any()]
    assert silent == []
    assert all(n.startswith("unet.") for n, _ in model.named_parameters()) and all(
        k.startswith("unet.") for k in model.state_dict()
    )


def test_frozen_parts_stay_in_eval(hub):
    model = make(hub).train()
    assert model.unet.training and not model.vae.module.training and not model.text.module.training


def test_text_dropout_acts_in_training_only(hub):
    model = make(hub, text_dropout=1.0)
    seen = []
    model.unet.register_forward_pre_hook(lambda m, a, k: seen.append(k["encoder_hidden_states"]), with_kwargs=True)
    with torch.no_grad():
        model.train()(batch(model))
        model.eval()(batch(model))
    assert not seen[0].any() and seen[1].any()


def test_wide_text_is_clip_repeated(gfdm):
    tokens, clip = gfdm.encode_text(TEXT), gfdm.text(TEXT)
    width = gfdm.unet.config.cross_attention_dim
    assert tokens.shape == (3, 20, width)
    for start in range(0, width, clip.shape[-1]):
        assert torch.equal(tokens[..., start : start + clip.shape[-1]], clip)


def test_condition_is_the_unscaled_first_frame_second_on_channels(gfdm):
    seen = []
    handle = gfdm.unet.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    data = batch(gfdm)
    with torch.no_grad():
        gfdm(data)
    handle.remove()
    sample = seen[0][0][0]
    expected = (data["latents"][:, :1] / gfdm.vae.scale).expand(-1, 4, -1, -1, -1)
    assert torch.equal(sample[:, :, gfdm.vae.channels :], expected)
    assert seen[0][1]["added_time_ids"].tolist() == [[7.0, 127.0, 0.0]] * 3


@torch.no_grad()
def test_generate(gfdm):
    video = gfdm.generate(IMAGES[:2], TEXT[:2], steps=2, guidance_scale=3.0)
    assert video.shape == (2, 4, 3, 64, 64) and video.min() >= 0 and video.max() <= 1
    assert torch.equal(video, gfdm.generate(IMAGES[:2], TEXT[:2], steps=2, guidance_scale=3.0))
    assert not torch.equal(video, gfdm.generate(IMAGES[:2], TEXT[:2], steps=2))


@torch.no_grad()
def test_bf16(hub):
    model = make(hub).eval()
    reference = model.imagine(IMAGES, TEXT)
    half = model.to(torch.bfloat16).imagine(IMAGES, TEXT)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), reference, atol=0.15, rtol=0.15)


def config(hub):
    return {
        "_target_": "step1_gfdm.GFDM",
        "svd": artifact.HERE,
        "clip": str(hub / "clip"),
        "objective": {"_target_": "step1_gfdm.objective.EDM"},
        "image_size": 64,
        "num_frames": 4,
        "denoise_steps": 1,
    }


@torch.no_grad()
def test_artifact_is_a_pipeline_folder_and_comes_back_bit_exact(gfdm, hub, tmp_path):
    artifact.save(gfdm, tmp_path / "a", kind="gfdm", config=config(hub), step=3)
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "a")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.save_pretrained(tmp_path / "b")
    back = GFDM(str(tmp_path / "b"), str(hub / "clip"), objective=EDM(), image_size=64, num_frames=4).eval()
    for other in (artifact.load(tmp_path / "a", "gfdm"), back):
        state = other.state_dict()
        assert state.keys() == gfdm.state_dict().keys() and all(
            torch.equal(v, state[k]) for k, v in gfdm.state_dict().items()
        )
        assert torch.equal(other.imagine(IMAGES, TEXT), gfdm.imagine(IMAGES, TEXT))
    assert artifact.load(tmp_path / "a", "gfdm", {"denoise_steps": 5}).denoise_steps == 5
    # an artifact of a model that was loaded from an artifact has all parts, too
    artifact.save(artifact.load(tmp_path / "a", "gfdm"), tmp_path / "c", kind="gfdm", config=config(hub))
    assert (
        load_file(tmp_path / "c/vae/diffusion_pytorch_model.safetensors").keys()
        == load_file(hub / "svd/vae/diffusion_pytorch_model.safetensors").keys()
    )


@torch.no_grad()
def test_an_untrained_unet_of_another_shape_comes_back_too(hub, tmp_path):
    changes = {"block_out_channels": [64, 64, 96]}
    model = make(hub, unet=changes).eval()
    artifact.save(model, tmp_path, kind="gfdm", config={**config(hub), "unet": changes})
    assert torch.equal(artifact.load(tmp_path, "gfdm").imagine(IMAGES, TEXT), model.imagine(IMAGES, TEXT))


@pytest.mark.parametrize(
    "damage", [lambda state: state.pop("conv_in.bias"), lambda state: state.update(extra=torch.zeros(1))]
)
def test_keys_are_strict(gfdm, hub, tmp_path, damage):
    artifact.save(gfdm, tmp_path, kind="gfdm", config=config(hub))
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    damage(state)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(artifact.ArtifactError, match="conv_in.bias|extra"):
        artifact.load(tmp_path, "gfdm")


def test_refusals(gfdm, hub, tmp_path):
    with pytest.raises(ValueError, match=r"needs \(3, 64, 64\)"):
        gfdm.imagine(torch.zeros(1, 3, 32, 32), ["x"])
    with pytest.raises(ValueError, match="the clips have 2 frames"):
        gfdm(batch(gfdm, frames=2))
    artifact.save(gfdm, tmp_path / "a", kind="gfdm", config=config(hub))
    with pytest.raises(artifact.ArtifactError, match="a 'gidm' artifact is needed"):
        artifact.load(tmp_path / "a", "gidm")
