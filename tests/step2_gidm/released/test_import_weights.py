"""Published inverse models: imported weights give the outputs of reference_univla and of the public code, where a
checkout of it is named by an environment variable."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import artifact
from step2_gidm import GIDM, from_univla
from step2_gidm.quantizer import VectorQuantizer
from step2_gidm.released import import_weights
from tests.step2_gidm.released.reference_univla import HEADS, ReferenceModel, random_weights
from tests.step2_gidm.test_programs import composed

SIZE = {"width": 64, "code_width": 16, "codes": 8, "queries": 4, "blocks": 2}
TEXTS = ["open the drawer", "push the red block to the left then close the slider", "go"]


def built_small() -> list[str]:
    """Overrides of the official preset for SIZE."""
    return [
        "gidm.dim=64",
        f"gidm.num_heads={HEADS}",
        "gidm.encoder_layers=2",
        "gidm.decoder_layers=2",
        "gidm.quantizer.codes=8",
        "gidm.quantizer.dim=16",
        "gidm.vision.image_size=64",
    ]


@pytest.fixture
def run(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(file: Path, *overrides: str) -> None:
        where = [
            f"paths.ckpts={tmp_path / 'ckpts'}",
            f"gidm.vision.path={hub / 'dinov2'}",
            f"gidm.text.path={hub / 't5'}",
            f"hydra.run.dir={tmp_path / 'log'}",
        ]
        monkeypatch.setattr(
            sys, "argv", ["import_weights", f"path={file}", "name=theirs", *where, *built_small(), *overrides]
        )
        import_weights.main()

    return run


def lightning(path: Path, weights: dict[str, Tensor], **held: Any) -> Path:
    """A checkpoint in Lightning's form, with copies of the frozen encoders inside."""
    frozen = {"lam.dino_encoder.cls_token": torch.ones(1, 1, 4), "lam.text_encoder.shared.weight": torch.ones(3, 4)}
    torch.save(
        {
            "epoch": 0,
            "global_step": 200000,
            "state_dict": {**weights, **frozen},
            "hyper_parameters": {"vq_beta": 0.25, **held},
        },
        path,
    )
    return path


def test_imported_weights_compute_what_the_formulas_say(run: Callable[..., None], tmp_path: Path) -> None:
    weights = random_weights(**SIZE)
    run(lightning(tmp_path / "lam_idm.ckpt", weights))
    folder = tmp_path / "ckpts/gidm/theirs"
    model, written = artifact.load(folder, "gidm"), ReferenceModel(weights)
    assert artifact.read_meta(folder)["scale"] == "full", "published weights are of the paper's scale"
    assert (
        list(artifact.read_meta(folder)["parents"]) == ["lam_idm.ckpt"]
        and len(artifact.read_meta(folder)["parents"]["lam_idm.ckpt"]) == 64
    )
    frames = model.embed(torch.rand(6, 3, 64, 64)).unflatten(0, (3, 2))
    action = model.infer(frames[:, 0], frames[:, 1], TEXTS)  # three sentences of different lengths in one batch
    predicted = model.decode(frames[:, 0], action.quantized, TEXTS)
    for i, text in enumerate(TEXTS):
        words = model.text([text])[0][0]
        tokens, z, codes = written.encode(frames[i], words)
        ours = model.encode_frames(frames[i : i + 1, 0], frames[i : i + 1, 1], *model.encode_text([text]))[0]
        torch.testing.assert_close(ours, tokens[:, : ours.shape[1]], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(action.continuous[i], z, atol=1e-4, rtol=1e-4)
        assert torch.equal(action.codes[i], codes)
        torch.testing.assert_close(predicted[i], written.decode(frames[i, 0], codes, words), atol=1e-4, rtol=1e-4)


def test_every_suffix_and_nest_gives_the_same_artifact(run: Callable[..., None], tmp_path: Path) -> None:
    weights = random_weights(**SIZE)
    save_file(weights, tmp_path / "x.safetensors")
    torch.save({name.removeprefix("lam."): tensor for name, tensor in weights.items()}, tmp_path / "bare.pt")
    lightning(tmp_path / "odd.ckpt", weights, optimizer=argparse.Namespace(lr=1))
    for number, (file, extra) in enumerate([("x.safetensors", ()), ("bare.pt", ()), ("odd.ckpt", ("foreign=skip",))]):
        run(tmp_path / file, f"name={number}", *extra)
    first, *others = (load_file(tmp_path / f"ckpts/gidm/{number}/weights.safetensors") for number in range(3))
    assert all(
        first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first) for other in others
    )


