from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from common.contracts import LatentAction
from common.frozen import clip_text, dinov2, t5_text
from step1_gfdm import DinoFuture
from step2_gidm.model import GIDM
from step2_gidm.quantizer import VectorQuantizer
from step3_defi.config import PARTS, TRAINABLE
from step3_defi.model import DeFI, EncodedObservation
from step3_defi.projector import ImaginedPresentProjector
from step3_defi.released.vpp import NullInverseDynamics, NullProjector
from step3_defi.released.vpp_adapter import VPPAdapter
from tests.step3_defi.parts import FakeGFDM, FakeGIDM, FakeGoal, build, make_batch, wake

CONFIGS = str(Path(__file__).resolve().parents[2] / "configs")
NEW = TRAINABLE["adapter"]
ROWS = TRAINABLE


def learn(model: DeFI, batch: dict, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        loss = model(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_forward_gives_finite_losses_and_code_use() -> None:
    model = build(**{"edm.noise_draws": 3})
    out = model(make_batch())
    assert {"loss", "action_loss", "bottleneck_loss", "codes", "latent_deviation"} == out.keys()
    assert all(torch.isfinite(value).all() for value in out.values())
    assert torch.isclose(out["loss"], out["action_loss"] + model.bottleneck.weight * out["bottleneck_loss"])
    assert (
        out["codes"].shape == (2, 6)
        and (out["codes"].sum(1) == 3 * len(model.pair_view_indices) * len(model.pair_frames)).all()
    )
    told = model.metrics_from_counts({"codes": torch.tensor([[4, 0, 0, 0, 0, 0], [0, 2, 0, 2, 0, 0]])})
    assert told == {"codes_used": 3.0, "perplexity": pytest.approx(2 * 2**0.5)}


@pytest.mark.parametrize("row", ROWS)
def test_gradient_flows_to_exactly_the_named_parts(row: str) -> None:
    model = build(trainable=ROWS[row])
    wake(model)
    model.train()(make_batch())["loss"].backward()
    for part in PARTS:
        module = getattr(model, part)
        parameters = list((module.module if part == "gfdm" and part not in ROWS[row] else module).parameters())
        touched = [p.grad is not None and bool(p.grad.any()) for p in parameters]
        kept = [parameter is model.gidm.codebook for parameter in parameters]  # the codes are frozen
        assert touched == [part in ROWS[row] and not code for code in kept], part
        assert [p.requires_grad for p in parameters] == [
            part in ROWS[row] and not (code and "gidm" in ROWS[row]) for code in kept
        ]


def test_optimizer_sees_what_is_trainable_and_checkpoint_what_is_not_frozen_elsewhere() -> None:
    frozen, trained = build(), build(trainable=PARTS)
    assert not [key for key in frozen.state_dict() if key.startswith("gfdm")]
    assert [key for key in trained.state_dict() if key.startswith("gfdm")] == ["gfdm.layer.weight", "gfdm.layer.bias"]
    assert not [key for key in trained.state_dict() if "decoder" in key]
    assert any(key.startswith("gidm") for key in build(trainable=NEW).state_dict())


def test_frozen_parts_stay_in_eval_mode() -> None:
    model = build(trainable=NEW)
    for _ in range(2):
        model.train()
        assert not model.gfdm.module.training and not model.gfdm.module.dropout.training and not model.gidm.training
        assert model.adapter.training and model.projector.training
    model.set_trainable(PARTS)
    assert model.gfdm.dropout.training
    model.set_trainable(NEW)
    assert (
        not model.gfdm.module.dropout.training and "gfdm" not in dict(model.named_children()).get("gfdm").state_dict()
    )


def test_latent_actions_survive_a_thousand_steps_of_finetuning(hub: Path) -> None:
    """Latent actions keep their spread and their codes.

    With a codebook that learns and restarts, the VQ loss shrank them within 50 steps, and restarts overwrote the unused
    codes at step 20. Alignment matters as well: without it, the inverse model reads tokens unlike those it knows.
    """
    gidm = GIDM(
        vision=dinov2(hub / "dinov2", 32),
        text=t5_text(hub / "t5"),
        dim=16,
        num_heads=2,
        encoder_layers=1,
        decoder_layers=1,
        quantizer=VectorQuantizer(16, 8, restart_every=20, normalize_tokens=4),
    )
    optimizer = torch.optim.AdamW([p for p in gidm.parameters() if p.requires_grad], lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(150):  # the two frames of a pair differ in brightness only
        frames = torch.rand(16, 2, 1, 1, 1, generator=generator).expand(-1, -1, 3, 32, 32)
        optimizer.zero_grad()
        gidm({"id": [""] * 16, "frames": frames, "text": ["go"] * 16})["loss"].backward()
        optimizer.step()
        gidm.on_step_end(step + 1)
    codes = gidm.quantizer.codebook.detach().clone()
    model = build(
        gidm=gidm,
        **{"alignment.weight": 1.0, "streams.names": ("latent",), "pairing.frames": (3,)},
        trainable=ROWS["gidm_adapter"],
    )
    batches = []
    # The actions are unrelated to the pictures, so only the inverse model's own loss acts on the latent actions.
    for _ in range(8):
        views = {
            name: torch.rand(16, 1, 1, 1, generator=generator).expand(-1, 3, 32, 32) * 2 - 1
            for name in ("static", "gripper")
        }
        futures = {name: view[:, None] for name, view in views.items()}
        batches.append(
            {
                "encoded": model.eval().encode_observation(views, ["go"] * 16, futures)._asdict(),
                "text": ["go"] * 16,
                "id": [""] * 16,
                "actions": torch.rand(16, 10, 7, generator=generator),
            }
        )

    def measured() -> tuple[float, int]:
        model.eval()
        found = [model(batch) for batch in batches]
        used = int((sum(out["codes"].sum(0) for out in found) > 0).sum())
        return float(torch.stack([out["latent_deviation"] for out in found]).mean()), used

    deviation, used = measured()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for step in range(1000):
        optimizer.zero_grad()
        model(batches[step % 8])["loss"].backward()
        optimizer.step()
        assert model.on_step_end(step + 1) == {}
    after, used_after = measured()
    assert torch.equal(model.gidm.quantizer.codebook, codes)
    assert after > 0.5 * deviation and used_after >= used / 2 and used > 1


def test_codes_restart_only_where_finetuning_asks_for_it() -> None:
    model = build()
    assert model.on_step_end(20) == {} and not model.gidm.restarted
    assert build(**{"bottleneck.codebook": "learned"}).on_step_end(20) == {}
    asked = build(**{"bottleneck.codebook": "learned", "bottleneck.restart_codes": True})
    assert asked.on_step_end(20) == {"restarted": 1.0} and asked.gidm.restarted == [20]
    with pytest.raises(ValueError, match="only learned codes can restart"):
        build(**{"bottleneck.restart_codes": True})


def test_no_stream_reaches_the_adapter_constant() -> None:
    """A stream that varies little compared with its offset still varies after it is standardized."""
    model, batch = build(), make_batch(8)
    lift = model.gidm.embed_action
    model.gidm.embed_action = lambda quantized: 1.37 + 0.1 * lift(quantized)
    for _ in range(3):
        model(batch)
    out = model.eval()(batch)
    assert all(out[f"spread_{name}"] > 0.2 for name in model.streams)


def test_alignment_comes_first_and_then_the_action_loss_beside_it() -> None:
    model, batch = build(**{"alignment.weight": 1.0, "alignment.steps": 2}), make_batch(futures=2)
    wake(model)
    first = model(batch)
    assert "action_loss" not in first
    first["loss"].backward()
    moved = {part for part in PARTS for p in getattr(model, part).parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"projector"} and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.on_step_end(1)
    assert "action_loss" not in model(batch) and "action_loss" in model.eval()(batch)
    model.train().on_step_end(2)
    assert {"action_loss", "alignment_loss", "copy_loss"} <= model(batch).keys()
    resumed = build(**{"alignment.weight": 1.0, "alignment.steps": 2})
    resumed.load_state_dict(model.state_dict())
    resumed.on_train_begin(2)
    assert "action_loss" in resumed(batch)
    with pytest.raises(ValueError, match="alignment.steps=2"):
        build(**{"alignment.steps": 2})


def test_streams_are_what_the_policy_names() -> None:
    assert build(**{"streams.names": ("latent",)}).adapter.stream_embedders.keys() == {"latent"}
    for wrong in ((), ("latent", "latent"), ("past",)):
        with pytest.raises(ValueError, match="streams"):
            build(**{"streams.names": wrong})


def test_unknown_part_and_wrong_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="adaptor.*video_former"):
        build(trainable=["adaptor"])
    with pytest.raises(ValueError, match="policy.trainable=adaptor"):
        build(trainable="adaptor")
    with pytest.raises(ValueError, match=r"0\.\.3"):
        build(**{"pairing.frames": (4,)})
    batch = make_batch()
    with pytest.raises(ValueError, match=r"\(9, 7\)"):
        build()({**batch, "actions": batch["actions"][:, :9]})
    del batch["views"]["gripper"]
    with pytest.raises(ValueError, match="gripper"):
        build()(batch)


def test_all_views_in_one_pass_of_the_forward_model() -> None:
    model = build()
    model(make_batch())
    assert model.gfdm.module.calls == 1


def test_pairs_of_one_view_leave_the_future_of_all_views_to_the_adapter() -> None:
    one, all_views = build(**{"pairing.views": ["static"]}), build()
    shape = {name: table.shape[0] for name, table in one.adapter.stream_pos_embed.items()}
    everywhere = {name: table.shape[0] for name, table in all_views.adapter.stream_pos_embed.items()}
    assert shape["future"] == everywhere["future"] == 2 * 2 * 4 and 2 * shape["latent"] == everywhere["latent"]
    wake(one)
    batch = make_batch()
    encoded = one.encode_observation(batch["views"], batch["text"])
    before = one.infer_streams(encoded, batch["text"]).streams
    encoded.features[:, 1] += 1  # the features of the gripper view
    after = one.eval().infer_streams(encoded, batch["text"]).streams
    assert not torch.allclose(before["future"], after["future"])
    assert one(batch)["loss"].isfinite()


SMALL_VPP = {
    "adapter": partial(
        VPPAdapter,
        dim=16,
        encoder_layers=1,
        decoder_layers=1,
        num_heads=2,
        attention_dropout=0.0,
        residual_dropout=0.0,
        mlp_dropout=0.0,
    ),
    "streams.standardize": False,
    "pairing.frames": (2,),
    "pairing.views": ["static"],
    "streams.names": ("video", "latent"),
    "bottleneck.codebook": "learned",
}


def test_an_imagined_present_reads_frames_0_and_5_of_one_view_and_no_dinov2() -> None:
    model, batch = build(projector=ImaginedPresentProjector, **SMALL_VPP), make_batch()
    model.gidm.embed = None  # must not be called
    stored = model.precompute(batch["views"], batch["text"])
    assert stored.keys() == {"features"}
    features = stored["features"].float().requires_grad_()
    streams = model.infer_streams(EncodedObservation(features), batch["text"]).streams
    (gradient,) = torch.autograd.grad(streams["latent"].sum(), features)
    touched = gradient.abs().sum((0, 3, 4)) > 0  # (V, F)
    assert touched.tolist() == [[True, False, True, False], [False] * 4]
    torch.manual_seed(0)
    direct = model(batch)
    torch.manual_seed(0)
    assert torch.allclose(direct["loss"], model({**batch, "encoded": stored})["loss"], rtol=2e-3)
    direct["loss"].backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)
    assert model.projector.time_pos_embed.grad.abs().sum((1, 2)).min() > 0


def test_without_an_inverse_model_video_tokens_are_all_there_is() -> None:
    changes = {**SMALL_VPP, "streams.names": ("video",)}
    model, batch = build(gidm=NullInverseDynamics(), projector=NullProjector, **changes), make_batch()
    out = model(batch)
    assert model.adapter.stream_embedders.keys() == {"video"} and out["bottleneck_loss"] == 0 and "codes" not in out
    out["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.eval().sample(batch["views"], batch["text"]).shape == (3, 10, 7)
    with pytest.raises(ValueError, match="no inverse model"):
        build(gidm=NullInverseDynamics(), projector=NullProjector, **changes, **{"alignment.weight": 1.0})(
            make_batch(futures=1)
        )
    with pytest.raises(ValueError, match="latent.*no tokens"):
        build(gidm=NullInverseDynamics(), projector=NullProjector, **SMALL_VPP)


def test_cache_equals_no_cache() -> None:
    model, batch = build(**{"alignment.weight": 0.5}), make_batch(futures=2)
    wake(model)
    stored = model.precompute(batch["views"], batch["text"], batch["futures"])
    assert stored["present_tokens"].shape == (3, 2, 16, 8) and stored["target_tokens"].shape == (3, 2, 2, 16, 8)
    assert stored["features"].shape == (3, 2, 4, 16, 12) and stored["features"].dtype == torch.float16
    start = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    direct = model(batch)
    model.load_state_dict(start)  # restores the running statistics
    torch.manual_seed(0)
    cached = model({"id": batch["id"], "encoded": stored, "text": batch["text"], "actions": batch["actions"]})
    assert direct.keys() == cached.keys() and "alignment_loss" in direct
    for key in direct:
        assert torch.allclose(direct[key], cached[key], rtol=2e-3), key


def test_a_trained_forward_model_cannot_be_cached() -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match="cache=false"):
        build(trainable=PARTS).precompute(batch["views"], batch["text"])


def test_alignment_pulls_the_projector_only_and_needs_futures() -> None:
    model = build(**{"alignment.weight": 1.0})
    with pytest.raises(ValueError, match="future_frames"):
        model(make_batch())
    batch = make_batch(futures=2)
    plain, aligned = build()(batch), model(batch)
    assert "alignment_loss" not in plain
    assert torch.isclose(
        aligned["loss"], aligned["action_loss"] + aligned["bottleneck_loss"] + aligned["alignment_loss"]
    )


def test_alignment_refuses_other_frames_than_the_pairs() -> None:
    with pytest.raises(ValueError, match=r"'static': 1.*pairing.frames=\[1, 3\]"):
        build(**{"alignment.weight": 1.0})(make_batch(futures=1))


def test_alignment_falls_where_it_is_taught() -> None:
    model, batch = build(**{"alignment.weight": 1.0}), make_batch(futures=2)
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        out = model(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["alignment_loss"].item())
    assert losses[-1] < 0.5 * losses[0]


def test_reliance_says_what_each_stream_tells_of_the_action() -> None:
    """If only the codes tell the action, swapping them raises the loss, and swapping an empty stream does not."""
    model, batch = build(**{"streams.names": ("video", "latent")}), make_batch(2)
    assert not [key for key in model(batch) if key.startswith(("swap", "mean", "spread"))]
    signs = torch.tensor([-1.0, 1.0])

    def infer(now: torch.Tensor, future: torch.Tensor, text: list[str]) -> LatentAction:
        z = signs.repeat_interleave(len(now) // 2).view(-1, 1, 1).expand(-1, 2, 4)
        return LatentAction(z, z, z.new_zeros(()), None)

    model.gidm.infer = infer
    model.video_former.forward = lambda features: features.new_zeros(
        2, model.video_former.num_tokens, model.video_former.dim
    )
    batch |= {"text": ["go", "go"], "actions": 0.7 * signs.view(2, 1, 1).expand(2, 10, 7)}
    learn(model, batch, 60)
    model.eval()
    told = model(batch)
    assert (
        told["action_loss"] < 0.5 < told["swap_latent"] * told["action_loss"]
        and told["mean_latent"] > 0
        and told["spread_latent"] > 0.2
    )
    assert told["swap_video"] == told["mean_video"] == told["spread_video"] == 0
    signs[:] = 1
    assert model(batch)["swap_latent"] == 0


@pytest.mark.parametrize("part", ["present_tokens", "features", "goal"])
def test_actions_depend_on_picture_future_and_sentence(part: str) -> None:
    model, batch = build().eval(), make_batch()
    wake(model)
    encoded = model.encode_observation(batch["views"], batch["text"])

    def output(encoded: EncodedObservation, texts: list[str]) -> torch.Tensor:
        inferred = model.infer_streams(encoded, texts)
        context = model.adapter.encode(inferred.goal, inferred.streams)
        return model.adapter(torch.ones(3, 10, 7), torch.ones(3), context)

    before = output(encoded, batch["text"])
    if part == "goal":
        after = output(encoded, [text + "!" for text in batch["text"]])
    else:
        tensor = getattr(encoded, part)
        after = output(encoded._replace(**{part: tensor + 3 * torch.randn_like(tensor)}), batch["text"])
    assert not torch.allclose(before, after, atol=1e-3)


def test_sentences_that_hardly_differ_are_told_apart() -> None:
    model, batch = build(), {**make_batch(2), "text": ["red", "pink"]}
    common = torch.randn(model.goal.pooled_dim)
    near = {"red": common + 0.01 * torch.randn_like(common), "pink": common + 0.01 * torch.randn_like(common)}
    model.goal.pooled = lambda texts: torch.stack([near[text] for text in texts])
    for _ in range(3):
        model(batch)
    seen = {}
    model.eval().adapter.goal_embedder.register_forward_hook(lambda _, args, out: seen.update(goal=args[0]))
    model(batch)
    assert (seen["goal"][0] - seen["goal"][1]).abs().mean() > 1


def test_blind_ignores_pictures_in_training_and_use() -> None:
    seeing, model, batch = build(), build(**{"observation.blind": True}), make_batch()
    wake(model), wake(seeing)
    other = {**batch, "views": {name: view.flip(-1) * 0.5 for name, view in batch["views"].items()}}

    def losses(policy: torch.nn.Module, data: dict) -> torch.Tensor:
        torch.manual_seed(0)
        return policy.eval()(data)["loss"]

    assert torch.equal(losses(model, batch), losses(model, other)) and not torch.equal(
        losses(seeing, batch), losses(seeing, other)
    )
    assert torch.equal(model.sample(batch["views"], batch["text"]), model.sample(other["views"], other["text"]))
    assert not torch.equal(seeing.sample(batch["views"], batch["text"]), seeing.sample(other["views"], other["text"]))


def test_the_forward_model_of_features_fits_the_same_plug(hub: Path) -> None:
    """The row DINO of Table 6."""
    future = DinoFuture(
        dinov2(hub / "dinov2", 32), clip_text(hub / "clip"), num_frames=4, dim=16, layers=1, num_heads=2
    )
    model, batch = build(gfdm=future), make_batch()
    wake(model)
    model(batch)["loss"].backward()
    assert not any(p.requires_grad for p in future.parameters()) and not any(
        "gfdm" in name for name in model.state_dict()
    )
    assert model.eval().sample(batch["views"], batch["text"]).shape == (3, 10, 7)
    assert model(batch | {"encoded": model.precompute(batch["views"], batch["text"])})["action_loss"].isfinite()


def test_sampling_is_seeded_and_rows_are_independent() -> None:
    model, batch = build().eval(), make_batch()
    wake(model)
    whole = model.sample(batch["views"], batch["text"], seed=[4, 5, 6])
    assert whole.shape == (3, 10, 7) and torch.equal(whole, model.sample(batch["views"], batch["text"], seed=[4, 5, 6]))
    alone = model.sample({name: view[1:2] for name, view in batch["views"].items()}, batch["text"][1:2], seed=5)
    assert torch.allclose(whole[1:2], alone, atol=1e-4)
    assert not torch.allclose(
        whole[1:2], model.sample({n: v[1:2] for n, v in batch["views"].items()}, batch["text"][1:2], seed=7), atol=1e-3
    )


def test_it_learns_what_pictures_tell() -> None:
    """Two pictures share a sentence and have different actions: the sampled actions differ."""
    model, levels = build(**{"edm.noise_draws": 16, "edm.num_inference_steps": 10}), torch.tensor([-0.7, 0.7])
    views = {name: levels.view(2, 1, 1, 1).expand(2, 3, 16, 16) for name in ("static", "gripper")}
    batch = {
        "id": ["dark", "bright"],
        "views": views,
        "text": ["go", "go"],
        "actions": levels.view(2, 1, 1).expand(2, 10, 7),
    }
    learn(model, batch, 80)
    actions = model.eval().sample(views, batch["text"])
    assert (actions.mean((1, 2)) - levels).abs().max() < 0.35


def full_scale(gidm: nn.Module | None, *overrides: str) -> DeFI:
    """A policy as configured, over models of full width; no memory is allocated. `gidm` None: as configured."""
    with initialize_config_dir(CONFIGS, version_base=None):
        policy = OmegaConf.to_container(compose("step3_defi", list(overrides)).policy, resolve=True)
    gfdm, goal = FakeGFDM(), FakeGoal()
    gfdm.feature_dim, gfdm.num_frames, gfdm.num_tokens, goal.pooled_dim = 2560, 16, 256, 512
    with torch.device("meta"):
        gidm = gidm or instantiate(policy["gidm"])
        return instantiate({**policy, "gfdm": None, "gidm": None, "goal": None, "_partial_": True})(
            gfdm=gfdm, gidm=gidm, goal=goal
        )


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("row", ["defi=official", "experiment=defi/official"])
def test_official_has_the_releases_sizes(row: str) -> None:
    """156.84 M numbers learn, as in the released checkpoint."""
    with initialize_config_dir(CONFIGS, version_base=None):
        config = OmegaConf.to_container(compose("step2_gidm", ["gidm=official"]).gidm, resolve=True)
    eyes = SimpleNamespace(dim=768, num_tokens=256)
    with torch.device("meta"):
        gidm = instantiate({**config, "vision": None, "text": None, "_partial_": True})(vision=eyes, text=eyes)
    model = full_scale(gidm, row)
    assert (
        round(size(model.gidm) / 1e6, 2) == 114.75
        and size(model.video_former) == 17_713_536
        and size(model.projector) == 2_557_440 + 2 * 768
    )
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6, 2) == 156.84
    assert (
        model.pair_frames == (5,)
        and model.pair_view_indices == [0]
        and model.adapter.stream_embedders.keys() == {"video", "latent"}
        and not model.uses_present_tokens
    )


@pytest.mark.parametrize("row", ["defi=vpp", "experiment=defi/vpp"])
def test_vpp_has_its_own_sizes(row: str) -> None:
    model = full_scale(None, row)
    assert size(model.video_former) == 17_713_536 and size(model.adapter) == 22_602_631 - 1_081_728
    assert size(model) == size(model.video_former) + size(model.adapter)


def test_full_scale_builds_to_the_papers_sizes() -> None:
    """The sizes of Table 10."""
    gidm = FakeGIDM()
    gidm.embed_dim, gidm.num_action_tokens = 768, 4
    model = full_scale(gidm)
    counts = {
        name: sum(p.numel() for p in getattr(model, name).parameters())
        for name in ("projector", "video_former", "adapter")
    }
    assert counts["projector"] == 2_557_440 + 2 * 768 and counts["video_former"] == 17_713_536 + 2 * 384 + 6 * 2 * 384
    assert (
        counts["adapter"] == pytest.approx(40.9e6, rel=0.02)
        and len(model.adapter.blocks) == 12
        and model.adapter.action_pos_embed.shape == (10, 384)
    )
    assert model.edm.num_inference_steps == 10 and model.pair_frames == (5, 10, 15)
