"""The program itself over the true tiny models: parents, cache, a few steps, artifact, policy."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file

from common import artifact
from step3_defi import DeFI, policy, train
from step3_defi.vpp_adapter import VPPAdapter
from tests.step3_defi.parts import PARENT_CONFIGS, configure


def run(tree: Path, name: str, *overrides: str) -> Path:
    cfg = configure("step3_defi", f"paths.ckpts={tree}/ckpts", f"paths.data={tree}/data", f"name={name}",
                    f"data.root={tree}/data/demonstrations", "data.holdout=0.25", "data.frame_stride=8",
                    "loop.max_steps=3", "loop.batch_size=2", "loop.eval_every=3", "loop.log_every=1", "loop.warmup_steps=1", *overrides)
    train.main.__wrapped__(cfg)
    return tree / "ckpts/defi" / name


def test_trains_saves_and_acts(tree: Path, tmp_path: Path) -> None:
    folder = run(tree, "first")
    meta = artifact.meta(folder, "defi")
    assert meta["step"] == 3 and meta["parents"] == {kind: artifact.sha256(tree / f"ckpts/{kind}/tiny") for kind in PARENT_CONFIGS}
    assert len(meta["stats"]["actions"]["std"]) == 7
    keys = load_file(folder / "weights.safetensors").keys()
    assert not [k for k in keys if k.startswith("gfdm") or "decoder" in k] and any(k.startswith("gidm") for k in keys)
    robot = policy.load(folder, execute=5)
    rng = np.random.default_rng(0)
    seen = {"rgb_obs": {"rgb_static": rng.integers(0, 255, (200, 200, 3), np.uint8), "rgb_gripper": rng.integers(0, 255, (84, 84, 3), np.uint8)},
            "robot_obs": np.zeros(15)}
    both = robot.plan([seen, seen], ["open the drawer", "close the drawer"])
    assert both.shape == (2, 10, 7) and np.allclose(both[:1], robot.plan([seen], ["open the drawer"]), atol=1e-3)
    whole = robot.save_pretrained(tmp_path / "whole")
    again = policy.DeFIPolicy.from_pretrained(whole, execute=5)
    assert again.moved == {f"{kind}.path": str(whole / "parents" / kind) for kind in PARENT_CONFIGS}
    assert np.array_equal(again.plan([seen, seen], ["open the drawer", "close the drawer"]), both)


def test_cache_changes_nothing_but_speed(tree: Path) -> None:
    """The whole program with and without it, up to the fp16 of the cache."""
    weights = [load_file(run(tree, f"cache_{cache}", f"cache={cache}") / "weights.safetensors") for cache in ("true", "false")]
    for key, value in weights[0].items():
        assert torch.allclose(value.float(), weights[1][key].float(), atol=5e-3), key


@pytest.mark.parametrize("row", ["alignment", "blind", "t1_third_view", "t4_gidm_no_pretrain", "t4_gfdm_no_pretrain", "t6_five_steps", "t9_all"])
def test_rows_train_and_load(tree: Path, row: str) -> None:
    model = policy.load(run(tree, row, f"experiment=defi/{row}")).model
    assert isinstance(model, DeFI)
    assert model.alignment_weight == (row == "alignment")
    assert model.blind == (row == "blind") and model.views == (("static",) if row == "t1_third_view" else ("static", "gripper"))
    gfdm = model.gfdm if row == "t9_all" else model.gfdm.module
    assert gfdm.denoise_steps == (5 if row == "t6_five_steps" else 1)


@pytest.mark.parametrize("row", ["official", "vpp"])
def test_published_policies_train_and_load(tree: Path, row: str) -> None:
    """Two steps of the row, and as many of its policy under the recipe of the scale, with its cache."""
    gidm = [f"policy.gidm.path={tree}/ckpts/gidm/tiny"] if row == "official" else []
    model = policy.load(run(tree, row, f"experiment=defi/{row}", f"policy.gfdm.path={tree}/ckpts/gfdm/tiny", *gidm, "loop.max_steps=2")).model
    assert isinstance(model.adapter, VPPAdapter) and model.gfdm.module._time_ids[0, 0] == 4
    assert row == "vpp" or not model.gidm.clean_text
    policy.load(run(tree, f"{row}_cached", f"policy={row}", "cache=true", "loop.max_steps=2", "loop.precision=no"))


def test_caches_of_other_looks_are_not_mixed_up(tree: Path) -> None:
    """Neither overrides of a parent nor a policy that never looks at the present may read another's features."""
    folder = [f"cache_dir={tree}/looks", "cache=true", "loop.max_steps=1"]
    run(tree, "looks", *folder)
    run(tree, "looks_again", *folder)
    assert len([p for p in (tree / "looks").iterdir() if p.is_dir()]) == 2  # training and validation
    run(tree, "looks_4_fps", *folder, "+policy.gfdm.overrides.fps=4")
    run(tree, "looks_ahead", *folder, "policy=official")
    assert len([p for p in (tree / "looks").iterdir() if p.is_dir()]) == 6


def test_every_trained_parameter_gets_a_gradient(tree: Path) -> None:
    """DDP waits for all of them; with the true models, also where the forward model learns."""
    for trainable in ("gidm_adapter", "all"):
        cfg = configure("step3_defi", f"paths.ckpts={tree}/ckpts", f"policy/trainable={trainable}")
        model = instantiate(OmegaConf.to_container(cfg.policy, resolve=True)).train()
        pictures = {view: torch.rand(2, 3, 64, 64) * 2 - 1 for view in model.views}
        model({"id": ["a", "b"], "views": pictures, "text": ["open the drawer", "go"], "actions": torch.rand(2, 10, 7)})["loss"].backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]


def test_weights_that_do_not_fit_are_refused(tree: Path) -> None:
    folder = run(tree, "misfit")
    with pytest.raises(artifact.ArtifactError, match="does not fit"):
        policy.load(folder, overrides={"pair_frames": [1, 3]})
