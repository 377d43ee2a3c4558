"""Every row of every table, at `tiny` with random stand-ins: it composes, builds, takes two training steps, and a
policy two steps of a rollout."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from common import artifact, rows
from common.program import CONFIGS
from step1_gfdm import train as step1
from step2_gidm import train as step2
from step3_defi import policy
from step3_defi import train as step3
from tests.step1_gfdm.video_sets import write_video_set
from tests.step3_defi.parts import SENTENCES, write_calvin
from tests.step3_defi.rollout.rollout_fakes import FakeEnv

PROGRAMS = {"gfdm": ("step1_gfdm", step1), "gidm": ("step2_gidm", step2), "defi": ("step3_defi", step3)}
ROWS = sorted(rows.load())
SHORT = [
    "loop.max_steps=2",
    "loop.batch_size=2",
    "loop.grad_accum_steps=1",
    "loop.num_workers=0",
    "loop.log_every=1",
    "loop.eval_every=null",
    "loop.save_every=null",
    "loop.precision=no",
    "wandb.mode=disabled",
]
PRETRAINING = [row for row in ROWS if not row.startswith("defi/")]
LATENTS = {"tiny": (12, 8, 8), "small": (12, 16, 16)}  # the stand-in VAE's, of pictures of 64 and of 128 pixels
HANDS = 10  # videos of a hand


def record(root: Path, latent_shape: tuple[int, int, int]) -> None:
    """A little of what envs.record and step1_gfdm.encode write of a robot (two cameras) and of a hand (one)."""
    for name, episodes, cameras in (("ABC", 4, 2), ("hand", HANDS, 1)):
        videos = write_video_set(
            root / name / "videos_set", episodes, length=40, cameras=cameras, latent_shape=latent_shape
        )
        write_video_set(
            root / name / "videos_set", 1, length=40, cameras=cameras, latent_shape=latent_shape, split="val"
        )
        (root / name / "latents_set").symlink_to(videos)


class Tree:
    """ckpts/ with the stand-ins and, once somebody asks, parents as the rows of steps 1 and 2 build them; data/ with a
    little of each format."""

    def __init__(self, root: Path, hub: Path) -> None:
        self.root = root
        (root / "ckpts/hub").mkdir(parents=True)
        (root / "ckpts/hub/tiny").symlink_to(hub)
        write_calvin(root / "data/playtable/A", recordings=3)
        record(root / "data/playtable", LATENTS["tiny"])
        self.made: dict[str, Path] = {}

    def configure(self, kind: str, name: str, *overrides: str) -> DictConfig:
        """A row's config, or that of the scale where `name` is none."""
        row = f"{kind}/{name}"
        where = [
            f"paths.ckpts={self.root}/ckpts",
            f"paths.data={self.root}/data",
            *([f"experiment={row}"] if row in ROWS else []),
        ]
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
            self.made[key] = artifact.save(
                instantiate(config), self.root / f"made/{len(self.made)}", kind=kind, config={**config, **own}
            )
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


@pytest.fixture(scope="module", params=sorted(LATENTS))
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The scale, and where its recordings are."""
    root = tmp_path_factory.mktemp(request.param)
    record(root / "playtable", LATENTS[request.param])
    return [f"scale={request.param}", f"paths.data={root}"]


@pytest.mark.parametrize("row", PRETRAINING)
def test_a_row_draws_the_human_video_that_it_says(row: str, recorded: list[str]) -> None:
    """From the row's own data: videos kept and their share of the draws, over an epoch of one length."""
    kind, name = row.split("/")
    with initialize_config_dir(CONFIGS, version_base=None):
        cfg, base = (compose(PROGRAMS[kind][0], [*recorded, *words]) for words in ([f"experiment={row}"], []))
    mix, whole = (instantiate(each.data, split="train") for each in (cfg, base))
    fraction = 0.0 if name == "t5_no_human" else int(name.split("_")[-1]) / 100 if name.startswith("f8") else 1.0
    robot, hand = (60, 40) if row == "gfdm/vpp" else (70, 30)
    assert len(mix) == len(whole) and set(whole.names) == {"robot", "hand"}
    assert dict(zip(mix.names, mix.shares)) == pytest.approx(
        {
            "robot": robot / (robot + fraction * hand),
            **({"hand": fraction * hand / (robot + fraction * hand)} if fraction else {}),
        }
    )
    assert fraction == 0 or len(mix.sets[mix.names.index("hand")].files) == round(fraction * HANDS)
    assert len(mix.sets[0].files) == 4
    sample = mix.sample(0, np.random.default_rng(0))
    assert sample["latents" if "latents" in sample else "frames"].shape[0] == (
        2 if kind == "gidm" else cfg.gfdm.num_frames
    )


