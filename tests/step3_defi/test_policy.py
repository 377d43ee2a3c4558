from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from common import artifact
from common.frozen import TextEncoder
from step3_defi import policy
from step3_defi.policy import DeFIPolicy
from tests.step3_defi.parts import SENTENCES, build, wake


def get_obs(seed: int, **shapes) -> dict:
    rng = np.random.default_rng(seed)
    pictures = {
        "rgb_static": rng.integers(0, 255, (200, 200, 3), np.uint8),
        "rgb_gripper": rng.integers(0, 255, (84, 84, 3), np.uint8),
    }
    return {"rgb_obs": pictures, "robot_obs": rng.normal(size=15), "scene_obs": rng.normal(size=24)}


def ready(**changes) -> DeFIPolicy:
    model = build()
    wake(model)
    return DeFIPolicy(model, **changes)


def test_actions_obey_the_action_space_and_a_plan_tells_what_was_clipped() -> None:
    robot = ready()
    plan = robot.predict_action_chunk([get_obs(0), get_obs(1)], SENTENCES)
    assert plan.shape == (2, 10, 7) and np.abs(plan[..., :6]).max() > 1 and set(np.unique(plan[..., 6])) <= {-1.0, 1.0}
    acted = np.stack([robot.act(get_obs(0), SENTENCES[0]) for _ in range(10)])
    assert np.array_equal(acted, robot.predict_action_chunk([get_obs(0)], SENTENCES[:1])[0].clip(-1, 1))


def test_plan_depends_on_neither_batch_nor_past() -> None:
    robot = ready()
    together = robot.predict_action_chunk([get_obs(0), get_obs(1), get_obs(2)], [*SENTENCES, SENTENCES[0]])
    alone = robot.predict_action_chunk([get_obs(1)], [SENTENCES[1]])
    assert np.allclose(together[1:2], alone, atol=1e-4)
    assert not np.allclose(
        ready(seed=1).predict_action_chunk([get_obs(1)], [SENTENCES[1]])[..., :6], alone[..., :6], atol=1e-3
    )


def test_chunk_is_carried_out_then_planned_anew() -> None:
    robot, calls = ready(execute=4), []
    predict = robot.predict_action_chunk
    robot.predict_action_chunk = lambda observations, texts: calls.append(texts[0]) or predict(observations, texts)
    acted = [robot.act(get_obs(0), SENTENCES[0]) for _ in range(9)]
    assert len(calls) == 3 and acted[0].shape == (7,)
    assert np.array_equal(np.stack(acted[:4]), predict([get_obs(0)], SENTENCES[:1])[0, :4].clip(-1, 1))


def test_new_instruction_and_reset_drop_the_chunk() -> None:
    robot, calls = ready(), []
    robot.predict_action_chunk = lambda observations, texts: calls.append(texts[0]) or np.zeros((1, 10, 7), np.float32)
    for sentence in (SENTENCES[0], SENTENCES[0], SENTENCES[1], SENTENCES[1]):
        robot.act(get_obs(0), sentence)
    assert calls == SENTENCES
    robot.reset()
    robot.act(get_obs(0), SENTENCES[1])
    assert len(calls) == 3


def test_bad_requests_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="plans 10"):
        ready(execute=11)
    blind = get_obs(0)
    del blind["rgb_obs"]["rgb_gripper"]
    with pytest.raises(ValueError, match="the observation has no rgb_obs/rgb_gripper; the policy reads the views"):
        ready().predict_action_chunk([blind], ["go"])
    with pytest.raises(ValueError, match="1 observations and 2 instructions"):
        ready().predict_action_chunk([get_obs(0)], ["go", "go"])


@pytest.mark.parametrize(
    "spoil, said",
    [
        (
            lambda o: o["rgb_obs"].update(rgb_static=o["rgb_obs"]["rgb_static"] / 255),
            r"rgb_obs/rgb_static is float64 of shape \(200, 200, 3\); give .* uint8",
        ),
        (
            lambda o: o["rgb_obs"].update(rgb_static=np.full((200, 200, 3), np.nan, np.float32)),
            "rgb_obs/rgb_static is float32",
        ),
        (
            lambda o: o["rgb_obs"].update(rgb_gripper=o["rgb_obs"]["rgb_gripper"].transpose(2, 0, 1)),
            r"rgb_obs/rgb_gripper is uint8 of shape \(3, 84, 84\)",
        ),
        (lambda o: o["rgb_obs"].update(rgb_gripper=[[0]]), "rgb_obs/rgb_gripper is a list"),
        (lambda o: o["robot_obs"].__setitem__(3, np.nan), "robot_obs is missing or not finite"),
        (lambda o: o.pop("robot_obs"), "robot_obs is missing or not finite"),
    ],
)
def test_observations_of_another_kind_are_one_line(spoil: Callable[[dict], object], said: str) -> None:
    seen = get_obs(1)
    spoil(seen)
    with pytest.raises(ValueError, match=f"^the observation: {said}") as caught:
        ready().predict_action_chunk([get_obs(0), seen], ["go", "go"])
    assert "\n" not in str(caught.value)
    if "rgb" in said:
        with pytest.raises(ValueError, match="^the observation of sequence 7, sub-task 2, plan 3: rgb_obs"):
            ready().predict_action_chunk([seen], ["go"], rollout_keys=[(0, 7, 2, 3)])


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_sentence_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is empty; say what to do"):
        ready().predict_action_chunk([get_obs(0)], [text])


