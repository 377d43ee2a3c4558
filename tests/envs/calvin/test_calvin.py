"""CalvinEnv with a fake calvin_env, which has the interface of the real one and its side effects, but no physics."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from envs import sequences
from envs.calvin import env as calvin
from envs.calvin import simulator as calvin_sim
from envs.calvin.env import CalvinEnv
from envs.calvin.simulator import CalvinError
from envs.playtable.env import NEUTRAL_ROBOT_OBS, PlayTableState
from envs.recording import recorder
from envs.sequences import INITIAL_STATES, get_env_state_for_initial_condition
from envs.tasks import TASKS

ROOT = Path(__file__).resolve().parents[3]
FAKE = Path(__file__).parent / "fake_calvin"
PACKAGES = ("calvin_env", "pybullet", "git", "gym", "gymnasium")
FORWARD = np.array([1.0, 0, 0, 0, 0, 0, 0.3])


def drop_packages() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the fake in the place of calvin_env, also for processes that a test starts."""
    monkeypatch.syspath_prepend(str(FAKE))
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in PACKAGES}
    drop_packages()
    yield
    drop_packages()
    sys.modules.update(before)


@pytest.fixture
def env() -> Iterator[CalvinEnv]:
    env = CalvinEnv("D")
    yield env
    env.close()


def drawn() -> int:
    return sys.modules["calvin_env.envs.play_table_env"].Camera.drawn


def worlds() -> dict:
    return sys.modules["pybullet"].open_worlds


# ---- the environment


def test_images_are_rendered_only_on_request(env: CalvinEnv) -> None:
    before = drawn()
    observation = env.reset(INITIAL_STATES[3])
    assert set(observation) == set(env.step(FORWARD, render=False)[0]) == {"robot_obs", "scene_obs"}
    assert drawn() == before
    pictures = env.get_obs()["rgb_obs"]
    assert drawn() == before + 2
    assert {name: (picture.shape, picture.dtype) for name, picture in pictures.items()} == {
        "rgb_static": ((200, 200, 3), np.uint8),
        "rgb_gripper": ((84, 84, 3), np.uint8),
    }
    assert "rgb_obs" in env.step(FORWARD)[0] and drawn() == before + 4


def test_a_symbolic_state_becomes_calvins_vectors(env: CalvinEnv) -> None:
    robot_obs, scene_obs = get_env_state_for_initial_condition(INITIAL_STATES[7], env.scene)
    observation = env.reset(INITIAL_STATES[7])
    np.testing.assert_array_equal(observation["scene_obs"], scene_obs)
    np.testing.assert_array_equal(observation["robot_obs"][:3], robot_obs[:3])
    with pytest.raises(ValueError, match="not both"):
        env.reset(INITIAL_STATES[7], scene_obs=scene_obs)


def test_an_action_is_copied_and_its_gripper_is_a_sign(env: CalvinEnv) -> None:
    env.reset(INITIAL_STATES[0])
    action = np.array([0.5, 0, 0, 0, 0, 0, -0.2])
    kept, before = action.copy(), env.target_pose()[0]
    env.step(action, render=False)
    np.testing.assert_array_equal(action, kept)
    np.testing.assert_allclose(env.target_pose()[0] - before, [0.01, 0, 0])
    assert env.gripper_action == -1
    for bad in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="action"):
            env.step(bad)


@pytest.mark.parametrize("loads", [2, 50])
def test_what_follows_a_reset_does_not_depend_on_what_was_before(
    env: CalvinEnv, monkeypatch: pytest.MonkeyPatch, loads: int
) -> None:
    monkeypatch.setattr(calvin, "MAX_LOADS_PER_CONNECTION", loads)
    runs = []
    for _ in range(5):
        first = env.reset(INITIAL_STATES[0])
        assert env.gripper_action == 1
        runs.append(
            np.array([first["robot_obs"], *(env.step(-FORWARD, render=False)[0]["robot_obs"] for _ in range(3))])
        )
        assert list(worlds()) == [0], "one connection, and the destructor of an old one left it alone"
    assert all(np.array_equal(run, runs[0]) for run in runs) and np.ptp(runs[0][:, 0]) > 0