def test_a_policys_inverse_model_fits_without_its_decoder() -> None:
    weights = {
        name: tensor
        for name, tensor in random_weights(**SIZE).items()
        if not name.startswith(("lam.decoder.", "lam.patch_up."))
    }
    policy = {
        **weights,
        "Video_Former.latents": torch.ones(2),
        "model.inner_model.x": torch.ones(1),
        "lam.text_encoder.shared.weight": torch.ones(1),
    }
    before = {name: tensor.clone() for name, tensor in policy.items()}
    with pytest.raises(ValueError, match=r"^1 unexpected besides lam.\*.*: perceiver.x$"):
        from_univla({**policy, "perceiver.x": torch.ones(1)})
    state = from_univla(policy)
    assert all(torch.equal(policy[name], before[name]) for name in before) and policy.keys() == before.keys()
    model = GIDM(
        vision=FakeDino(64, 4),
        text=FakeT5(64),
        quantizer=VectorQuantizer(8, 16),
        dim=64,
        num_heads=HEADS,
        encoder_layers=2,
        decoder_layers=2,
        text_in=["encoder", "decoder"],
        residual=False,
    )
    model.drop_decoder()
    model.load_state_dict(state, strict=True)


def test_what_is_left_out_is_named_and_counted(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = random_weights(**SIZE)
    torch.save(
        {
            "dino_encoder.norm.weight": torch.ones(5),
            **{name.removeprefix("lam."): tensor for name, tensor in weights.items()},
        },
        tmp_path / "bare.pt",
    )
    lightning(tmp_path / "lam_idm.ckpt", weights)
    for file, unused in (
        ("lam_idm.ckpt", {"lam.dino_encoder.": 4, "lam.text_encoder.": 12}),
        ("bare.pt", {"lam.dino_encoder.": 5}),
    ):
        run(tmp_path / file, f"name={file}", "foreign=skip")
        source = artifact.read_meta(tmp_path / "ckpts/gidm" / file)["stats"]["imported"]
        assert source["file"] == file and source["unused"] == unused and len(source["sha256"]) == 64
        told = capsys.readouterr().out
        assert all(f"not used: {prefix}* ({count} numbers; " in told for prefix, count in unused.items())


def test_what_does_not_fit_is_one_line_and_leaves_nothing(run: Callable[..., None], tmp_path: Path) -> None:
    weights = random_weights(**SIZE)
    cases = {
        "missing": (
            {k: v for k, v in weights.items() if "encoder.transformer_blocks.1.norm2" not in k},
            r"2 missing: encoder.blocks.1.norm_temporal.bias, encoder.blocks.1.norm_temporal.weight$",
        ),
        "unexpected": (
            {**weights, "lam.view_embed": torch.ones(1), "lam.encoder.stranger": torch.ones(1)},
            r"2 unexpected: encoder.stranger, view_embed$",
        ),
        "beside": (
            {
                **weights,
                "stranger.weight": torch.ones(1),
                "encoder.ffn.0.weight": torch.ones(64),
                "dino_encoder.x": torch.ones(1),
            },
            r"3 unexpected besides lam.\*, .*: dino_encoder.x, encoder.ffn.0.weight, stranger.weight$",
        ),
        "shape": (
            {**weights, "lam.vq.codebook.weight": torch.ones(5, 16)},
            r"of another shape: quantizer.codebook \(5, 16\) for \(8, 16\), quantizer.counts \(5,\) for \(8,\)$",
        ),
        "second": ({**weights, "lam.vq_action.codebook.weight": torch.ones(8, 16)}, "UniVLA's second stage"),
        "other": (
            {"unet.conv.weight": torch.ones(1), "vae.x": torch.ones(1)},
            "no latent action model .* start with: unet, vae$",
        ),
    }
    for name, (tensors, message) in cases.items():
        torch.save({"state_dict": tensors}, tmp_path / f"{name}.ckpt")
        with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
            run(tmp_path / f"{name}.ckpt")
        assert "\n" not in str(caught.value)
    lightning(tmp_path / "odd.ckpt", weights, optimizer=argparse.Namespace(lr=1))
    for file, extra, message in (
        (
            "odd.ckpt",
            "foreign=refuse",
            "holds objects of argparse.Namespace .* foreign=skip, which neither imports nor runs their code$",
        ),
        ("odd.ckpt", "foreign=run", "use refuse or skip"),
        ("nowhere.ckpt", "name=x", "no such file"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / file, extra)
    assert not (tmp_path / "ckpts").exists()
    run(lightning(tmp_path / "good.ckpt", weights))
    with pytest.raises(SystemExit, match="is an artifact already; choose another name="):
        run(tmp_path / "good.ckpt")


# Parity with the public code, where a checkout of it is named by a variable of PUBLIC.


class FakeDino(nn.Module):
    """Stands for DINOv2 in both codes: a fixed linear map of each patch, after the ImageNet normalization."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.dim, self.num_tokens, self.grid = dim, side * side, (side, side)
        self.register_buffer(
            "map", torch.randn(3 * 14 * 14, dim, generator=torch.Generator().manual_seed(1)) / 12, persistent=False
        )

    def forward_features(self, normalised: Tensor) -> dict[str, Tensor]:
        return {"x_norm_patchtokens": nn.functional.unfold(normalised, 14, stride=14).transpose(1, 2) @ self.map}

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(c).view(3, 1, 1) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return self.forward_features((images - mean) / std)["x_norm_patchtokens"]


class FakeT5(nn.Module):
    """Stands for T5 and its tokenizer in both codes: a fixed vector for each word."""

    def __init__(self, dim: int = 768) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer(
            "table", torch.randn(100, dim, generator=torch.Generator().manual_seed(2)), persistent=False
        )

    def ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [torch.tensor([sum(map(ord, word)) % 99 + 1 for word in text.split()] + [99]) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return ids, ids > 0

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self.ids(texts)
        return self.table[ids], mask


PUBLIC = {  # environment variable -> (folder to import from, package of the model)
    "DEFI_OFFICIAL_REPO": ("Step2_GIDM", "genie.modules"),
    "UNIVLA_REPO": ("", "latent_action_model.genie.modules"),
}


@pytest.fixture(params=PUBLIC)
def theirs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], nn.Module]]:
    """Builds the public code's latent action model with a number of blocks and fakes of its frozen parts."""
    variable = request.param
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable} does not name a checkout of the public code")
    folder, package = PUBLIC[variable]
    monkeypatch.syspath_prepend(str(Path(root) / folder))
    monkeypatch.setitem(
        sys.modules, "rotary_embedding_torch", types.SimpleNamespace(RotaryEmbedding=None)
    )  # imported there but never used
    lam = importlib.import_module(f"{package}.lam")
    reader = FakeT5()

    class Encoding(dict):
        def to(self, _: Any) -> Encoding:
            return self

    def tokenizer(texts: list[str], **_: Any) -> Encoding:
        ids, mask = reader.ids(texts)
        return Encoding(input_ids=ids, attention_mask=mask.long())

    class Encoder(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return types.SimpleNamespace(last_hidden_state=reader.table[input_ids])

    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: FakeDino(768, 4))
    monkeypatch.setattr(lam.T5EncoderModel, "from_pretrained", lambda *_, **__: Encoder())
    monkeypatch.setattr(lam.T5Tokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr(Tensor, "cuda", lambda self, *_, **__: self)  # called in its position embedding
    yield lambda blocks: lam.UncontrolledDINOLatentActionModel(
        in_dim=3,
        model_dim=768,
        latent_dim=128,
        num_latents=16,
        patch_size=14,
        enc_blocks=blocks,
        dec_blocks=blocks,
        num_heads=12,
    ).eval()
    for name in [name for name in sys.modules if name.split(".")[0] == package.split(".")[0]]:
        del sys.modules[name]


@pytest.mark.parametrize("blocks, side", [(2, 4), (12, 16)], ids=["two blocks", "as published"])
@torch.no_grad()
def test_parity_with_the_public_code(
    theirs: Callable[[int], nn.Module], blocks: int, side: int, tmp_path: Path
) -> None:
    public = theirs(blocks)
    torch.save(
        {"state_dict": {f"lam.{name}": tensor for name, tensor in public.state_dict().items()}, "epoch": 0},
        tmp_path / "lam_idm.ckpt",
    )
    cfg = composed("gidm=official", f"gidm.encoder_layers={blocks}", f"gidm.decoder_layers={blocks}")["gidm"]
    quantizer = VectorQuantizer(**{k: v for k, v in cfg.pop("quantizer").items() if k != "_target_"})
    ours = GIDM(
        **{
            **{k: v for k, v in cfg.items() if k != "_target_"},
            "vision": FakeDino(768, side),
            "text": FakeT5(),
            "quantizer": quantizer,
        }
    ).eval()
    import_weights.load_published(ours, tmp_path / "lam_idm.ckpt")
    videos = torch.rand(len(TEXTS), 2, 3, 14 * side, 14 * side)
    seen: dict[str, Tensor] = {}
    public.encoder.register_forward_hook(lambda _, args, out: seen.update(tokens=out))
    now, future = ours.embed(videos.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
    together = ours.infer(now, future, TEXTS)
    predicted = ours.decode(now, together.quantized, TEXTS)
    worst = dict.fromkeys(("encoder tokens", "latents", "decoded", "beside a batch"), 0.0)
    for i, text in enumerate(TEXTS):  # one by one: in a batch, the public code's text masks belong to other samples
        out = public({"videos": videos[i : i + 1], "task_instruction": [text]})
        one = slice(i, i + 1)
        action = ours.infer(now[one], future[one], [text])
        tokens = ours.encode_frames(now[one], future[one], *ours.encode_text([text]))
        decoded = ours.decode(now[one], action.quantized, [text])
        assert torch.equal(action.codes, out["indices"]) and torch.equal(together.codes[one], out["indices"])
        for name, a, b in (
            ("encoder tokens", tokens, seen["tokens"][:, :, : tokens.shape[2]]),
            ("latents", action.continuous, out["emb"]),
            ("decoded", decoded, out["recon"][:, 0]),
            ("beside a batch", predicted[one], decoded),
            ("beside a batch", together.continuous[one], action.continuous),
        ):
            worst[name] = max(worst[name], (a - b).abs().max().item())
    print({name: f"{value:.1e}" for name, value in worst.items()})  # noqa: T201  (pytest -s shows how close)
    assert max(worst.values()) <= 1e-4, worst
