"""The training program with the real models at scale tiny: parents, cache, a few steps, artifact, policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file

from common import artifact
from common.distributed import processes
from common.loop import Loop
from step3_defi import DeFI, policy, train
from step3_defi.released.vpp_adapter import VPPAdapter
from tests.step3_defi.parts import PARENT_CONFIGS, configure


def run(tree: Path, name: str, *overrides: str) -> Path:
    cfg = configure(
        "step3_defi",
        f"paths.ckpts={tree}/ckpts",
        f"paths.data={tree}/data",
        f"name={name}",
        f"data.root={tree}/data/demonstrations",
        "data.val_fraction=0.25",
        "data.frame_stride=8",
        "loop.max_steps=3",
        "loop.batch_size=2",
        "loop.eval_every=3",
        "loop.log_every=1",
        "loop.warmup_steps=1",
        "policy.alignment.steps=0",
        *overrides,
    )
    train.main.__wrapped__(cfg)
    return tree / "ckpts/defi" / name


def test_trains_saves_and_acts(tree: Path, tmp_path: Path) -> None:
    folder = run(tree, "first")
    read_meta = artifact.read_meta(folder, "defi")
    assert read_meta["step"] == 3 and read_meta["parents"] == {
        kind: artifact.sha256(tree / f"ckpts/{kind}/tiny") for kind in PARENT_CONFIGS
    }
    assert len(read_meta["stats"]["actions"]["std"]) == 7
    keys = load_file(folder / "weights.safetensors").keys()
    assert not [k for k in keys if k.startswith("gfdm") or "decoder" in k] and any(k.startswith("gidm") for k in keys)
    robot = policy.load(folder, execute=5)
    rng = np.random.default_rng(0)
    seen = {
        "rgb_obs": {
            "rgb_static": rng.integers(0, 255, (200, 200, 3), np.uint8),
            "rgb_gripper": rng.integers(0, 255, (84, 84, 3), np.uint8),
        },
        "robot_obs": np.zeros(15),
    }
    both = robot.predict_action_chunk([seen, seen], ["open the drawer", "close the drawer"])
    assert both.shape == (2, 10, 7) and np.allclose(
        both[:1], robot.predict_action_chunk([seen], ["open the drawer"]), atol=1e-3
    )
    whole = robot.save_pretrained(tmp_path / "whole")
    again = policy.DeFIPolicy.from_pretrained(whole, execute=5)
    assert again.parent_overrides == {f"{kind}.path": str(whole / "parents" / kind) for kind in PARENT_CONFIGS}
    assert np.array_equal(again.predict_action_chunk([seen, seen], ["open the drawer", "close the drawer"]), both)


def test_a_broken_run_goes_on_to_the_same_weights_bit_for_bit(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["loop.max_steps=6", "loop.eval_every=2", "loop.save_every=3"]
    whole, save = run(tree, "whole", *options), Loop._save

    def save_and_die(loop: Loop) -> None:
        save(loop)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(tree, "broken", *options)
    broken = run(tree, "broken", *options)
    for place in ("", policy.BEST):
        assert artifact.read_meta(broken / place)["step"] == artifact.read_meta(whole / place)["step"]
        expected, found = (load_file(folder / place / "weights.safetensors") for folder in (whole, broken))
        assert expected.keys() == found.keys() and all(
            torch.equal(value, found[key]) for key, value in expected.items()
        )


def test_the_best_policy_is_kept_beside_the_last(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out losses are set by hand: the second of three validations is the best."""
    losses, forward = iter([3.0, 1.0, 2.0]), DeFI.forward

    def made_up(model: DeFI, batch: dict) -> dict[str, torch.Tensor]:
        metrics = forward(model, batch)
        return metrics if model.training else {**metrics, "action_loss": torch.tensor(next(losses))}

    monkeypatch.setattr(DeFI, "forward", made_up)
    folder = run(tree, "kept", "loop.max_steps=6", "loop.eval_every=2", "loop.eval_batches=1")
    assert (artifact.read_meta(folder)["step"], artifact.read_meta(folder / policy.BEST)["step"]) == (6, 4) and next(
        losses, None
    ) is None
    monkeypatch.undo()
    last, best = policy.load(folder).model.state_dict(), policy.load(folder / policy.BEST).model.state_dict()
    assert any(not torch.equal(last[key], best[key]) for key in last)
    identity = artifact.sha256(folder)
    (folder / policy.BEST).rename(folder.parent / "alone")
    assert artifact.sha256(folder) == identity, "the best is no part of the last"
    with pytest.raises(
        SystemExit, match="loop.best=loss_of_actions: the model reports no such metric; it reports .*action_loss"
    ):
        run(tree, "unkept", "loop.best=loss_of_actions")