def test_characters_that_no_piece_stands_for_are_named(shared_data: Path) -> None:
    """The vocabulary is that of T5; CLIP's covers all bytes."""
    robot = ready()
    robot.model.gidm.text = TextEncoder(nn.Linear(1, 1), AutoTokenizer.from_pretrained(shared_data / "tokenizers/t5"))
    assert len(robot.predict_action_chunk([get_obs(0)], ["put the café cup in the drawer, please!"])) == 1
    with pytest.raises(
        ValueError,
        match="'open 引き出し': .* do not know 'き', 'し', '出', '引'; write it in plain English",
    ):
        robot.predict_action_chunk([get_obs(0)], ["open 引き出し"])


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))


def make_tree(root: Path) -> Path:
    """The folder of a DeFI artifact with its two models; its own weights are not read in these tests."""
    paths = {name: root / name / "p" for name in ("gfdm", "gidm")}
    for name, path in paths.items():
        artifact.save(Half(), path, kind=name, config={"_target_": "step1_gfdm.None"})
    config = {
        name: {"_target_": "common.artifact.load", "path": str(path), "kind": name} for name, path in paths.items()
    }
    artifact.save(
        Half(),
        root / "defi" / "x",
        kind="defi",
        config=config,
        parents={n: artifact.sha256(p) for n, p in paths.items()},
    )
    return root / "defi" / "x"


def test_parents_are_found_where_they_were_and_after_a_move(tmp_path: Path) -> None:
    folder = make_tree(tmp_path / "a")
    assert policy.find_parents(folder) == {
        "gfdm.path": str(tmp_path / "a/gfdm/p"),
        "gidm.path": str(tmp_path / "a/gidm/p"),
    }
    (tmp_path / "a").rename(tmp_path / "b")
    assert policy.find_parents(tmp_path / "b/defi/x")["gfdm.path"] == str(tmp_path / "b/gfdm/p")
    best = artifact.copy(tmp_path / "b/defi/x", tmp_path / "b/defi/x/best")
    assert policy.find_parents(best)["gfdm.path"] == str(tmp_path / "b/gfdm/p")


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
    """A policy of that tree, as `load` makes it, over a model with random weights."""
    robot = ready()
    robot.origin, robot.parent_overrides = root / "defi/x", policy.find_parents(root / "defi/x")
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
    assert (
        load_file(saved / "weights.safetensors")["adapter.out.bias"].eq(0.25).all()
        and not (saved / "parents/gfdm/resume").exists()
    )
    robot.parent_overrides, robot.origin = policy.find_parents(saved), saved
    assert artifact.sha256(robot.save_pretrained(tmp_path / "alone", with_parents=False)) == artifact.sha256(saved), (
        "parents are no part of its identity"
    )
    assert not (tmp_path / "alone/parents").exists() and artifact.sha256(
        robot.save_pretrained(saved)
    ) == artifact.sha256(saved)


def test_a_policy_that_came_from_nowhere_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not loaded from an artifact"):
        ready().save_pretrained(tmp_path)


def test_hub_ids_are_fetched_for_policy_and_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tree(tmp_path)
    (tmp_path / "gfdm").rename(tmp_path / "away")
    hub = {"lab/policy": folder, "lab/gfdm": tmp_path / "away/p"}
    monkeypatch.setattr(policy, "snapshot_download", lambda name: str(hub[name]))
    model, asked = build(), []
    monkeypatch.setattr(
        artifact, "load", lambda folder, kind, overrides: asked.append((Path(folder), overrides)) or model
    )
    robot = DeFIPolicy.from_pretrained("lab/policy", gfdm="lab/gfdm", overrides={"goal.path": "lab/clip"}, execute=4)
    assert asked == [
        (
            folder,
            {"gfdm.path": str(tmp_path / "away/p"), "gidm.path": str(tmp_path / "gidm/p"), "goal.path": "lab/clip"},
        )
    ]
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
    with pytest.raises(artifact.ArtifactError, match="its gfdm is not loaded from an artifact"):
        artifact.save(Half(), tmp_path / "x", kind="defi", config={"gfdm": {"svd": "y"}})
        policy.load(tmp_path / "x", gfdm=tmp_path)
