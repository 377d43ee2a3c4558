"""The programs of step 1 as a user runs them, and their configuration."""

import contextlib
import io
import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from safetensors.torch import load_file
from video_sets import write_video_set

from common import artifact
from common.errors import MissingFileError
from common.loop import Loop
from common.program import CONFIGS

# programs are run again in this process
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run():
    """Run a program in this process, as its command line would; returns what it printed."""

    def in_process(module, *arguments, cwd):
        # programs print through logging, which Hydra configures anew for each of them
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [module, *arguments])
            patch.setenv("WANDB_MODE", "disabled")
            patch.setenv("HYDRA_FULL_ERROR", "1")
            runpy.run_module(module, run_name="__main__")
        return said.getvalue()

    handlers, level = logging.root.handlers[:], logging.root.level
    yield in_process
    logging.root.handlers[:], logging.root.level = handlers, level


def composed(*overrides, name="step1_gfdm"):
    with initialize_config_dir(CONFIGS, version_base=None):
        return compose(name, list(overrides))


@pytest.mark.parametrize("scale", ["tiny", "small", "full"])
def test_scales_compose(scale):
    cfg = composed(f"scale={scale}")
    OmegaConf.to_container(cfg, resolve=True)
    assert cfg.name == scale and cfg.data.num_frames == cfg.gfdm.num_frames


def test_the_papers_numbers():
    cfg = composed()
    assert (cfg.gfdm.image_size, cfg.gfdm.num_frames) == (256, 16)
    assert (cfg.loop.optimizer.lr, cfg.loop.optimizer.weight_decay, cfg.loop.epochs, cfg.loop.batch_size * 8) == (
        1e-4,
        1e-2,
        20,
        32,
    )
    assert {k: v.weight for k, v in cfg.data.sets.items()} == {
        "fractal": 30,
        "bridge": 10,
        "calvin_abc": 30,
        "something_something_v2": 15,
        "ego4d": 15,
    }
    robots = composed("experiment=gfdm/t5_no_human").data
    assert robots.human_fraction == 0 and sorted(k for k, v in robots.sets.items() if v.get("human")) == [
        "ego4d",
        "something_something_v2",
    ]


def test_vpps_numbers():
    cfg = composed("experiment=gfdm/vpp")
    assert (cfg.loop.optimizer.lr, cfg.loop.optimizer.weight_decay, cfg.loop.batch_size) == (5e-6, 0.0, 6)
    assert {k: v.weight for k, v in cfg.data.sets.items() if v.weight} == {
        "fractal": 20,
        "bridge": 20,
        "calvin_abc": 20,
        "something_something_v2": 40,
    }
    assert (cfg.gfdm.objective.p_mean, cfg.gfdm.objective.p_std) == (0.7, 1.6)


def test_unknown_keys_are_refused():
    with pytest.raises(HydraException, match="fps_id"):
        composed("gfdm.fps_id=4")


@pytest.fixture(scope="module")
def trained(hub, run, tmp_path_factory):
    """encode, train and eval on a set of moving squares, once."""
    work = tmp_path_factory.mktemp("work")
    (work / "ckpts/hub").mkdir(parents=True)
    (work / "ckpts/hub/tiny").symlink_to(hub)
    write_video_set(work / "data/playtable/A/videos_set", 4, length=40, cameras=2, val_folder=False)
    said = {
        "encode": run(
            "step1_gfdm.encode",
            "scale=tiny",
            "videos=data/playtable/A/videos_set",
            "out=data/playtable/A/latents_set",
            cwd=work,
        )
    }
    (work / "data/playtable/ABC").symlink_to("A")
    write_video_set(work / "data/playtable/hand/videos_set", 4, length=40, val_folder=False)
    run(
        "step1_gfdm.encode",
        "scale=tiny",
        "videos=data/playtable/hand/videos_set",
        "out=data/playtable/hand/latents_set",
        cwd=work,
    )
    steps = (
        "loop.max_steps=6",
        "loop.batch_size=4",
        "loop.warmup_steps=2",
        "loop.save_every=3",
        "loop.log_every=1",
        "loop.eval_every=3",
    )
    said["train"] = run("step1_gfdm.train", "scale=tiny", "name=squares", *steps, cwd=work)
    said["eval"] = run(
        "step1_gfdm.eval",
        "path=ckpts/gfdm/squares",
        "videos=data/playtable/A/videos_set",
        "count=3",
        "strips=2",
        "steps=[1,2]",
        "guidance_scale=[1,2]",
        "lpips=null",
        "feature_extractor=ckpts/hub/tiny/dinov2",
        "feature_extractor_size=64",
        "probe=8",
        cwd=work,
    )
    return work, said


