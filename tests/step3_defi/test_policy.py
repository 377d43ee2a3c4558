from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common import artifact
from step3_defi import policy
from step3_defi.policy import DeFIPolicy
from tests.step3_defi.parts import SENTENCES, build, wake


def observe(seed: int, **shapes) -> dict:
    rng = np.random.default_rng(seed)
    pictures = {"rgb_static": rng.integers(0, 255, (200, 200, 3), np.uint8), "rgb_gripper": rng.integers(0, 255, (84, 84, 3), np.uint8)}
    return {"rgb_obs": pictures, "robot_obs": rng.normal(size=15), "scene_obs": rng.normal(size=24)}


def ready(**changes) -> DeFIPolicy:
    model = build()
    wake(model)
    return DeFIPolicy(model, **changes)


def test_plan_obeys_the_action_space() -> None:
    actions = ready().plan([observe(0), observe(1)], SENTENCES)
    assert actions.shape == (2, 10, 7) and np.abs(actions).max() <= 1 and set(np.unique(actions[..., 6])) <= {-1.0, 1.0}


def test_plan_depends_on_neither_batch_nor_past() -> None:
    robot = ready()
    together = robot.plan([observe(0), observe(1), observe(2)], [*SENTENCES, SENTENCES[0]])
    alone = robot.plan([observe(1)], [SENTENCES[1]])
    assert np.allclose(together[1:2], alone, atol=1e-4)
    assert not np.allclose(ready(seed=1).plan([observe(1)], [SENTENCES[1]])[..., :6], alone[..., :6], atol=1e-3)


def test_chunk_is_carried_out_then_planned_anew() -> None:
    robot, calls = ready(execute=4), []
    plan = robot.plan
    robot.plan = lambda observations, texts: calls.append(texts[0]) or plan(observations, texts)
    acted = [robot.act(observe(0), SENTENCES[0]) for _ in range(9)]
    assert len(calls) == 3 and acted[0].shape == (7,)
    assert np.array_equal(np.stack(acted[:4]), plan([observe(0)], SENTENCES[:1])[0, :4])


def test_new_instruction_and_reset_drop_the_chunk() -> None:
    robot, calls = ready(), []
    robot.plan = lambda observations, texts: calls.append(texts[0]) or np.zeros((1, 10, 7), np.float32)
    for sentence in (SENTENCES[0], SENTENCES[0], SENTENCES[1], SENTENCES[1]):
        robot.act(observe(0), sentence)
    assert calls == SENTENCES
    robot.reset()
    robot.act(observe(0), SENTENCES[1])
    assert len(calls) == 3


def test_bad_requests_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="plans 10"):
        ready(execute=11)
    blind = observe(0)
    del blind["rgb_obs"]["rgb_gripper"]
    with pytest.raises(KeyError, match="rgb_gripper"):
        ready().plan([blind], ["go"])


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))


def make_tree(root: Path) -> Path:
    """A DeFI folder over two parents; its own weights are never read here."""
    paths = {name: root / name / "p" for name in ("gfdm", "gidm")}
    for name, path in paths.items():
        artifact.save(Half(), path, kind=name, config={"_target_": "step1_gfdm.None"})
    config = {name: {"_target_": "common.artifact.load", "path": str(path), "kind": name} for name, path in paths.items()}
    artifact.save(Half(), root / "defi" / "x", kind="defi", config=config, parents={n: artifact.sha256(p) for n, p in paths.items()})
    return root / "defi" / "x"


def test_parents_are_found_where_they_were_and_after_a_move(tmp_path: Path) -> None:
    folder = make_tree(tmp_path / "a")
    assert policy.find_parents(folder) == {"gfdm.path": str(tmp_path / "a/gfdm/p"), "gidm.path": str(tmp_path / "a/gidm/p")}
    (tmp_path / "a").rename(tmp_path / "b")
    assert policy.find_parents(tmp_path / "b/defi/x")["gfdm.path"] == str(tmp_path / "b/gfdm/p")


def test_missing_and_foreign_parents_are_named(tmp_path: Path) -> None:
    folder = make_tree(tmp_path)
    artifact.save(Half(), tmp_path / "gidm/p", kind="gidm", config={"_target_": "step1_gfdm.None"})
    with pytest.raises(artifact.ArtifactError, match="is not the gidm"):
        policy.load(folder)
    (tmp_path / "gfdm/p/meta.json").unlink()
    with pytest.raises(artifact.ArtifactError, match="its gfdm is neither"):
        policy.load(folder)
    with pytest.raises(artifact.ArtifactError, match="'gidm' artifact"):
        policy.load(tmp_path / "gidm/p")