def test_the_grippers_last_command_comes_from_the_state(env: CalvinEnv) -> None:
    shut = NEUTRAL_ROBOT_OBS.copy()
    shut[14] = -1
    assert env.reset(robot_obs=shut)["robot_obs"][14] == -1 and env.gripper_action == -1
    assert env.reset()["robot_obs"][14] == 1


def test_random_resets_differ_and_follow_the_seed(env: CalvinEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calvin, "MAX_LOADS_PER_CONNECTION", 2)
    draws = [env.reset()["scene_obs"] for _ in range(4)]
    env.close()
    again = CalvinEnv("D", seed=0)
    assert len({draw.tobytes() for draw in draws}) == 4
    np.testing.assert_array_equal(draws, [again.reset()["scene_obs"] for _ in range(4)])
    again.close()


def test_the_oracle_is_calvins_own(env: CalvinEnv) -> None:
    env.reset(INITIAL_STATES[0])
    start = env.get_info()
    for _ in range(7):
        assert (
            not env.check_success("open_drawer", start, env.step(FORWARD, render=False)[1])
            or env.joint_position("base__drawer") > 0.12
        )
    assert env.check_success("open_drawer", start, env.get_info()) and not env.check_success(
        "close_drawer", start, env.get_info()
    )
    with pytest.raises(ValueError, match="fly"):
        env.check_success("fly", start, start)


def test_the_privileged_state_is_playtables(env: CalvinEnv) -> None:
    _, scene_obs = get_env_state_for_initial_condition(INITIAL_STATES[0], env.scene)
    scene_obs[:6] = [0.28, 0.1, 0.0, 0.05, 1, 0]
    scene_obs[6:12] = [0.1, -0.1, 0.46, 0, 0, np.pi / 2]
    env.reset(scene_obs=scene_obs)
    state = PlayTableState(env)
    assert state.blocks == ("block_red", "block_blue", "block_pink") and state.fixtures.drawer_x == 0.18
    assert [state.joint_position(name) for name in ("base__slide", "base__drawer", "base__switch")] == [0.28, 0.1, 0.05]
    assert (
        state.light_state("lightbulb") == 1 and state.light_state("led") == 0 and state.gripper_opening_width() == 0.08
    )
    position, axes = state.block_pose("block_red")
    np.testing.assert_allclose(position, [0.1, -0.1, 0.46])
    np.testing.assert_allclose(axes, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-12)
    assert state.get_contacts("block_red") == {"robot", "block_blue"}
    assert state.get_contacts("block_blue") == {"plank_link", "block_red"} and state.get_contacts("block_pink") == {
        "floor"
    }
    np.testing.assert_allclose(state.tcp_pose()[0], state.target_pose()[0])
    env.expert(0).reset("open_drawer")


def test_a_scene_that_is_not_the_published_one_is_refused() -> None:
    with pytest.raises(CalvinError, match="lists the blocks block_red, block_blue, block_pink, not block_blue"):
        CalvinEnv("C")
    with pytest.raises(ValueError, match="A, B, C, D"):
        CalvinEnv("E")


def test_one_world_in_a_process(env: CalvinEnv) -> None:
    with pytest.raises(CalvinError, match="one simulator in a process"):
        CalvinEnv("A")
    env.close()
    env.close()
    CalvinEnv("A").close()


def test_it_is_silent(capfd: pytest.CaptureFixture) -> None:
    gc.collect()  # environments that earlier tests did not close write when they are collected
    capfd.readouterr()
    env = CalvinEnv("A")
    env.reset()
    env.close()
    del env
    assert capfd.readouterr() == ("", "")


# ---- sequences, versions, renderer