@pytest.mark.parametrize("kind", ["gfdm", "gidm"])
def test_less_human_video_lies_inside_more(kind: str, recorded: list[str]) -> None:
    kept = []
    for percent in (20, 40, 60, 80):
        with initialize_config_dir(CONFIGS, version_base=None):
            cfg = compose(PROGRAMS[kind][0], [*recorded, f"experiment={kind}/f8_human_{percent}"])
        mix = instantiate(cfg.data, split="train")
        kept.append({file.stem for file in mix.sets[mix.names.index("hand")].files})
    assert kept[0] < kept[1] < kept[2] < kept[3]


@pytest.mark.parametrize("row", ["gfdm/t5_no_human", "gidm/f8_human_20"])
def test_a_row_about_human_video_is_refused_where_none_is_marked(row: str, tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit,
        match=r"^error: human_fraction=0[.0-9]*, but no set of this mixture is marked human \(robot\): [^\n]*$",
    ):
        train(tree, row, tmp_path / "run", "~data.sets.hand")


def test_the_releases_inverse_model_has_the_sizes_of_the_scale() -> None:
    """Parameters that learn, beside the paper's at the same scale; what the release does otherwise is there at every
    one."""
    for scale, most in (("tiny", 1.1), ("small", 1.1), ("full", 1.0)):
        with initialize_config_dir(CONFIGS, version_base=None):
            paper, release = (
                compose("step2_gidm", [f"scale={scale}", *words]) for words in ([], ["experiment=gidm/official"])
            )
        sizes, eyes = [], SimpleNamespace(dim=64, num_tokens=16)
        for cfg in (paper, release):
            with torch.device("meta"):
                model = instantiate(
                    {**OmegaConf.to_container(cfg.gidm, resolve=True), "vision": None, "text": None, "_partial_": True}
                )(vision=eyes, text=eyes)
            sizes.append(sum(p.numel() for p in model.parameters()))
        assert 0.5 * sizes[0] < sizes[1] <= most * sizes[0], scale
        gidm = release.gidm
        assert (gidm.dim, gidm.vision, gidm.text) == (paper.gidm.dim, paper.gidm.vision, paper.gidm.text)
        assert (
            gidm.quantizer.codes == 16
            and list(gidm.text_in) == ["encoder", "decoder"]
            and not gidm.residual
            and release.data.gap == "official"
        )
        assert release.loop.max_grad_norm == 0.1 and release.loop.warmup_steps == 0 and release.loop.optimizer.decay_all
        assert scale == "full" or release.loop.max_steps == paper.loop.max_steps


@pytest.mark.parametrize("row", PRETRAINING)
def test_a_row_of_pretraining_trains(row: str, tree: Tree, tmp_path: Path) -> None:
    steps = train(tree, row, tmp_path / "run", "validate=false")
    assert [step["step"] for step in steps] == [1, 2] and all(
        np.isfinite(step["train/loss"]) and step["grad_norm"] > 0 for step in steps
    )
    kind, _ = row.split("/")
    model = artifact.load(tmp_path / "run", kind)
    assert artifact.read_meta(tmp_path / "run", kind)["step"] == 2 and not model.training


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("defi/")])
def test_a_row_of_finetuning_trains_and_rolls_out(row: str, tree: Tree, tmp_path: Path) -> None:
    policy_config = tree.configure(*row.split("/")).policy
    for kind in policy.PARENTS:
        if "path" in policy_config[kind]:
            tree.provide(kind, policy_config[kind].path)
    steps = train(tree, row, tmp_path / "run", "data.val_fraction=0.3", "cache=false", "policy.alignment.steps=0")
    assert [step["step"] for step in steps] == [1, 2] and all(
        np.isfinite(step["train/action_loss"]) and step.get("grad_norm", 1) > 0 for step in steps
    )
    robot = policy.load(tmp_path / "run", execute=1)
    env = FakeEnv([[30]])
    env.reset({"index": 0})
    for _ in range(2):
        action = robot.act(env.get_obs(), SENTENCES[0])
        assert action.shape == (7,) and np.abs(action).max() <= 1 and abs(action[6]) == 1
        env.step(action, render=False)
    assert env.steps == 2
