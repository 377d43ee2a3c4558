"""The inverse models of Tables 7 and 8: no leak of the future, one interface, published sizes, and learning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common import artifact
from common.frozen import dinov2, t5_text
from common.metrics import perplexity
from step2_gidm.baselines import MLPInverse, TransformerInverse
from step2_gidm.model import GIDM, normalize_text
from step2_gidm.quantizer import Binning, Continuous, GaussianMixture, VectorQuantizer
from tests.step2_gidm.parts import DIM, FakeEncoder, FakeText, FakeVision, make, moving

KINDS = {"gidm": GIDM, "mlp": MLPInverse, "transformer": TransformerInverse}
QUANTIZERS = {
    "vq": lambda: VectorQuantizer(8, 6),
    "mixture": lambda: GaussianMixture(8, 6),
    "binning": lambda: Binning(5, 3),
    "continuous": lambda: Continuous(6),
}


@pytest.mark.parametrize("text_in", [["encoder"], ["encoder", "decoder"], []])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_protocol(kind: str, quantizer: str, text_in: list[str]) -> None:
    model = make(KINDS[kind], QUANTIZERS[quantizer](), text_in=text_in)
    batch = moving(5)
    now, future = model.embed(batch["frames"][:, 0]), model.embed(batch["frames"][:, 1])
    assert now.shape == (5, model.num_tokens, model.embed_dim)
    action = model.infer(now, future, batch["text"])
    assert action.continuous.shape == action.quantized.shape == (5, model.num_action_tokens, model.quantizer.dim)
    assert model.embed_action(action.quantized).shape == (5, model.num_action_tokens, model.embed_dim)
    assert model.decode(now, action.quantized, batch["text"]).shape == future.shape
    out = model.train()(batch)
    assert {"loss", "mse", "copy_mse", "codebook", "commitment"} <= set(out)
    assert ("codes" in out) == (quantizer != "continuous") == bool(model.num_codes)
    if "codes" in out:
        assert torch.equal(
            out["codes"],
            torch.stack([torch.bincount(column, minlength=model.num_codes) for column in action.codes.unbind(1)]),
        )
    out["loss"].backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert not silent, f"no gradient reaches {silent}: DDP would stop"
    model.drop_decoder()
    assert not any(name.startswith(("decoder", "patch_up")) for name in model.state_dict())
    assert torch.equal(model.eval().infer(now, future, batch["text"]).continuous, action.continuous)
    with pytest.raises(ValueError, match="dropped its decoder"):
        model.decode(now, action.quantized, batch["text"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text_in", [["encoder"], ["encoder", "decoder"]])
def test_the_decoder_sees_the_future_through_the_latent_action_only(kind: str, text_in: list[str]) -> None:
    model = make(KINDS[kind], text_in=text_in).eval()
    batch = moving(4)
    seen = {}
    model.decoder.register_forward_hook(lambda _, args, out: seen.update(inputs=args, out=out.detach()))
    latent = torch.randn(4, model.num_action_tokens, model.quantizer.dim)
    replaced = model.quantizer.register_forward_hook(lambda _, args, out: out._replace(quantized=latent))
    model.train()(batch)
    first = seen["out"]
    batch["frames"][:, 1] = torch.rand(4, 3, 16, 16)
    model(batch)
    assert torch.equal(first, seen["out"]), (
        "with the latent action held fixed, the prediction moved with the future frame"
    )
    batch["frames"][:, 0] = torch.rand(4, 3, 16, 16)
    model(batch)
    assert not torch.allclose(first, seen["out"])
    replaced.remove()
    text = [i for i in seen["inputs"][1:] if i is not None]
    assert bool(text) == ("decoder" in text_in)


def test_the_encoder_is_causal() -> None:
    model = make().eval()
    batch = moving(3)
    now, future = model.embed(batch["frames"][:, 0]), model.embed(batch["frames"][:, 1])
    words = model.encode_text(batch["text"])
    one, two = (model.encode_frames(now, f, *words) for f in (future, torch.randn_like(future)))
    assert torch.equal(one[:, 0], two[:, 0])
    assert not torch.allclose(one[:, 1, : model.num_action_tokens], two[:, 1, : model.num_action_tokens])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_the_same_alone_and_in_a_batch(kind: str) -> None:
    model = make(KINDS[kind], text_in=["encoder", "decoder"]).eval()
    batch = moving(3)
    text = ["go", "push the square to the far left side now", "move it"]
    now, future = model.embed(batch["frames"][:, 0]), model.embed(batch["frames"][:, 1])
    together = model.infer(now, future, text)
    predicted = model.decode(now, together.quantized, text)
    for i in range(3):
        alone = model.infer(now[i : i + 1], future[i : i + 1], text[i : i + 1])
        assert torch.allclose(alone.continuous[0], together.continuous[i], atol=1e-5)
        assert torch.allclose(
            model.decode(now[i : i + 1], together.quantized[i : i + 1], text[i : i + 1])[0], predicted[i], atol=1e-5
        )


def test_instruction_reaches_the_latent_action_where_it_should() -> None:
    batch = moving(2)
    for text_in, matters in ((["encoder"], True), ([], False)):
        model = make(text_in=text_in).eval()
        now, future = model.embed(batch["frames"][:, 0]), model.embed(batch["frames"][:, 1])
        one, two = (model.infer(now, future, [text] * 2).continuous for text in ("open the drawer", "close the slider"))
        assert torch.allclose(one, two, atol=1e-6) != matters


def test_sentences_are_cleaned_in_one_place() -> None:
    assert normalize_text("  Put the Cup, (carefully) down! ") == "put the cup carefully down"
    model = make().eval()
    now, future = torch.randn(2, 1, model.num_tokens, model.embed_dim)
    one, two = (model.infer(now, future, [text]).continuous for text in ("Open, the drawer.", "open the drawer"))
    assert torch.equal(one, two)


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match="text_in names \\['middle'\\]"):
        make(text_in=["middle"])
    model = make(text_in=["encoder", "decoder"])
    tokens = torch.randn(2, model.num_tokens, model.embed_dim)
    with pytest.raises(ValueError, match=r"visual tokens must be \(B, 16, 16\)"):
        model.infer(tokens[:, :4], tokens[:, :4], ["a", "b"])
    with pytest.raises(ValueError, match="pass text"):
        model.decode(tokens, torch.zeros(2, model.num_action_tokens, model.quantizer.dim))


@pytest.mark.parametrize(
    "layers, codes, text_in, total",
    [
        (12, 16, ["encoder", "decoder"], 201_554_560),  # UniVLA's first stage and the release
        (16, 16, ["encoder", "decoder"], 267_685_504),
        (16, 128, ["encoder"], 267_699_840),  # the paper's reading of Table 10
    ],
)
def test_sizes(layers: int, codes: int, text_in: list[str], total: int) -> None:
    with torch.device("meta"):
        model = GIDM(
            vision=FakeEncoder(),
            text=FakeEncoder(),
            quantizer=VectorQuantizer(codes, 128),
            encoder_layers=layers,
            decoder_layers=layers,
            text_in=text_in,
        )
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(model) == total
    assert count(model.encoder) == 593_664 + layers * 9_447_168
    assert count(model.decoder) == 593_664 + 590_592 + layers * 7_085_568
    assert model.queries.numel() == 3_072 and model.quantizer.codebook.numel() == codes * 128


def train(model: GIDM, steps: int) -> dict[str, float]:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model.train()(moving(32, seed=step))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.on_step_end(step + 1)
    with torch.no_grad():
        held_out = model.eval()(moving(64, seed=10_000))
    return model.metrics_from_counts({"codes": held_out.pop("codes")}) | {k: v.item() for k, v in held_out.items()}


def test_it_learns_what_moves() -> None:
    held_out = train(make(), 300)
    assert held_out["mse"] < 0.5 * held_out["copy_mse"], held_out
    assert held_out["gap"] > 0.05 * held_out["copy_mse"], "another pair's action must hurt"
    assert held_out["perplexity"] > 2, "four directions need more than two codes"


def test_usage_and_perplexity_are_those_of_the_histograms() -> None:
    counts = torch.randint(0, 3, (2, 8))
    counts[1] = torch.tensor([0, 0, 9, 0, 0, 0, 0, 0])
    told = make().metrics_from_counts({"codes": counts})
    assert set(told) == {f"{what}{end}" for what in ("usage", "perplexity") for end in ("", "_0", "_1")}
    for end, part in (("", counts.sum(0)), ("_0", counts[0])):
        assert told[f"usage{end}"] == (part > 0).sum() / 8 and told[f"perplexity{end}"] == pytest.approx(
            float(perplexity(part))
        )
    assert told["usage_1"] == 1 / 8 and told["perplexity_1"] == pytest.approx(1.0)


def test_artifact_round_trip_with_the_real_loaders(hub: Path, tmp_path: Path) -> None:
    config = {
        "_target_": "step2_gidm.model.GIDM",
        "dim": 64,
        "num_heads": 4,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "vision": {"_target_": "common.frozen.dinov2", "path": str(hub / "dinov2"), "image_size": 64},
        "text": {"_target_": "common.frozen.t5_text", "path": str(hub / "t5")},
        "quantizer": {"_target_": "step2_gidm.quantizer.VectorQuantizer", "codes": 8, "dim": 16},
    }
    model = GIDM(
        vision=dinov2(hub / "dinov2", 64),
        text=t5_text(hub / "t5"),
        quantizer=VectorQuantizer(8, 16),
        dim=64,
        num_heads=4,
        encoder_layers=1,
        decoder_layers=1,
    )
    assert not [name for name in model.state_dict() if name.startswith(("vision", "text."))], (
        "frozen encoders are named, not copied"
    )
    batch = {"id": ["a", "b"], "frames": torch.rand(2, 2, 3, 64, 64), "text": ["open the drawer", "push"]}
    model.train()(batch)["loss"].backward()
    artifact.save(model, tmp_path / "gidm", kind="gidm", config=config)
    loaded = artifact.load(tmp_path / "gidm", "gidm")
    for key, value in model.eval()(batch).items():
        assert torch.equal(value, loaded(batch)[key]), key
    maps = loaded.attention(loaded.embed(batch["frames"][:, 0]), loaded.embed(batch["frames"][:, 1]), batch["text"])
    assert maps.shape == (2, 4, 64) and torch.allclose(maps.sum(-1), torch.ones(2, 4), atol=1e-5)


def test_attention_shows_the_patch_of_the_future_frame_that_a_query_looks_at() -> None:
    model = make(encoder_layers=1).eval()
    model.encoder.pos_embed.zero_()  # patches differ by their content alone
    block, stem = model.encoder.blocks[0], model.encoder.stem
    future = torch.randn(1, model.num_tokens, model.embed_dim).expand(2, -1, -1).clone()
    future[1] = future[1].roll(3, dims=0)
    now = future.roll(5, dims=1)
    with torch.no_grad():
        sought = block.norm_spatial(stem(future[0, 7]))
        other, asks = block.norm_spatial(stem(model.queries))
        asks = asks - (asks @ other) / (other @ other) * other  # for query 1 only
        block.spatial.to_k.weight.copy_(torch.eye(DIM))
        block.spatial.to_q.weight.copy_(10 * torch.outer(sought, asks) / (asks @ asks))
    maps = model.attention(now, future, ["go", "push the square to the left"])
    assert maps.shape == (2, 2, 16) and torch.allclose(maps.sum(-1), torch.ones(2, 2))
    assert maps[:, 1].argmax(1).tolist() == [7, 10] and (maps[:, 1].max(1).values > 0.9).all()
    assert torch.allclose(maps[:, 0], torch.full((2, 16), 1 / 16), atol=1e-4)


def test_residual_decoder_starts_from_no_change() -> None:
    fresh, outright = (
        GIDM(
            vision=FakeVision(),
            text=FakeText(),
            quantizer=VectorQuantizer(8, 6),
            dim=32,
            num_heads=2,
            encoder_layers=1,
            decoder_layers=1,
            residual=residual,
        ).eval()
        for residual in (True, False)
    )
    batch = moving(4)
    assert fresh(batch)["mse"] == fresh(batch)["copy_mse"] and outright(batch)["mse"] != outright(batch)["copy_mse"]
