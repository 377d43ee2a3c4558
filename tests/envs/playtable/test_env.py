"""The simulated table: CALVIN's vectors, determinism, physics of every fixture, images, bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from envs.playtable import PlayTableEnv
from envs.playtable.env import NEUTRAL_ROBOT_OBS, PlayTableState
from envs.playtable.mjcf import LOOK_AT, LOOK_FROM, LOOK_UP
from envs.playtable.render import RenderError
from tests.envs.pose_controller import OUT_OF_FRONT, UP_FRONT, PoseController, downward_euler

STILL = np.array([0, 0, 0, 0, 0, 0, 1.0])


def scene_vector(places: list[tuple[float, float, float]] | None = None, **fixtures: float) -> np.ndarray:
    """scene_obs with blocks at `places` in the order of the scene, long axis along y, and the named fixtures."""
    names = ("slider", "drawer", "button", "switch", "lightbulb", "led")
    places = places or [(0.05, -0.12, 0.46), (0.3, -0.1, 0.46), (-0.24, 0.0924, 0.461)]
    blocks = [(*place, 0.0, 0.0, np.pi / 2) for place in places]
    return np.concatenate(([fixtures.get(name, 0.0) for name in names], np.ravel(blocks)))


def wandering(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    moves = np.repeat(rng.uniform(-0.7, 0.7, (count // 10 + 1, 6)), 10, axis=0)[:count]
    return np.column_stack((moves, np.where(np.arange(count) // 15 % 2, -1.0, 1.0)))


@pytest.fixture(scope="module")
def env():
    env = PlayTableEnv("D")
    yield env
    env.close()


def start(env: PlayTableEnv, **kwargs) -> PoseController:
    env.reset(robot_obs=NEUTRAL_ROBOT_OBS, scene_obs=scene_vector(**kwargs))
    return PoseController(env)


# ---- vectors and determinism


def test_neutral_observation_is_calvins(env):
    obs = env.reset()
    assert set(obs) == {"robot_obs", "scene_obs"}
    np.testing.assert_allclose(obs["robot_obs"], NEUTRAL_ROBOT_OBS, atol=5e-6)
    assert obs["scene_obs"].shape == (24,)


@pytest.mark.parametrize("scene", "ABCD")
def test_reset_reproduces_stored_vectors(scene):
    env = PlayTableEnv(scene)
    env.reset()
    for action in wandering(60, seed=3):
        obs, _ = env.step(action, render=False)
    env.reset()
    again = env.reset(robot_obs=obs["robot_obs"], scene_obs=obs["scene_obs"])
    np.testing.assert_allclose(again["robot_obs"], obs["robot_obs"], atol=1e-6)
    np.testing.assert_allclose(again["scene_obs"], obs["scene_obs"], atol=1e-6)


def test_same_state_and_actions_give_the_same_bits(env):
    vector = scene_vector()

    def trajectory(world: PlayTableEnv) -> np.ndarray:
        world.reset(robot_obs=NEUTRAL_ROBOT_OBS, scene_obs=vector)
        steps = [world.step(action, render=False)[0] for action in wandering(80)]
        return np.array([np.concatenate((obs["robot_obs"], obs["scene_obs"])) for obs in steps])

    first = trajectory(env)
    assert np.ptp(first[:, :3], axis=0).max() > 0.02
    np.testing.assert_array_equal(first, trajectory(env))
    np.testing.assert_array_equal(first, trajectory(PlayTableEnv("D", seed=5)))


def test_seed_decides_the_random_starts_and_blocks_stay_apart():
    same, other = PlayTableEnv("B", seed=1), PlayTableEnv("B", seed=2)
    again = PlayTableEnv("B", seed=1)
    for _ in range(5):
        vector = same.reset()["scene_obs"]
        np.testing.assert_array_equal(vector, again.reset()["scene_obs"])
        assert np.abs(vector - other.reset()["scene_obs"]).max() > 1e-3
        assert not any("block" in name for block in same.scene.blocks for name in same.get_contacts(block))
        assert same._data.contact.dist.min(initial=0.0) > -1e-4


def test_action_moves_the_commanded_pose_and_stays_untouched(env):
    start(env)
    before, turned = env.target_pose()
    action = np.array([0.5, -1.0, 0.25, 0.2, 0.0, -1.0, -0.3])
    given = action.copy()
    env.step(action, render=False)
    np.testing.assert_array_equal(action, given)
    after, turned_after = env.target_pose()
    np.testing.assert_allclose(after - before, 0.02 * action[:3], atol=1e-12)
    np.testing.assert_allclose(turned_after - turned, 0.05 * action[3:6], atol=1e-12)
    assert env.gripper_action == -1 and env.get_info()["robot_info"]["gripper_action"] == -1


def test_arm_arrives_where_it_is_told(env):
    hand = start(env)
    hand.move_to((0.15, -0.2, 0.55), downward_euler(yaw=0.7))
    hand.wait(10)
    (at, _), (goal, _) = env.tcp_pose(), env.target_pose()
    assert np.abs(at - goal).max() < 1e-3


def test_blocks_rest_on_the_table_and_are_told_so(env):
    hand = start(env)
    before = env.get_info()["scene_info"]["movable_objects"]
    hand.wait(60)
    info = hand.info["scene_info"]["movable_objects"]
    for name, on in (("block_red", "base_link"), ("block_blue", "base_link"), ("block_pink", "plank_link")):
        assert env.get_contacts(name) == {on}
        assert info[name]["current_pos"][2] == pytest.approx(0.46, abs=5e-4)
        moved = np.asarray(info[name]["current_pos"])[:2] - np.asarray(before[name]["current_pos"])[:2]
        assert np.abs(moved).max() < 5e-4
        assert np.abs(info[name]["current_lin_vel"]).max() < 1e-3


# ---- privileged info


def test_info_has_calvins_shape(env):
    hand = start(env, led=1.0)
    hand.wait(2)
    robot, scene = hand.info["robot_info"], hand.info["scene_info"]
    assert set(robot) == {
        "tcp_pos",
        "tcp_orn",
        "gripper_opening_width",
        "arm_joint_states",
        "gripper_action",
        "uid",
        "contacts",
    }
    table = scene["fixed_objects"]["table"]
    assert {"base_link", "plank_link", "drawer_link", "slide_link", "switch_link", "button_link"} <= set(table["links"])
    assert table["links"]["base_link"] == -1 and len(set(table["links"].values())) == len(table["links"])
    block = scene["movable_objects"]["block_red"]
    assert set(block) == {"current_pos", "current_orn", "current_lin_vel", "current_ang_vel", "contacts", "uid"}
    assert {(c[2], c[4]) for c in block["contacts"]} == {(table["uid"], -1)}
    assert block["uid"] in {c[2] for c in table["contacts"]}
    np.testing.assert_allclose(np.abs(block["current_orn"]), [0, 0, 0.5**0.5, 0.5**0.5], atol=1e-3)
    assert scene["lights"] == {"lightbulb": {"logical_state": 0}, "led": {"logical_state": 1}}
    assert scene["doors"]["base__drawer"]["current_state"] == pytest.approx(0, abs=1e-6)
    assert scene["buttons"]["base__button"]["joint_state"] == pytest.approx(0, abs=1e-4)
    uids = [robot["uid"], table["uid"], *(value["uid"] for value in scene["movable_objects"].values())]
    assert len(set(uids)) == len(uids)


def test_info_is_a_snapshot(env):
    hand = start(env)
    before = env.get_info()
    kept = np.array(before["robot_info"]["tcp_pos"])
    hand.move_to((0.1, -0.25, 0.5))
    np.testing.assert_array_equal(before["robot_info"]["tcp_pos"], kept)


def test_angular_velocity_is_in_the_world_frame(env):
    start(env)
    block = env._qvel["block_red"]
    env._data.qvel[block : block + 6] = [0.1, 0, 0, 0, 0.5, 0]  # MuJoCo has angular velocities in the block's own frame
    info = env.get_info()["scene_info"]["movable_objects"]["block_red"]
    np.testing.assert_allclose(info["current_lin_vel"], [0.1, 0, 0], atol=1e-9)
    np.testing.assert_allclose(info["current_ang_vel"], [-0.5, 0, 0], atol=1e-6)  # its y axis is the world's -x


# ---- physics


@pytest.mark.parametrize("block", ["block_red", "block_blue", "block_pink"])
def test_a_grasped_block_stays_in_the_hand(env, block):
    places = [(0.33, -0.05, 0.46), (0.38, -0.12, 0.46), (-0.24, 0.0924, 0.461)]
    places[env.scene.block_names.index(block)] = (0.05, -0.12, 0.46)
    hand = start(env, places=places)
    hand.move_to((0.05, -0.12, 0.56), downward_euler())
    hand.move_to((0.05, -0.12, 0.46), speed=0.5)
    hand.wait(8, gripper_action=-1)
    assert env.gripper_opening_width() == pytest.approx(0.04, abs=2e-3)
    hand.move_to((0.05, -0.12, 0.62))
    assert env.get_contacts(block) == {"robot"}
    grasp = env.block_pose(block)[0] - env.tcp_pose()[0]
    hand.move_to((0.2, -0.25, 0.68), speed=1.0)
    hand.move_to((0.05, -0.12, 0.66), speed=1.0)
    hand.wait(60)
    assert env.get_contacts(block) == {"robot"}
    assert np.abs(env.block_pose(block)[0] - env.tcp_pose()[0] - grasp).max() < 3e-3
    hand.wait(15, gripper_action=1)
    hand.wait(20)
    assert "robot" not in env.get_contacts(block) and env.block_pose(block)[0][2] < 0.5


def test_a_block_goes_from_the_drawer_into_the_cabinet_and_out(env):
    x = env.scene.fixtures.drawer_x
    hand = start(env, places=[(x, -0.28, 0.36), (0.3, -0.05, 0.46), (0.05, -0.05, 0.46)], drawer=0.22)
    hand.wait(5)
    assert env.get_contacts("block_red") == {"drawer_link"}
    hand.move_to((x, -0.28, 0.55), downward_euler())
    hand.move_to((x, -0.28, 0.36), speed=0.5)
    hand.wait(8, gripper_action=-1)
    hand.move_to((x, -0.28, 0.65))
    assert env.get_contacts("block_red") == {"robot"}
    place, lean = np.array([-0.24, 0.085, 0.47]), downward_euler(0.45)
    back = np.array([0.0, -np.sin(0.45), np.cos(0.45)])
    hand.move_to((-0.24, -0.15, 0.65), lean)
    hand.move_to(place + 0.12 * back)
    hand.move_to(place, speed=0.4)
    hand.wait(6, gripper_action=1)
    hand.move_to(place + 0.1 * back)
    hand.wait(5)
    assert env.get_contacts("block_red") == {"plank_link"}
    at = env.block_pose("block_red")[0]
    hand.move_to(at + 0.1 * back)
    hand.move_to(at, speed=0.5)
    hand.wait(8, gripper_action=-1)
    hand.move_to(env.target_pose()[0] + [0, -0.03, 0.06], speed=0.4)
    hand.move_to(env.target_pose()[0] + [0, -0.14, 0.14])
    assert env.get_contacts("block_red") == {"robot"} and env.block_pose("block_red")[0][2] > 0.6


@pytest.mark.parametrize("scene", "ABCD")
def test_drawer_opens_behind_its_bar_and_shuts(scene):
    env = PlayTableEnv(scene)
    hand = start(env)
    hand.wait(1, gripper_action=-1)
    x, lean = env.scene.fixtures.drawer_x, downward_euler(0.25)
    hand.move_to((x, -0.21, 0.55), lean)
    hand.move_to((x, -0.212, 0.375), speed=0.5)
    assert env.joint_position("base__drawer") < 2e-3
    hand.move_to((x, -0.452, 0.375), speed=0.5)
    assert env.joint_position("base__drawer") == pytest.approx(0.22, abs=5e-3)
    hand.move_to((x, -0.42, 0.55))
    hand.move_to((x, -0.55, 0.55), downward_euler())
    hand.move_to((x, -0.55, 0.37))
    hand.move_to((x, -0.25, 0.37), speed=0.5)
    assert env.joint_position("base__drawer") == pytest.approx(0.0, abs=2e-3)


@pytest.mark.parametrize("scene", "ABCD")
@pytest.mark.parametrize("left", [True, False])
def test_the_slider_follows_a_push_on_its_handle(scene, left):
    env = PlayTableEnv(scene)
    limit = env.scene.limits["base__slide"]
    hand = start(env, slider=0.0 if left else limit)
    hand.wait(1, gripper_action=-1)
    x = env.scene.fixtures.slide_x0 + 0.14 - (0.0 if left else limit)
    side = 0.055 if left else -0.055
    hand.move_to((x + side, -0.12, 0.6), downward_euler(0.45))
    hand.move_to((x + side, -0.005, 0.515), speed=0.5)
    before = env.joint_position("base__slide")
    hand.move_to((x + side - np.sign(side) * 0.3, -0.005, 0.515), speed=0.5)
    moved = env.joint_position("base__slide") - before
    assert moved > 0.2 if left else moved < -0.2


@pytest.mark.parametrize("scene", "AB")
def test_the_lever_sets_the_bulb(scene):
    env = PlayTableEnv(scene)
    bar = np.array([env.scene.fixtures.switch_x, 0.023, 0.525])
    hand = start(env)
    hand.wait(1, gripper_action=-1)
    hand.move_to((bar[0], -0.13, 0.6), downward_euler(0.45))
    low = bar - 0.055 * UP_FRONT
    hand.move_to(low + 0.1 * OUT_OF_FRONT, downward_euler(0.9))
    hand.move_to(low, speed=0.5)
    assert env.lights["lightbulb"] == 0
    hand.move_to(low + 0.12 * UP_FRONT, speed=0.5)
    assert env.joint_position("base__switch") > 0.044 and env.lights["lightbulb"] == 1

    hand = start(env, switch=0.088, lightbulb=1.0)
    hand.wait(20, gripper_action=-1)
    assert env.joint_position("base__switch") == pytest.approx(0.088, abs=1e-4) and env.lights["lightbulb"] == 1
    high = bar + (0.088 + 0.055) * UP_FRONT
    hand.move_to((bar[0], -0.08, 0.66), downward_euler(0.5))
    hand.move_to(high + 0.06 * OUT_OF_FRONT)
    hand.move_to(high, speed=0.5)
    hand.move_to(high - 0.13 * UP_FRONT, speed=0.5)
    assert env.joint_position("base__switch") < 0.044 and env.lights["lightbulb"] == 0


@pytest.mark.parametrize("lit", [0, 1])
def test_one_press_of_the_button_toggles_the_led(env, lit):
    x, y, _ = env.scene.fixtures.button
    hand = start(env, led=float(lit))
    hand.wait(30, gripper_action=-1)
    assert env.lights["led"] == lit
    hand.move_to((x, y, 0.56), downward_euler())
    hand.move_to((x, y, 0.46), speed=0.5)
    assert env.joint_position("base__button") > 0.01 and env.lights["led"] == 1 - lit
    hand.wait(20)
    assert env.lights["led"] == 1 - lit
    hand.move_to((x, y, 0.56))
    assert env.joint_position("base__button") < 0.002 and env.lights["led"] == 1 - lit


# ---- images


@pytest.fixture(scope="module")
def seen():
    env = PlayTableEnv("D")
    env.reset(robot_obs=NEUTRAL_ROBOT_OBS, scene_obs=scene_vector())
    try:
        env.get_obs()
    except RenderError as error:
        pytest.skip(str(error))
    yield env
    env.close()


def test_pictures_have_calvins_shapes_and_come_only_when_asked(seen):
    assert "rgb_obs" not in seen.step(STILL, render=False)[0]
    pictures = seen.step(STILL)[0]["rgb_obs"]
    assert {name: (view.shape, view.dtype) for name, view in pictures.items()} == {
        "rgb_static": ((200, 200, 3), np.uint8),
        "rgb_gripper": ((84, 84, 3), np.uint8),
    }
    assert all(view.std() > 20 for view in pictures.values())


def test_picture_sizes_follow_the_arguments(seen):
    env = PlayTableEnv("A", static_size=256, gripper_size=64)
    pictures = env.get_obs()["rgb_obs"]
    assert pictures["rgb_static"].shape == (256, 256, 3) and pictures["rgb_gripper"].shape == (64, 64, 3)
    env.close()


def test_a_block_is_seen_where_the_static_camera_projects_it(seen):
    place = np.array([0.3, -0.1, 0.46])
    seen.reset(robot_obs=NEUTRAL_ROBOT_OBS, scene_obs=scene_vector())
    picture = seen.get_obs()["rgb_obs"]["rgb_static"].astype(int)
    ahead = np.subtract(LOOK_AT, LOOK_FROM) / np.linalg.norm(np.subtract(LOOK_AT, LOOK_FROM))
    right = np.cross(ahead, LOOK_UP)
    right /= np.linalg.norm(right)
    view = place - LOOK_FROM
    focal = 100 / np.tan(np.radians(5))
    column = 100 + focal * (view @ right) / (view @ ahead)
    row = 100 - focal * (view @ np.cross(right, ahead)) / (view @ ahead)
    blue = (picture[..., 2] > 100) & (picture[..., 2] > 2 * picture[..., 0]) & (picture[..., 2] > 2 * picture[..., 1])
    rows, columns = np.nonzero(blue)
    assert len(rows) > 50
    assert abs(rows.mean() - row) < 3 and abs(columns.mean() - column) < 3


def test_lights_are_seen(seen):
    def counts(**lights: float) -> tuple[int, int]:
        seen.reset(robot_obs=NEUTRAL_ROBOT_OBS, scene_obs=scene_vector(**lights))
        red, green, blue = np.moveaxis(seen.get_obs()["rgb_obs"]["rgb_static"].astype(int), -1, 0)
        return int(((green > 180) & (red < 100)).sum()), int(((red > 200) & (green > 180) & (blue < 110)).sum())

    assert counts() == (0, 0)
    assert counts(led=1.0)[0] > 100 and counts(led=1.0)[1] == 0
    assert counts(lightbulb=1.0, switch=0.088)[1] > 50 and counts(lightbulb=1.0, switch=0.088)[0] == 0


def test_close_twice_is_fine_and_versions_name_the_renderer(seen):
    assert seen.versions()["renderer"] in ("egl", "osmesa") and "mujoco" in seen.versions()["simulator"]
    env = PlayTableEnv("D")
    assert env.versions()["renderer"] == "none"
    env.close()
    env.close()


@pytest.mark.parametrize("backend", ["glfw", "nonsense"])
def test_an_unfit_backend_is_named_in_one_line(monkeypatch, backend):
    monkeypatch.setenv("MUJOCO_GL", backend)
    with pytest.raises(RenderError, match=f"MUJOCO_GL={backend}.*egl or osmesa"):
        PlayTableEnv("D").get_obs()


# ---- bad input


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(6), r"action has shape \(6,\): expected \(7,\)"),
        (np.array([0, 0, np.nan, 0, 0, 0, 1]), r"action holds NaN or infinity at \[2\]"),
        (np.zeros((1, 7)), "action has shape"),
    ],
)
def test_bad_actions_are_refused_before_anything_moves(env, action, message):
    start(env)
    before = env.target_pose()[0]
    with pytest.raises(ValueError, match=message):
        env.step(action, render=False)
    np.testing.assert_array_equal(env.target_pose()[0], before)


def test_bad_resets_are_refused(env):
    with pytest.raises(ValueError, match=r"scene_obs has shape \(23,\)"):
        env.reset(scene_obs=np.zeros(23))
    with pytest.raises(ValueError, match="robot_obs holds NaN"):
        env.reset(robot_obs=np.full(15, np.nan))
    with pytest.raises(ValueError, match="not both"):
        env.reset({"led": 0}, scene_obs=np.zeros(24))
    with pytest.raises(ValueError, match="static_size=0"):
        PlayTableEnv("D", static_size=0)


def test_large_actions_leave_finite_values(env):
    start(env)
    for action in 50 * wandering(60, seed=9):
        obs, _ = env.step(action, render=False)
    assert np.isfinite(obs["robot_obs"]).all() and np.isfinite(obs["scene_obs"]).all()


# ---- privileged state


def test_privileged_state_reads_the_present(env):
    hand = start(env, drawer=0.22)
    state = PlayTableState(env)
    assert state.blocks == ("block_red", "block_blue", "block_pink")
    assert state.joint_position("base__drawer") == pytest.approx(0.22) and state.joint_limit("base__drawer") == 0.22
    assert (
        state.light_state("led") == 0
        and state.gripper_action() == 1
        and state.gripper_opening_width() == pytest.approx(0.08, abs=1e-4)
    )
    np.testing.assert_allclose(state.block_pose("block_blue")[0], (0.3, -0.1, 0.46), atol=1e-9)
    np.testing.assert_allclose(state.block_pose("block_blue")[1][:, 0], (0, 1, 0), atol=1e-9)
    hand.move_to((0.1, -0.2, 0.55), downward_euler())
    np.testing.assert_allclose(state.target_pose()[0], (0.1, -0.2, 0.55), atol=1e-9)
    assert np.abs(state.tcp_pose()[0] - state.target_pose()[0]).max() < 5e-3
    target = state.target_pose()[0]
    target[:] = 0
    assert state.target_pose()[0][2] == pytest.approx(0.55)


def test_a_program_that_never_closes_its_environments_ends_without_messages() -> None:
    """The GL contexts are freed in time even if another library made the first finalizer of the program."""
    program = (
        "import weakref\nclass Early: pass\nearly = Early()\nweakref.finalize(early, int)\nfrom envs.playtable import "
        "PlayTableEnv\n"
        "worlds = [PlayTableEnv('A'), PlayTableEnv('D')]\nfor world in worlds: world.reset(); world.get_obs()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0 and "Error" not in ended.stderr, ended.stderr