def test_the_default_sequences_are_checked(env: CalvinEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.get_sequences(12) == sequences.get_sequences(12)
    real = sequences.get_sequences
    monkeypatch.setattr(sequences, "get_sequences", lambda *args, **options: real(*args, **{**options, "seed": 1}))
    env.get_sequences(12, seed=1)
    with pytest.raises(UserError, match="first 10 sequences are not CALVIN's"):
        env.get_sequences(12)


def test_versions_name_what_moves_scores(env: CalvinEnv) -> None:
    versions = env.versions()
    assert versions["simulator"].startswith("calvin_env 0123456789ab, pybullet 9.9.9, numpy ")
    assert versions["renderer"] == "pybullet TinyRenderer (CPU)" and len(versions["reference_frame"]) == 16
    env.close()
    (same := CalvinEnv("D")).close()
    (larger := CalvinEnv("D", gripper_size=96)).close()
    assert same.versions() == versions != larger.versions()


@pytest.mark.parametrize(
    ("wish", "device", "egl"),
    [
        ("auto", "llvmpipe (LLVM 15)", False),
        ("auto", "NVIDIA H100", True),
        ("egl", "llvmpipe (LLVM 15)", True),
        ("cpu", "NVIDIA H100", False),
        ("auto", "crash", False),
        ("auto", "", False),
    ],
)
def test_egl_draws_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, wish: str, device: str, egl: bool) -> None:
    monkeypatch.setenv("FAKE_EGL", device)
    env = CalvinEnv("D", renderer=wish)
    assert env.resolved_options() == {"renderer": "egl" if egl else "cpu"}
    assert worlds()[0].use_egl is egl and (f"pybullet EGL, {device}, 4.5" == env.versions()["renderer"]) is egl
    env.close()


@pytest.mark.parametrize(("device", "words"), [("crash", "exit code -11"), ("", "did not load")])
def test_a_wished_egl_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, device: str, words: str) -> None:
    monkeypatch.setenv("FAKE_EGL", device)
    with pytest.raises(CalvinError, match=words) as error:
        CalvinEnv("D", renderer="egl")
    assert "renderer=cpu" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="renderer=gpu: choose one of auto, egl, cpu"):
        CalvinEnv("D", renderer="gpu")


# ---- what is missing


def test_without_calvin_env_one_line_names_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pybullet", "calvin_env"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(CalvinError, match=f"not installed .*{name}.*docs/calvin.md") as error:
                CalvinEnv("D")
            assert "\n" not in str(error.value)


def test_an_incomplete_calvin_env_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_GIT", "1")
    with pytest.raises(CalvinError, match="no readable git checkout"):
        CalvinEnv("D")
    with monkeypatch.context() as patch:
        calvin_sim.import_calvin_env()
        patch.setattr(sys.modules["calvin_env"], "__file__", None)  # as of a folder without __init__.py
        with pytest.raises(CalvinError, match="fake_calvin/calvin_env hides the installed"):
            CalvinEnv("D")
    monkeypatch.setattr(calvin_sim, "checkout_root", lambda package: tmp_path)
    with pytest.raises(CalvinError, match="without its folders conf/ and data/"):
        CalvinEnv("D")


@pytest.mark.parametrize(
    "arguments", [["step3_defi.eval", "policy=random", "sequences=1"], ["envs.record", "episodes=1"]]
)
def test_programs_end_with_that_line(arguments: list[str], tmp_path: Path) -> None:
    if _installed():
        pytest.skip("calvin_env is installed here")
    command = [sys.executable, "-m", *arguments, "env=calvin", f"out={tmp_path}/out"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 1 and "docs/calvin.md" in ended.stderr.strip().splitlines()[-1]
    assert (
        "Traceback" not in ended.stderr
        and len([line for line in ended.stderr.splitlines() if line.startswith("error: ")]) == 1
    )


def _installed() -> bool:
    return (
        subprocess.run(
            [sys.executable, "-c", "import calvin_env"], capture_output=True, cwd=ROOT, check=False
        ).returncode
        == 0
    )


def test_the_recorder_closes_a_world_before_it_opens_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"_target_": "envs.calvin.env.CalvinEnv", "scene": "D", "renderer": "cpu"}
    monkeypatch.setattr(recorder, "_envs", {})
    first = recorder._get_env("A", settings)
    assert first.name == "calvin-A" and recorder._get_env("A", settings) is first
    second = recorder._get_env("D", settings)
    assert second.name == "calvin-D" and list(worlds()) == [0]
    second.close()


@pytest.mark.parametrize("named", [None, list(TASKS)])
def test_sequences_that_are_not_calvins_are_refused(
    env: CalvinEnv, monkeypatch: pytest.MonkeyPatch, named: list[str] | None
) -> None:
    monkeypatch.setattr(sequences, "OFFICIAL_SHA256", dict.fromkeys(sequences.OFFICIAL_SHA256, "0"))
    with pytest.raises(UserError, match="not CALVIN's"):
        env.get_sequences(max(sequences.OFFICIAL_SHA256), tasks=named)
