"""Every row of every table, at `tiny` with random stand-ins: it composes, builds, takes two training steps, and a policy two steps of a rollout."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from common import artifact
from common.program import CONFIGS
from step1_gfdm import train as step1
from step2_gidm import train as step2
from step3_defi import policy
from step3_defi import train as step3
from tests.step1_gfdm.videosets import write_set
from tests.step3_defi.parts import SENTENCES, write_calvin
from tests.step3_defi.rollout_fakes import FakeEnv

PROGRAMS = {"gfdm": ("step1_gfdm", step1), "gidm": ("step2_gidm", step2), "defi": ("step3_defi", step3)}
ROWS = sorted(p.relative_to(f"{CONFIGS}/experiment").with_suffix("").as_posix() for p in Path(CONFIGS, "experiment").rglob("*.yaml"))
SHORT = ["loop.max_steps=2", "loop.batch_size=2", "loop.accumulate=1", "loop.num_workers=0", "loop.log_every=1", "loop.eval_every=null", "loop.save_every=null",
         "loop.precision=no", "wandb.mode=disabled"]
SETS = ("fractal", "bridge", "calvin_abc", "something_something_v2", "ego4d")
SMALLER = {  # what no scale reaches: the release's inverse model has one size, and mixtures of full scale hold latents of the true VAE
    "gidm/official": ["gidm.dim=64", "gidm.heads=2", "gidm.encoder_layers=1", "gidm.decoder_layers=1", "gidm.vision.image_size=64",
                      "gidm.vision.path=${paths.hub}/tiny/dinov2", "gidm.text.path=${paths.hub}/tiny/t5"],
    "gfdm/t5_no_human": ["data.latent_shape=[12,8,8]"], "gfdm/vpp": ["data.latent_shape=[12,8,8]"],
}


class Tree:
    """ckpts/ with the stand-ins and, once somebody asks, parents as the rows of steps 1 and 2 build them; data/ with a little of each format."""

    def __init__(self, root: Path, hub: Path) -> None:
        self.root = root
        (root / "ckpts/hub").mkdir(parents=True)
        (root / "ckpts/hub/tiny").symlink_to(hub)
        write_calvin(root / "data/playtable/A", recordings=3)
        videos = write_set(root / "videos", 2, length=40, cameras=2, latent_shape=(12, 8, 8), val_folder=False)
        for place in ("playtable/A/videos_set", "playtable/A/latents_set", *(f"opensource_robotdata/{name}" for name in SETS)):
            (root / "data" / place).parent.mkdir(parents=True, exist_ok=True)
            (root / "data" / place).symlink_to(videos)
        self.made: dict[str, Path] = {}

    def configure(self, kind: str, name: str, *overrides: str) -> DictConfig:
        """A row's config, or that of the scale where `name` is none."""
        row = f"{kind}/{name}"
        where = [f"paths.ckpts={self.root}/ckpts", f"paths.data={self.root}/data", *([f"experiment={row}"] if row in ROWS else []), *SMALLER.get(row, [])]
        with initialize_config_dir(CONFIGS, version_base=None):
            return compose(PROGRAMS[kind][0], ["scale=tiny", *where, *overrides])

    def provide(self, kind: str, path: str) -> None:
        """An untrained artifact at `path`; rows that build the same model share it."""
        if Path(path).exists():
            return
        config = OmegaConf.to_container(self.configure(kind, Path(path).name)[kind], resolve=True)
        key = json.dumps(config, sort_keys=True)
        if key not in self.made:
            own = {"svd": artifact.HERE} if "svd" in config else {}
            self.made[key] = artifact.save(instantiate(config), self.root / f"made/{len(self.made)}", kind=kind, config={**config, **own})
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).symlink_to(self.made[key])


@pytest.fixture(scope="module")
def tree(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    torch.set_num_threads(1)
    return Tree(tmp_path_factory.mktemp("rows"), hub)


def train(tree: Tree, row: str, folder: Path, *overrides: str) -> list[dict]:
    """Two steps through the row's own program; the rows of metrics.jsonl."""
    kind, name = row.split("/")
    PROGRAMS[kind][1].main.__wrapped__(tree.configure(kind, name, f"output_dir={folder}", *SHORT, *overrides))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("row", [row for row in ROWS if not row.startswith("defi/")])
def test_a_row_of_pretraining_trains(row: str, tree: Tree, tmp_path: Path) -> None:
    steps = train(tree, row, tmp_path / "run", "validate=false")
    assert [step["step"] for step in steps] == [1, 2] and all(np.isfinite(step["train/loss"]) and step["grad_norm"] > 0 for step in steps)
    kind, _ = row.split("/")
    model = artifact.load(tmp_path / "run", kind)
    assert artifact.meta(tmp_path / "run", kind)["step"] == 2 and not model.training


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("defi/")])
def test_a_row_of_finetuning_trains_and_rolls_out(row: str, tree: Tree, tmp_path: Path) -> None:
    policy_config = tree.configure(*row.split("/")).policy
    for kind in policy.PARENTS:
        if "path" in policy_config[kind]:
            tree.provide(kind, policy_config[kind].path)
    steps = train(tree, row, tmp_path / "run", "data.holdout=0.3", "cache=false", "policy.alignment_steps=0")
    assert [step["step"] for step in steps] == [1, 2] and all(np.isfinite(step["train/action_loss"]) and step.get("grad_norm", 1) > 0 for step in steps)
    robot = policy.load(tmp_path / "run", execute=1)
    env = FakeEnv([[30]])
    env.reset({"index": 0})
    for _ in range(2):
        action = robot.act(env.observe(), SENTENCES[0])
        assert action.shape == (7,) and np.abs(action).max() <= 1 and abs(action[6]) == 1
        env.step(action, render=False)
    assert env.steps == 2