def test_a_model_comes_out_of_three_commands(trained):
    work, said = trained
    assert "8 encoded" in said["encode"] and "latents in data/playtable/A/latents_set" in said["encode"]
    rows = [json.loads(line) for line in (work / "ckpts/gfdm/squares/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6] and any(
        "val/loss" in row for row in rows
    )
    read_meta = artifact.read_meta(work / "ckpts/gfdm/squares", "gfdm")
    assert (
        read_meta["stats"]["clips"] == dict.fromkeys(("robot", "hand"), {"stride": 10, "step_between_clips": 2})
        and read_meta["scale"] == "tiny"
    )


def test_eval_writes_table_results_and_strips(trained):
    work, said = trained
    out = work / "ckpts/gfdm/squares/eval"
    results = json.loads((out / "results.json").read_text())
    assert results["clips"] == 3 and set(results["summary"]) == {
        "copy the first frame",
        "copy its VAE reconstruction",
        "VAE reconstruction",
        "1 step",
        "2 steps",
        "1 step, guidance 2",
        "2 steps, guidance 2",
    }
    limit, coded = (results["by_frame"][name]["psnr"] for name in ("VAE reconstruction", "copy its VAE reconstruction"))
    assert all(a > b for a, b in zip(limit, coded)), "what moved is missing from a copy"
    assert len(results["by_frame"]["1 step"]["psnr"]) == 3 and results["summary"]["1 step"]["frechet"]["mean"] > 0
    assert "hold no readings of the robot" in said["eval"] and "DINOv2 from ckpts/hub/tiny/dinov2" in said["eval"]
    assert all((out / name).is_file() for name in ("horizon.png", "films.mp4", "curves.png"))
    for row in results["summary"].values():
        assert row["psnr"]["low"] <= row["psnr"]["mean"] <= row["psnr"]["high"]
    assert results["summary"]["copy the first frame"]["psnr_gain"]["mean"] == 0
    assert len(list((out / "strips").glob("*.png"))) == 2 and not list(out.rglob("*part*"))
    assert (
        "| copy the first frame |" in (out / "table.md").read_text()
        and f"results in {Path('ckpts/gfdm/squares/eval')}" in said["eval"]
    )


def test_the_dino_row_is_trained_by_the_same_program(trained, run):
    work, _ = trained
    steps = (
        "loop.max_steps=4",
        "loop.batch_size=4",
        "loop.warmup_steps=1",
        "loop.save_every=2",
        "loop.log_every=1",
        "loop.eval_every=2",
    )
    run("step1_gfdm.train", "scale=tiny", "experiment=gfdm/t6_dino", *steps, cwd=work)
    rows = [json.loads(line) for line in (work / "ckpts/gfdm/t6_dino/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/copy_mse" in row] == [1, 2, 3, 4] and any(
        "val/mse" in row for row in rows
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        model = artifact.load(work / "ckpts/gfdm/t6_dino", "gfdm")
    assert model.imagine(torch.zeros(1, 3, 64, 64), ["go"]).shape == (1, 4, model.num_tokens, model.feature_dim)
    with pytest.raises(ValueError, match="holds a DinoFuture, which makes no images"):
        run(
            "step1_gfdm.eval",
            "path=ckpts/gfdm/t6_dino",
            "videos=data/playtable/A/videos_set",
            "clip={stride: 10}",
            cwd=work,
        )


def test_one_line_for_what_is_missing(trained, run):
    work, _ = trained
    with pytest.raises(artifact.ArtifactError, match="meta.json is missing.*step1_train_svd.sh name=none"):
        run("step1_gfdm.eval", "path=ckpts/gfdm/none", "videos=data/playtable/A/videos_set", cwd=work)
    with pytest.raises(MissingFileError, match="no annotations here"):
        run("step1_gfdm.train", "scale=tiny", "paths.data=nowhere", cwd=work)
    with pytest.raises(ValueError, match="precision=fp8; use one of"):
        run("step1_gfdm.encode", "scale=tiny", "videos=data/playtable/A/videos_set", "precision=fp8", cwd=work)


@pytest.mark.parametrize(("pays", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_encodes_in_bf16_where_that_pays(trained, run, monkeypatch, pays, precision):
    work, _ = trained
    monkeypatch.setattr("common.precision.bf16_pays", lambda device: pays)
    found = []
    for wish in ("auto", precision):
        out = f"data/{wish}_{precision}"
        run(
            "step1_gfdm.encode",
            "scale=tiny",
            "videos=data/playtable/A/videos_set",
            f"out={out}",
            f"precision={wish}",
            "limit=1",
            cwd=work,
        )
        found.append(torch.load(next((work / out).rglob("*.pt")), weights_only=True))
    assert torch.equal(*found)


def test_a_broken_run_goes_on_to_the_weights_of_an_unbroken_one(trained, run, monkeypatch):
    work, _ = trained
    arguments = ("scale=tiny", "loop.max_steps=4", "loop.batch_size=2", "loop.save_every=1", "validate=false")
    run("step1_gfdm.train", *arguments, "name=whole", cwd=work)
    save = Loop._save

    def save_and_die(self):
        save(self)
        if self.progress.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run("step1_gfdm.train", *arguments, "name=broken", cwd=work)
    run("step1_gfdm.train", *arguments, "name=broken", cwd=work)
    clip = {"clip": str(work / "ckpts/hub/tiny/clip")}
    whole, broken = (
        artifact.load(work / "ckpts/gfdm" / name, "gfdm", clip).state_dict() for name in ("whole", "broken")
    )
    assert all(torch.equal(value, broken[key]) for key, value in whole.items())


def launched(folder, hub, processes, *config):
    """(weights of the UNet, rows of metrics.jsonl) of train_distributed.py."""
    folder.mkdir(exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=29873"]
    script = [
        str(Path(__file__).with_name("train_distributed.py")),
        str(folder.parent / "set"),
        str(hub),
        str(folder),
        "4",
        *config,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "disabled",
    }
    subprocess.run([*launcher, *script], cwd=ROOT, env=environment, check=True, timeout=300)
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return torch.load(folder / "unet.pt", weights_only=True), rows


def distance(one, two):
    """The Euclidean distance of the weights of two UNets."""
    assert one.keys() == two.keys()
    return torch.stack([(one[name] - two[name]).square().sum() for name in one]).sum().sqrt().item()


def test_two_processes_whole_or_sharded_train_as_one_with_the_same_global_batch(tmp_path, hub):
    write_video_set(tmp_path / "set", 6, latent_shape=(12, 8, 8))
    for file in (tmp_path / "set/latent_videos").rglob(
        "*.pt"
    ):  # the latents of write_video_set are too uniform to learn from
        torch.save(torch.randn(20, 12, 8, 8, generator=torch.Generator().manual_seed(int(file.parent.name))), file)
    alone, rows = launched(tmp_path / "one", hub, 1)
    start = load_file(hub / "svd/unet/diffusion_pytorch_model.safetensors")
    assert len(rows) == 5 and rows[0]["train/loss"] != rows[-1]["train/loss"]
    sharding = str(ROOT / "configs/accelerate/8gpu_fsdp.yaml")
    for other, found in (launched(tmp_path / "two", hub, 2), launched(tmp_path / "sharded", hub, 2, sharding)):
        for one, two in zip(rows, found, strict=True):
            assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4) and two[
                "grad_norm"
            ] == pytest.approx(one["grad_norm"], rel=1e-3)
        # Adam amplifies rounding errors, but the difference is small compared with the training itself
        assert distance(alone, other) < 0.01 * distance(alone, start)
    again, _ = launched(tmp_path / "sharded", hub, 2, sharding)  # resumes from the saved shards
    assert distance(again, other) == 0
