from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
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


def loadable(root: Path) -> DeFIPolicy:
    """A policy of the tree above as `load` would have made it, over a model whose weights can be told apart."""
    robot = ready()
    robot.origin, robot.moved = root / "defi/x", policy.find_parents(root / "defi/x")
    return robot


def test_a_saved_policy_is_whole_and_an_artifact(tmp_path: Path) -> None:
    make_tree(tmp_path / "a")
    (tmp_path / "a/gfdm/p/resume").mkdir()
    (tmp_path / "a/gfdm/p/resume/state.safetensors").write_bytes(b"x")
    robot = loadable(tmp_path / "a")
    nn.init.constant_(robot.model.adapter.out.bias, 0.25)
    saved = robot.save_pretrained(tmp_path / "elsewhere/whole")
    (tmp_path / "a").rename(tmp_path / "gone")
    assert policy.find_parents(saved) == {f"{name}.path": str(saved / "parents" / name) for name in ("gfdm", "gidm")}
    assert load_file(saved / "weights.safetensors")["adapter.out.bias"].eq(0.25).all() and not (saved / "parents/gfdm/resume").exists()
    robot.moved, robot.origin = policy.find_parents(saved), saved
    assert artifact.sha256(robot.save_pretrained(tmp_path / "alone", with_parents=False)) == artifact.sha256(saved), "parents are no part of its identity"
    assert not (tmp_path / "alone/parents").exists() and artifact.sha256(robot.save_pretrained(saved)) == artifact.sha256(saved)


def test_a_policy_that_came_from_nowhere_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not loaded from an artifact"):
        ready().save_pretrained(tmp_path)


def test_hub_ids_are_fetched_for_policy_and_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tree(tmp_path)
    (tmp_path / "gfdm").rename(tmp_path / "away")
    hub = {"lab/policy": folder, "lab/gfdm": tmp_path / "away/p"}
    monkeypatch.setattr(policy, "snapshot_download", lambda name: str(hub[name]))
    model, asked = build(), []
    monkeypatch.setattr(artifact, "load", lambda folder, kind, overrides: asked.append((Path(folder), overrides)) or model)
    robot = DeFIPolicy.from_pretrained("lab/policy", gfdm="lab/gfdm", overrides={"goal.path": "lab/clip"}, execute=4)
    assert asked == [(folder, {"gfdm.path": str(tmp_path / "away/p"), "gidm.path": str(tmp_path / "gidm/p"), "goal.path": "lab/clip"})]
    assert robot.execute == 4 and robot.origin == folder
    with pytest.raises(artifact.ArtifactError, match="its gfdm is neither"):
        DeFIPolicy.from_pretrained("lab/policy")


def test_what_is_neither_folder_nor_id_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(name: str) -> str:
        raise LocalEntryNotFoundError("the hub is away\nand more")

    with pytest.raises(artifact.ArtifactError, match="a/b/c: neither a folder nor a hub id") as caught:
        DeFIPolicy.from_pretrained("a/b/c")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(policy, "snapshot_download", away)
    with pytest.raises(artifact.ArtifactError, match=r"lab/policy: .*\(the hub is away\)$"):
        policy.load("lab/policy")
    with pytest.raises(artifact.ArtifactError, match="its gfdm is no artifact"):
        artifact.save(Half(), tmp_path / "x", kind="defi", config={"gfdm": {"svd": "y"}})
        policy.load(tmp_path / "x", gfdm=tmp_path)
