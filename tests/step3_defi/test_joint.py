"""The row that trains all objectives together, with the real models at scale tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from common import artifact
from common.image_range import denormalize
from step3_defi import DeFI, policy
from step3_defi.config import PARTS
from step3_defi.joint import JointDeFI
from tests.step3_defi.parts import configure, make_batch, wake
from tests.step3_defi.test_train import run

NEW = ("projector", "video_former", "adapter")


def build(tree: Path, *overrides: str, kind: type[DeFI] = JointDeFI) -> Any:
    torch.manual_seed(0)
    config = OmegaConf.to_container(
        configure("step3_defi", f"paths.ckpts={tree}/ckpts", "experiment=defi/joint", *overrides).policy, resolve=True
    )
    if kind is DeFI:
        config = {key: value for key, value in config.items() if not key.endswith("_weight")} | {
            "_target_": "step3_defi.DeFI"
        }
    model = instantiate(config).train()
    wake(model)
    return model


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two windows with three true future frames, in the picture size of the tiny models."""

    def grown(views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: torch.nn.functional.interpolate(view.flatten(0, -4), 64).unflatten(0, view.shape[:-3])
            for name, view in views.items()
        }

    small = make_batch(2, futures=3)
    return {**small, "views": grown(small["views"]), "futures": grown(small["futures"])}


def reached(model: DeFI) -> set[str]:
    """Names of the parameters whose gradient is not zero."""
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}


def test_every_loss_is_there_and_every_parameter_learns(tree: Path, batch: dict[str, Any]) -> None:
    model = build(tree)
    # This layer starts at zero, so no layer before it would get a gradient in the first step.
    model.gidm.decoder.out.weight.data.normal_()
    out = model(batch)
    assert {
        "action_loss",
        "video_loss",
        "reconstruction_loss",
        "reconstruction_mse",
        "reconstruction_copy_mse",
        "bottleneck_loss",
    } < out.keys()
    total = out["action_loss"] + out["bottleneck_loss"] + out["video_loss"] + out["reconstruction_loss"]
    assert (
        torch.isclose(out["loss"], total)
        and min(out[f"{name}_loss"] for name in ("action", "video", "reconstruction")) > 0
    )
    out["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    names = reached(model)
    for part in ("gfdm.unet.conv_out", "gfdm.unet.down_blocks", "gidm.encoder", "gidm.decoder", *NEW):
        assert any(name.startswith(part) for name in names), part


def test_each_objective_teaches_its_own_part(tree: Path, batch: dict[str, Any]) -> None:
    """The video loss reaches the forward model only, and the reconstruction loss the inverse model only."""
    model = build(tree)
    clip = model._draw(model._clips(batch))
    model.video_loss(clip, batch).backward()
    assert {name.split(".")[0] for name in reached(model)} == {"gfdm"}
    model.zero_grad()
    model.gidm({"id": batch["id"], "frames": denormalize(clip[:, [0, -1]]), "text": batch["text"]})["loss"].backward()
    assert {name.split(".")[0] for name in reached(model)} == {"gidm"}
    model.zero_grad()
    DeFI.forward(model, batch)["loss"].backward()
    assert {name.split(".")[0] for name in reached(model)} == set(PARTS) and not [
        name for name in reached(model) if "decoder" in name
    ]


def test_zero_weights_leave_defi(tree: Path, batch: dict[str, Any]) -> None:
    joint, plain = build(tree, "policy.video_weight=0", "policy.reconstruction_weight=0"), build(tree, kind=DeFI)
    plain.load_state_dict({key: joint.state_dict()[key] for key in plain.state_dict()})
    losses = []
    for model in (joint, plain):
        torch.manual_seed(3)
        losses.append(model(batch)["loss"])
        losses[-1].backward()
    assert type(plain) is DeFI and torch.equal(*losses)
    own = dict(joint.named_parameters())
    assert all(
        torch.equal(parameter.grad, own[name].grad)
        for name, parameter in plain.named_parameters()
        if parameter.grad is not None
    )


def test_the_clip_is_the_present_and_what_follows_of_one_view(tree: Path, batch: dict[str, Any]) -> None:
    model = build(tree)
    seen = {model._draw(model._clips(batch))[0].sum().item() for _ in range(20)}
    whole = [torch.cat([batch["views"][view][:1], batch["futures"][view][0]]).sum().item() for view in model.views]
    assert seen == set(whole)


def test_what_it_cannot_do_is_one_line(tree: Path, batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="data.future_frames=4"):
        build(tree)({key: value for key, value in batch.items() if key != "futures"})
    with pytest.raises(ValueError, match=r"data.future_frames=4"):
        build(tree)({**batch, "futures": {name: frames[:, :2] for name, frames in batch["futures"].items()}})
    with pytest.raises(ValueError, match="lacks .*gfdm"):
        build(tree).set_trainable(["gidm", *NEW])


def test_alignment_takes_the_pairs_out_of_the_clip(tree: Path, batch: dict[str, Any]) -> None:
    model = build(tree, "policy.alignment.weight=1", "policy.pairing.frames=[0,2]").eval()
    target = model.encode_observation(
        batch["views"], batch["text"], {name: clip[:, [0, 2]] for name, clip in model._clips(batch).items()}
    ).target_tokens
    assert torch.equal(target[:, 0, 0], model.gidm.embed(denormalize(batch["views"]["static"])))
    assert "alignment_loss" in model(batch)


def test_trains_saves_whole_and_acts_as_a_defi(tree: Path, tmp_path: Path, batch: dict[str, Any]) -> None:
    folder = run(tree, "joint", "experiment=defi/joint", "loop.max_steps=2", "loop.eval_every=2")
    assert artifact.read_meta(folder, "defi")["parents"] == {}
    robot = policy.load(folder)
    kept = robot.model.state_dict()
    assert (
        isinstance(robot.model, JointDeFI)
        and any("gfdm.unet.conv_out" in key for key in kept)
        and any("gidm.decoder" in key for key in kept)
    )
    again = policy.load(robot.save_pretrained(tmp_path / "whole")).model
    plain = build(tree, kind=DeFI).eval()
    plain.load_state_dict({key: kept[key] for key in plain.state_dict()})
    sampled = [model.sample(batch["views"], batch["text"], seed=5) for model in (robot.model, again, plain)]
    assert torch.equal(sampled[0], sampled[1]) and torch.equal(sampled[0], sampled[2])
    rows = (folder / "metrics.jsonl").read_text()
    assert all(
        f'"{split}/{name}_loss"' in rows for split in ("train", "val") for name in ("action", "video", "reconstruction")
    )
    assert '"val/swap_latent"' in rows and '"val/reconstruction_gap"' in rows
