"""The programs as a user runs them, and their configuration."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from videosets import write_set

from common import artifact

ROOT = Path(__file__).resolve().parents[2]


def run(module, *arguments, cwd, fails=False):
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "WANDB_MODE": "disabled"})
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def composed(*overrides, name="step1_gfdm"):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose(name, list(overrides))


@pytest.mark.parametrize("scale", ["tiny", "small", "full"])
def test_scales_compose(scale):
    cfg = composed(f"scale={scale}")
    OmegaConf.to_container(cfg, resolve=True)
    assert cfg.name == scale and cfg.data.num_frames == cfg.gfdm.num_frames


def test_the_papers_numbers():
    cfg = composed()
    assert (cfg.gfdm.image_size, cfg.gfdm.num_frames) == (256, 16)
    assert (cfg.loop.optimizer.lr, cfg.loop.optimizer.weight_decay, cfg.loop.epochs, cfg.loop.batch_size * 8) == (1e-4, 1e-2, 20, 32)
    assert {k: v.weight for k, v in cfg.data.sets.items()} == {"fractal": 30, "bridge": 10, "calvin_abc": 30, "something_something_v2": 15, "ego4d": 15}
    robots = composed("experiment=gfdm/t5_no_human").data
    assert robots.human_fraction == 0 and sorted(k for k, v in robots.sets.items() if v.get("human")) == ["ego4d", "something_something_v2"]


def test_vpps_numbers():
    cfg = composed("experiment=gfdm/vpp")
    assert (cfg.loop.optimizer.lr, cfg.loop.optimizer.weight_decay, cfg.loop.batch_size) == (5e-6, 0.0, 6)
    assert {k: v.weight for k, v in cfg.data.sets.items() if v.weight} == {"fractal": 20, "bridge": 20, "calvin_abc": 20, "something_something_v2": 40}
    assert (cfg.gfdm.objective.p_mean, cfg.gfdm.objective.p_std) == (0.7, 1.6)


@pytest.mark.parametrize("row", sorted(p.stem for p in (ROOT / "configs/experiment/gfdm").glob("*.yaml")))
def test_rows_change_only_what_they_claim(row):
    claims = {"eq3_ddpm": ["gfdm.objective"], "eq3_ddpm_v": ["gfdm.objective"], "t5_no_human": ["data.human_fraction"], "vpp": ["data.sets", "loop"]}
    allowed = ["name", "output_dir"] + claims.get(row, ["data.human_fraction"] if row.startswith("f8") else [])
    base, changed = (OmegaConf.to_container(c, resolve=True) for c in (composed(), composed(f"experiment=gfdm/{row}")))
    different = [path for path in paths(base) ^ paths(changed) if not any(path[0] == a or path[0].startswith(a + ".") for a in allowed)]
    assert different == [] and changed["name"] == row


def paths(node, prefix=""):
    if isinstance(node, dict):
        return set().union(*(paths(v, f"{prefix}.{k}".lstrip(".")) for k, v in node.items()))
    return {(prefix, str(node))}


def test_unknown_keys_are_refused():
    with pytest.raises(HydraException, match="fps_id"):
        composed("gfdm.fps_id=4")


@pytest.fixture(scope="module")
def trained(hub, tmp_path_factory):
    """encode, train and eval on a set of moving squares, once."""
    work = tmp_path_factory.mktemp("work")
    (work / "ckpts/hub").mkdir(parents=True)
    (work / "ckpts/hub/tiny").symlink_to(hub)
    write_set(work / "data/video/playtable", 4, length=40, cameras=2)
    said = {"encode": run("step1_gfdm.encode", "scale=tiny", "data=data/video/playtable", cwd=work)}
    steps = ("loop.max_steps=6", "loop.batch_size=4", "loop.warmup_steps=2", "loop.save_every=3", "loop.log_every=1", "loop.eval_every=3")
    said["train"] = run("step1_gfdm.train", "scale=tiny", "name=squares", *steps, cwd=work)
    said["eval"] = run("step1_gfdm.eval", "path=ckpts/gfdm/squares", "data=data/video/playtable", "count=3", "strips=2", "steps=[1,2]", cwd=work)
    return work, said


def test_a_model_comes_out_of_three_commands(trained):
    work, said = trained
    assert "8 encoded" in said["encode"] and "latents in data/video/playtable" in said["encode"]
    rows = [json.loads(line) for line in (work / "ckpts/gfdm/squares/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6] and any("val/loss" in row for row in rows)
    assert artifact.meta(work / "ckpts/gfdm/squares", "gfdm")["stats"]["clips"] == {"playtable": {"stride": 10, "start_every": 2}}


def test_eval_writes_table_results_and_strips(trained):
    work, said = trained
    out = work / "ckpts/gfdm/squares/eval"
    results = json.loads((out / "results.json").read_text())
    assert results["clips"] == 3 and set(results["summary"]) == {"copy the first frame", "VAE there and back", "1 step", "2 steps"}
    for row in results["summary"].values():
        assert row["psnr"]["low"] <= row["psnr"]["mean"] <= row["psnr"]["high"]
    assert results["summary"]["copy the first frame"]["psnr_gain"]["mean"] == 0
    assert len(list((out / "strips").glob("*.png"))) == 2 and not list(out.rglob("*part*"))
    assert "| copy the first frame |" in (out / "table.md").read_text() and f"results in {Path('ckpts/gfdm/squares/eval')}" in said["eval"]


def test_one_line_for_what_is_missing(trained):
    work, _ = trained
    said = run("step1_gfdm.eval", "path=ckpts/gfdm/none", "data=data/video/playtable", cwd=work, fails=True)
    assert "meta.json is missing" in said and "step1_train_svd.sh name=none" in said
    said = run("step1_gfdm.train", "scale=tiny", "paths.data=nowhere", cwd=work, fails=True)
    assert "no annotations here" in said


def test_kill_and_resume_equals_an_unbroken_run(trained):
    """SIGKILL between two steps; the same command goes on and ends with the same weights."""
    work, _ = trained
    arguments = ["scale=tiny", "loop.max_steps=6", "loop.batch_size=2", "loop.save_every=2", "loop.log_every=1", "validate=false"]
    run("step1_gfdm.train", *arguments, "name=whole", cwd=work)
    kill = ("import os, signal, runpy, sys, common.loop as l; old = l.Loop._save\n"
            "def save(self):\n    old(self)\n    if self.progress.step == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"l.Loop._save = save; sys.argv = ['step1_gfdm.train'] + {[*arguments, 'name=killed']!r}\nrunpy.run_module('step1_gfdm.train', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", kill], cwd=work, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}, capture_output=True)
    assert done.returncode == -9
    run("step1_gfdm.train", *arguments, "name=killed", cwd=work)
    whole, killed = (artifact.load(work / "ckpts/gfdm" / name, "gfdm", {"clip": str(work / "ckpts/hub/tiny/clip")}).state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(value, killed[key]) for key, value in whole.items())
