from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.artifact import ArtifactError
from step3_defi import links, reliance, train
from tests.step3_defi.parts import build, configure, make_batch, wake

WINDOWS = ["data.val_fraction=0.25", "data.frame_stride=8"]


def trained(tree: Path, name: str, *overrides: str) -> Path:
    places = [f"paths.ckpts={tree}/ckpts", f"paths.data={tree}/data", f"data.root={tree}/data/demonstrations"]
    train.main.__wrapped__(
        configure(
            "step3_defi",
            *places,
            f"name={name}",
            "loop.max_steps=2",
            "loop.batch_size=2",
            "loop.eval_every=null",
            "loop.warmup_steps=1",
            "policy.alignment.steps=0",
            *WINDOWS,
            *overrides,
        )
    )
    return tree / "ckpts/defi" / name


def examined(tree: Path, path: Path, *overrides: str) -> dict:
    links.main.__wrapped__(
        configure(
            "step3_links",
            f"path={path}",
            f"data.root={tree}/data/demonstrations",
            "batch_size=2",
            "windows=4",
            *WINDOWS,
            *overrides,
        )
    )
    return json.loads((path / "links/links.json").read_text())


def test_the_program_measures_every_stream_and_draws_it(tree: Path) -> None:
    found = examined(tree, trained(tree, "linked", "policy.streams.names=[video,latent,future]"))
    assert found["streams"] == ["video", "latent", "future"]
    assert found["costs"].keys() == {
        f"{how}_{name}" for how in ("swap", "mean") for name in ("video", "latent", "future", "gfdm")
    }
    assert (
        found["copy_error"] > 0 and found["projector_error"] > 0 and found["codes_used"].keys() == {"imagined", "true"}
    )
    table = (tree / "ckpts/defi/linked/links/table.md").read_text()
    assert "all of the forward model" in table and "Codes used" in table
    assert (tree / "ckpts/defi/linked/links/links.png").stat().st_size > 5000


def test_a_policy_whose_present_is_imagined_has_no_target_to_miss(tree: Path) -> None:
    published = [f"policy.{kind}.path={tree}/ckpts/{kind}/tiny" for kind in ("gfdm", "gidm")]
    found = examined(
        tree,
        trained(
            tree,
            "linked_official",
            "experiment=defi/official",
            *published,
            "data.min_window=null",
            "loop.grad_accum_steps=1",
        ),
    )
    assert (
        found["streams"] == ["video", "latent"]
        and "copy_error" not in found
        and found["codes_used"].keys() == {"imagined"}
    )


def test_what_is_missing_is_one_line(tree: Path, tmp_path: Path) -> None:
    with pytest.raises((SystemExit, ArtifactError), match="no artifact here"):
        examined(tree, tmp_path)
    with pytest.raises((SystemExit, ValueError), match="fewer than batch_size=400"):
        examined(tree, trained(tree, "linked_short"), "batch_size=400")


def test_shares_tell_motion_from_gripper() -> None:
    own, wrong = torch.ones(4, 10, 7), torch.ones(4, 10, 7)
    wrong[..., 6] = 8.0
    found = {name: float(value) for name, value in reliance.loss_increase(wrong, own).items()}
    assert found == {"all": pytest.approx(1.0), "motion": pytest.approx(0.0), "gripper": pytest.approx(7.0)}


def test_replacing_a_stream_costs_nothing_only_where_it_is_not_read() -> None:
    """A check of the measure itself: only a stream whose weights are zero costs nothing when it is replaced."""
    model, batch = build().eval(), make_batch(4)
    wake(model)
    torch.nn.init.zeros_(model.adapter.stream_embedders["latent"][1].weight)
    torch.nn.init.zeros_(model.adapter.stream_embedders["latent"][1].bias)
    encoded = model.encode_observation(batch["views"], batch["text"])
    inferred = model.infer_streams(encoded, batch["text"])
    costs = {
        name: float(loss_increase["all"])
        for name, loss_increase in model.reliance(inferred, encoded, batch["text"], batch["actions"]).items()
    }
    assert costs["swap_latent"] == costs["mean_latent"] == 0
    assert all(
        abs(costs[name]) > 1e-6 for name in ("swap_video", "mean_video", "swap_future", "swap_gfdm", "mean_gfdm")
    )


def test_spread_is_that_over_samples_alone() -> None:
    constant = torch.randn(1, 3, 5).expand(8, -1, -1)  # differs over tokens, not over samples
    assert reliance.spread(constant) == 0 and reliance.deviation(constant) == 0
    assert reliance.spread(torch.randn(4000, 3, 5)) == pytest.approx(1.0, abs=0.02)
    assert reliance.spread(torch.randn(4000, 3, 5) + 10) == pytest.approx(0.1, abs=0.01)