def launched(tree: Path, processes: int, *overrides: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Run train_distributed.py -> (weights, rows of metrics.jsonl)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=29883"]
    name = f"processes_{processes}_{len(overrides)}"
    script = [str(Path(__file__).with_name("train_distributed.py")), str(tree), name, "4", *overrides]
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    subprocess.run([*launcher, *script], cwd=root, env=environment, check=True, timeout=300)
    folder = tree / "ckpts/defi" / name
    return load_file(folder / "weights.safetensors"), [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_two_processes_finetune_as_one_with_the_same_global_batch(tree: Path) -> None:
    """Losses, gradients, weights, and the running statistics of features and sentences, which no optimizer holds."""
    (alone, rows), (others, found) = launched(tree, 1), launched(tree, 2)
    steps, pairs = [[row for row in part if "train/loss" in row] for part in (rows, found)]
    assert len(steps) == 5 and steps[0]["train/loss"] != steps[-1]["train/loss"]
    for one, two in zip(steps, pairs, strict=True):
        assert two["train/action_loss"] == pytest.approx(one["train/action_loss"], rel=1e-4) and two[
            "grad_norm"
        ] == pytest.approx(one["grad_norm"], rel=1e-3)
    for name in ("codes_used", "perplexity"):
        assert [row[f"train/{name}"] for row in pairs] == pytest.approx([row[f"train/{name}"] for row in steps])
    assert alone.keys() == others.keys()
    for key, value in alone.items():
        torch.testing.assert_close(others[key], value, atol=2e-4, rtol=1e-3, msg=lambda said, key=key: f"{key}: {said}")
    assert not torch.equal(alone["feature_norm.mean"], torch.zeros_like(alone["feature_norm.mean"]))


def test_two_processes_validate_on_one_window_as_one_does(tree: Path) -> None:
    """The second process has no window left, and the first one must not wait for it."""
    (_, rows), (_, found) = (
        launched(tree, processes, "data.frame_stride=40", "loop.max_steps=1", "loop.eval_every=1")
        for processes in (1, 2)
    )
    one, two = ([row["val/action_loss"] for row in part if "val/loss" in row] for part in (rows, found))
    assert len(one) == 1 and two == pytest.approx(one, rel=1e-3)


def test_a_policy_may_start_from_another_ones_weights(tree: Path) -> None:
    start = run(tree, "start")
    cfg = configure("step3_defi", f"paths.ckpts={tree}/ckpts", "policy.trainable=adapter", "policy.edm.noise_draws=2")
    config = OmegaConf.to_container(cfg.policy, resolve=True)
    config["gfdm"]["path"] = config["gidm"]["path"] = "nowhere"
    config = train.config_from_init(start, config)
    model = instantiate(config)
    train.load_init_weights(model, start)
    before, views = policy.load(start).model, {view: torch.rand(2, 3, 64, 64) * 2 - 1 for view in ("static", "gripper")}
    expected, found = (m.eval().sample(views, ["open the drawer", "go"], seed=[1, 2]) for m in (before, model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # `load` encodes sentences one by one
    assert expected.std() > 1e-3
    assert model.trainable == ("projector", "video_former", "adapter") and model.edm.noise_draws == 2
    assert not any(parameter.requires_grad for parameter in model.gidm.parameters())


def test_training_goes_on_from_a_start(tree: Path) -> None:
    start = run(tree, "start")
    more = run(tree, "more", f"init_from={start}", "loop.max_steps=2", "loop.optimizer.lr=1e-5", "loop.ema_decay=null")
    first, second, fresh = (
        load_file(f / "weights.safetensors") for f in (start, more, run(tree, "fresh", "loop.max_steps=1", "seed=1"))
    )
    far = [float((second[key] - first[key]).abs().max()) for key in first if key.startswith("adapter")]
    assert 0 < max(far) < 1e-4 < float((fresh["adapter.out.weight"] - first["adapter.out.weight"]).abs().max())
    record = artifact.read_meta(more)
    assert (
        record["stats"]["init_from"] == artifact.sha256(start)
        and record["parents"] == artifact.read_meta(start)["parents"]
    )


def test_a_start_of_another_policy_is_named(tree: Path) -> None:
    start = run(tree, "start")
    message = (
        r"init_from=.*start is another policy .*: policy.observation.views is .* there and \['static'\] here; "
        r"policy.streams.fuse_grid is 4 there and 2 here; give"
    )
    with pytest.raises(SystemExit, match=message):
        run(
            tree,
            "other",
            f"init_from={start}",
            "policy.observation.views=[static]",
            "policy.streams.fuse_grid=2",
            "policy.alignment.weight=0.5",
        )
    with pytest.raises(SystemExit, match="neither a folder nor a hub id"):
        run(tree, "other", "init_from=no/such/place")
    learned = run(tree, "learned", "policy.trainable=gfdm_adapter", "loop.max_steps=1")
    with pytest.raises(SystemExit, match="holds a forward model that was finetuned"):
        run(tree, "other", f"init_from={learned}")
    assert not (tree / "ckpts/defi/other/meta.json").exists()
    assert (
        policy.load(
            run(tree, "other", f"init_from={learned}", "policy.trainable=all", "loop.max_steps=1")
        ).model.trainable[0]
        == "gfdm"
    )


def test_cache_changes_nothing_but_speed(tree: Path) -> None:
    """The program gives the same weights with and without the cache, up to its rounding to fp16."""
    weights = [
        load_file(run(tree, f"cache_{cache}", f"cache={cache}") / "weights.safetensors") for cache in ("true", "false")
    ]
    for key, value in weights[0].items():
        # Running statistics are as large as what they measure, so their relative error is compared.
        share = 1e-2 if key.endswith(("mean", "square", "var")) else 1e-5
        assert torch.allclose(value.float(), weights[1][key].float(), atol=5e-3, rtol=share), key


def test_the_others_wait_for_the_cache_however_long_it_takes(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[timedelta] = []
    monkeypatch.setattr(train, "processes", lambda timeout=timedelta(minutes=10): asked.append(timeout) or processes())
    run(tree, "patient", "loop.max_steps=1")
    assert len(asked) == 1 and asked[0] > timedelta(days=1)


@pytest.mark.parametrize(
    "row",
    [
        "no_alignment",
        "a3_latent_only",
        "future_stream",
        "now",
        "blind",
        "t1_third_view",
        "t4_gidm_no_pretrain",
        "t4_gfdm_no_pretrain",
        "t6_five_steps",
        "t9_all",
    ],
)
def test_rows_train_and_load(tree: Path, row: str) -> None:
    model = policy.load(run(tree, row, f"experiment=defi/{row}")).model
    assert isinstance(model, DeFI)
    assert (model.alignment.weight == 0) == (row == "no_alignment")
    assert model.observation.blind == (row == "blind") and model.views == (
        ("static",) if row == "t1_third_view" else ("static", "gripper")
    )
    gfdm = model.gfdm if row == "t9_all" else model.gfdm.module
    assert (gfdm.denoise_steps, gfdm.schedule_steps) == ((5, 5) if row == "t6_five_steps" else (1, 20))


@pytest.mark.parametrize("row", ["official", "vpp"])
def test_published_policies_train_and_load(tree: Path, row: str) -> None:
    """Two steps of the row, and two steps of its preset with the loop and the cache of the scale."""
    gidm = [f"policy.gidm.path={tree}/ckpts/gidm/tiny"] if row == "official" else []
    model = policy.load(
        run(tree, row, f"experiment=defi/{row}", f"policy.gfdm.path={tree}/ckpts/gfdm/tiny", *gidm, "loop.max_steps=2")
    ).model
    assert isinstance(model.adapter, VPPAdapter) and model.gfdm.module._time_ids[0, 0] == 4
    assert row == "vpp" or not model.gidm.clean_text
    policy.load(run(tree, f"{row}_cached", f"defi={row}", "cache=true", "loop.max_steps=2", "loop.precision=no"))


def test_caches_of_other_looks_are_not_mixed_up(tree: Path) -> None:
    """Other overrides of a model, or a policy that does not read the present, get a cache of their own.

    An untrained inverse model has the same vision encoder, so it shares the cache.
    """
    folder = [f"cache_dir={tree}/looks", "cache=true", "loop.max_steps=1"]
    run(tree, "looks", *folder)
    run(tree, "looks_again", *folder)
    run(tree, "looks_scratch", *folder, "defi/gidm=scratch")
    assert len([p for p in (tree / "looks").iterdir() if p.is_dir()]) == 2  # training and validation
    run(tree, "looks_4_fps", *folder, "+policy.gfdm.overrides.fps=4")
    run(tree, "looks_ahead", *folder, "defi=official")
    assert len([p for p in (tree / "looks").iterdir() if p.is_dir()]) == 6


def test_every_trained_parameter_gets_a_gradient(tree: Path) -> None:
    """DDP waits for the gradient of every parameter; tested with the real models, the forward model included."""
    for trainable in ("gidm_adapter", "all"):
        cfg = configure("step3_defi", f"paths.ckpts={tree}/ckpts", f"policy.trainable={trainable}")
        model = instantiate(OmegaConf.to_container(cfg.policy, resolve=True)).train()
        pictures = {view: torch.rand(2, 3, 64, 64) * 2 - 1 for view in model.views}
        futures = {view: torch.rand(2, len(model.pair_frames), 3, 64, 64) * 2 - 1 for view in model.views}
        model.on_train_begin(model.alignment.steps)
        model(
            {
                "id": ["a", "b"],
                "views": pictures,
                "futures": futures,
                "text": ["open the drawer", "go"],
                "actions": torch.rand(2, 10, 7),
            }
        )["loss"].backward()
        assert not [
            name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
        ]


def test_weights_that_do_not_fit_are_refused(tree: Path) -> None:
    folder = run(tree, "misfit")
    with pytest.raises(artifact.ArtifactError, match="does not fit"):
        policy.load(folder, overrides={"pairing.frames": [1]})
