"""Our `official` and `vpp` policies against the public code itself, module by module and as a whole, at full size and
in fp32.

Skipped unless DEFI_OFFICIAL_REPO or VPP_REPO names a checkout. Frozen networks are stubbed on both sides by the same
numbers.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from common.program import CONFIGS
from step2_gidm import GIDM
from step3_defi import DeFI
from step3_defi.edm import seeded_noise
from step3_defi.model import EncodedObservation
from step3_defi.released import import_weights
from tests.step2_gidm.released.test_import_weights import FakeDino, FakeT5

PUBLIC = {"official": ("DEFI_OFFICIAL_REPO", "Step3_DeFI"), "vpp": ("VPP_REPO", "")}
TEXT, SEED = "Push the red block, then go left!", 7
GEOMETRY = {
    "latent_dim": 384,
    "num_latents": 224,
    "Former_depth": 6,
    "Former_heads": 8,
    "Former_dim_head": 64,
    "Former_num_time_embeds": 16,
    "use_Former": "3d",
    "use_all_layer": True,
    "extract_layer_idx": 1,
    "use_text_not_embedding": True,
    "use_lr_scheduler": False,
}  # from their yaml


class Goal(nn.Module):
    """Replaces OpenAI's CLIP on both sides."""

    pooled_dim = 512

    def pooled(self, texts: list[str]) -> Tensor:
        return torch.stack([torch.randn(512, generator=torch.Generator().manual_seed(len(text))) for text in texts])


class Imagined(nn.Module):
    """Replaces the forward model, whose features are given."""

    feature_dim, num_frames, num_tokens = 2560, 16, 256


def stub(features: list[Tensor]) -> dict[str, Any]:
    """Replaced modules that the public code imports; the extractor returns `features` (2B, F, C, h, w)."""

    class Lightning(nn.Module):
        device, dtype = torch.device("cpu"), torch.float32
        save_hyperparameters = log = lambda *_, **__: None

    class LangClip(nn.Module):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__()
            self.clip_rn50 = nn.Linear(3, 3)

        def forward(self, texts: Any) -> Tensor:
            return Goal().pooled([texts] if isinstance(texts, str) else texts)[:, None]

    class Extractor(nn.Module):
        def __init__(self, text_encoder: nn.Module, **_: Any) -> None:
            super().__init__()
            self.text_encoder = text_encoder

        def forward(self, *_: Any, **__: Any) -> Tensor:
            return features[0]

    space = types.SimpleNamespace
    return {
        "pytorch_lightning": space(LightningModule=Lightning),
        "pytorch_lightning.utilities": space(rank_zero_only=lambda f: f),
        "einops_exts": space(
            rearrange_many=lambda tensors, pattern, **sizes: [rearrange(t, pattern, **sizes) for t in tensors]
        ),
        "torchsde": space(),
        "torchdiffeq": space(odeint=None),
        "rotary_embedding_torch": space(RotaryEmbedding=None),
        "policy_models.module.clip_lang_encoder": space(LangClip=LangClip),
        "policy_models.module.diffusion_extract": space(Diffusion_feature_extractor=Extractor),
        "policy_models.module.diffusion_extract_outvideo": space(Diffusion_feature_extractor=Extractor),
    }


class Encoding(dict):
    def to(self, _: Any) -> Encoding:
        return self


@pytest.fixture
def features() -> list[Tensor]:
    """Features of one sample, static and gripper view: (2, F, C, h, w)."""
    return [torch.randn(2, 16, 2560, 16, 16)]


@pytest.fixture(params=PUBLIC)
def theirs(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, features: list[Tensor]
) -> Iterator[tuple[str, nn.Module]]:
    """The name of the preset and the public policy with random weights."""
    variable, folder = PUBLIC[request.param]
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not name a checkout of the public code")
    monkeypatch.syspath_prepend(str(Path(os.environ[variable]) / folder))
    for name, module in stub(features).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        Tensor, "cuda", lambda self, *_, **__: self
    )  # the public code calls it for its position embeddings
    public = importlib.import_module("policy_models.VPP_policy")
    part, reader = nn.Linear(1, 1), FakeT5()
    pipeline = types.SimpleNamespace(image_encoder=part, vae=part, unet=part, to=lambda *_: pipeline)
    loads = types.SimpleNamespace(from_pretrained=lambda *_, **__: nn.Linear(2, 2))
    monkeypatch.setattr(public, "load_primary_models", lambda *_, **__: (pipeline, *[None] * 7))
    monkeypatch.setattr(public, "CLIPTextModelWithProjection", loads)
    monkeypatch.setattr(public, "AutoTokenizer", loads)
    if request.param == "official":
        lam = sys.modules["policy_models.m_former_univla.latent_motion_tokenizer_univla"]

        class Encoder(nn.Module):
            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
                return types.SimpleNamespace(last_hidden_state=reader.table[input_ids])

        def tokenizer(texts: Any, **_: Any) -> Encoding:
            ids, mask = reader.ids([texts] if isinstance(texts, str) else texts)
            return Encoding(input_ids=ids, attention_mask=mask.long())

        monkeypatch.setattr(lam.T5EncoderModel, "from_pretrained", lambda *_, **__: Encoder())
        monkeypatch.setattr(lam.T5Tokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    policy = public.VPP_Policy(optimizer={}, lr_scheduler={}, **GEOMETRY).eval()
    with torch.no_grad():
        for parameter in policy.parameters():  # initially most biases are zero and the modulation is weak
            parameter.add_(
                torch.randn_like(parameter) * (0.1 if parameter.ndim < 2 else 0.5 * parameter.shape[-1] ** -0.5)
            )
    policy.sigma_min = 1.0  # as their evaluation sets it
    yield request.param, policy
    for name in [name for name in sys.modules if name.split(".")[0] == "policy_models"]:
        del sys.modules[name]


def ours(preset: str, tmp_path: Path, public: nn.Module) -> DeFI:
    """Our policy of a preset at full size, with the weights of a checkpoint in their format."""
    with initialize_config_dir(CONFIGS, version_base=None):
        config = OmegaConf.to_container(compose("step3_defi", [f"defi={preset}"]).policy, resolve=True)
        lam = OmegaConf.to_container(compose("step2_gidm", ["gidm=official"]).gidm, resolve=True)
    gidm = (
        instantiate(config["gidm"])
        if preset == "vpp"
        else GIDM(
            **{
                **{k: v for k, v in lam.items() if k != "_target_"},
                "clean_text": config["gidm"]["overrides"]["clean_text"],
                "vision": FakeDino(768, 16),
                "text": FakeT5(),
                "quantizer": instantiate(lam["quantizer"]),
            }
        )
    )
    model = instantiate({**config, "gfdm": None, "gidm": None, "goal": None, "_partial_": True})(
        gfdm=Imagined(), gidm=gidm, goal=Goal()
    ).eval()
    torch.save({"model": public.state_dict(), "args": OmegaConf.create({"batch_size": 20})}, tmp_path / "0012345.pt")
    left = import_weights.load_published(model, tmp_path / "0012345.pt", skip_foreign=True)
    assert {"language_goal.", "TVP_encoder.", "model.inner_model.pos_emb"} <= left.keys()
    return model


@torch.no_grad()
def test_parity_with_the_public_code(
    theirs: tuple[str, nn.Module], features: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset, public = theirs
    model = ours(preset, tmp_path, public)
    noise, inner = seeded_noise([SEED], (10, 7)), public.model.inner_model
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple, out: Any) -> None:
            seen.setdefault(name, (args, out))  # of the first call

        return hook

    hooks = {"video former": public.Video_Former, "encoded context": inner.encoder, "decoder": inner.decoder}
    for name, module in hooks.items() | ({"inverse": public.lam} if preset == "official" else {}).items():
        module.register_forward_hook(keep(name))
    picture = torch.zeros(1, 1, 3, 256, 256)
    with monkeypatch.context() as patch:
        drawn_as = torch.randn
        patch.setattr(
            torch, "randn", lambda *size, **options: noise if size == ((1, 10, 7),) else drawn_as(*size, **options)
        )
        actions = public.eval_forward({"rgb_obs": {"rgb_static": picture, "rgb_gripper": picture}}, {"lang_text": TEXT})

    imagined = features[0].flatten(3).transpose(2, 3)[None]  # (B, V, F, L, C)
    encoded = EncodedObservation(imagined)
    model.encode_observation = lambda *_, **__: encoded
    before_codes = []
    if preset == "official":
        model.gidm.to_latent.register_forward_hook(lambda _, args, out: before_codes.append(out))
    inferred = model.infer_streams(encoded, [TEXT])
    goal, streams = inferred.goal, inferred.streams
    context = model.adapter.encode(goal, streams)
    pairs = {
        "video former": (streams["video"], seen["video former"][1]),
        "encoded context": (context.tokens, seen["encoded context"][1][:, :10]),
    }
    if preset == "official":
        now, future = model.projector.project_pairs(imagined, model.pair_frames, 256)
        projected, out = torch.cat([now, future], dim=2)[:, 0], seen["inverse"][1]
        action = model.gidm.infer(projected[:, 0], projected[:, 1], [TEXT])
        assert torch.equal(action.codes, out["indices"])
        pairs |= {
            "projector": (projected, seen["inverse"][0][0]),
            "latents before VQ": (before_codes[0], out["emb"]),
            "latent actions": (streams["latent"], out["video_action_patches"][:, 0]),
        }
        losses = (
            out["emb"] - out["z"]
        ).square().mean() * 1.25  # as their training_step adds them: 1.0 codebook, 0.25 commitment
        pairs["bottleneck loss"] = (inferred.losses["bottleneck_loss"], losses)
    first = seen["decoder"][0][0]  # embedded noisy actions of the first step
    network = model.adapter(noise * 80 / (80**2 + 0.25) ** 0.5, torch.tensor([80.0]), context)
    pairs |= {
        "embedded actions": (model.adapter.action_embedder(noise * 80 / (80**2 + 0.25) ** 0.5), first),
        "decoder": (network, inner.action_pred(seen["decoder"][1])),
        "sample": (model.sample({}, [TEXT], seed=SEED), actions),
    }

    sigma, truth = torch.tensor([0.7, 3.0]), torch.rand(2, 10, 7) * 2 - 1
    drawn = torch.randn(2, 10, 7)
    state = {
        "state_images": torch.zeros(2, 2, 1, 1),
        "state_images_for_videoformer": streams["video"].expand(2, -1, -1),
    }
    told = [] if preset == "vpp" else [streams["latent"].expand(2, -1, -1)]
    if preset == "vpp":
        state = {"state_images": streams["video"].expand(2, -1, -1)}
    loss, _ = public.model.loss(state, truth, goal.expand(2, -1)[:, None], drawn, sigma, *told)
    with monkeypatch.context() as patch:
        patch.setattr(model.edm, "sample_noise_levels", lambda *_, **__: sigma)
        patch.setattr(torch, "randn", lambda *_, **__: drawn)
        twice = model.adapter.encode(
            goal.expand(2, -1), {name: tokens.expand(2, -1, -1) for name, tokens in streams.items()}
        )
        pairs["training loss"] = (
            model.edm.squared_errors(lambda x, level: model.adapter(x, level, twice), truth).mean(),
            loss,
        )
    worst = {name: (a - b).abs().max().item() for name, (a, b) in pairs.items()}
    sizes = {name: f"{value:.1e} of {pairs[name][1].abs().max():.2f}" for name, value in worst.items()}
    print(preset, sizes)  # noqa: T201  (pytest -s shows it)
    assert all(a.shape == b.shape for a, b in pairs.values()) and max(worst.values()) <= 1e-4, worst
