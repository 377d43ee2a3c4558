"""Which tasks are possible in a state, judged by measurements, and random initial states in which a task is possible.

CALVIN's symbolic states are not exact enough: a task counts as done at a threshold (0.15 of the slider's 0.28 m), so
what is possible next in a chain depends on the measured positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.expert.expert import DOOR_WIDTH
from envs.expert.motions import EMPTY_GRIPPER_WIDTH, MAX_GRASP_WIDTH
from envs.playtable.scene import ROBOT_BASE, Scene
from envs.protocol import PrivilegedState
from envs.sequences import DRAWER_OPEN, NEUTRAL_ROBOT_OBS, SWITCH_ON
from envs.tasks import HELD_BLOCK_TASKS, check_tasks

CROSSWISE_MAX_Y = -0.085  # m; at larger y the hand has to be parallel to the slanted front
WALL_CLEARANCE = 0.055  # m from the middle of a block to a wall or the door, for a finger to fit in between
REACH = 0.75  # m, largest horizontal distance from the robot's base of a hand above the table
BLOCK_CLEARANCE = 0.115  # m between the centres of two blocks, for the hand to fit in between


def block_location(state: PrivilegedState, block: str) -> str:
    """Where a block is: "hand", "stacked", "drawer", "cabinet", "table" or "lost" (leaning, fallen, on a fixture)."""
    position, axes = state.block_pose(block)
    touched = state.get_contacts(block)
    if "robot" in touched and state.gripper_action() < 0 and state.gripper_opening_width() > EMPTY_GRIPPER_WIDTH:
        return "hand"
    touched -= {"robot"}
    upright = np.abs(axes[2]).max() > 0.97
    if touched & set(state.blocks):
        return "stacked" if position[2] > 0.49 and touched <= set(state.blocks) and upright else "lost"
    if "drawer_link" in touched and position[2] < 0.42:
        return "drawer"
    if not upright or abs(position[2] - 0.46) > 0.015:
        return "lost"
    if "plank_link" in touched and 0.05 < position[1] < 0.13:
        return "cabinet"
    if touched == {"base_link"} and -0.165 < position[1] < -0.01 and within_reach(position):
        return "table"
    return "lost"


def reachable_in_cabinet(x: float, door: float, plank: tuple[float, float]) -> bool:
    """Whether a block at `x` in the cabinet can be grasped while the left edge of the door is at `door`."""
    if not plank[0] + WALL_CLEARANCE < x < plank[1] - WALL_CLEARANCE:
        return False
    return x < door - WALL_CLEARANCE or x > door + DOOR_WIDTH + WALL_CLEARANCE


def within_reach(at: np.ndarray) -> bool:
    """Whether the hand reaches a position of the table; only x and y count."""
    return bool(np.hypot(at[0] - ROBOT_BASE[0], at[1] - ROBOT_BASE[1]) < REACH)


def corridor_free(at: np.ndarray, sign: int, obstacles: list[np.ndarray]) -> bool:
    """Whether a block at (x, y) can be pushed along x: nothing is ahead, and the hand fits behind it.

    sign: 1 pushes to +x, -1 to -x. obstacles: positions of the other blocks and of the button.
    """
    if abs(at[0] + sign * 0.2) > 0.42 or not within_reach(at - [0.08 * sign, 0.0]):
        return False
    ahead = [(sign * (other[0] - at[0]), abs(other[1] - at[1])) for other in obstacles]
    return not any(-0.13 < along < 0.26 and aside < 0.085 for along, aside in ahead)


def graspable(at: np.ndarray, axes: np.ndarray, edges: np.ndarray) -> bool:
    """Whether a block can be grasped: near the slanted front, only by a hand that is parallel to it.

    axes (3, 3): columns are the axes of the block. edges (3,): its edge lengths in metres.
    """
    if at[1] < CROSSWISE_MAX_Y:
        return True
    closing = [axis for axis, edge in zip(axes.T, edges) if abs(axis[2]) < 0.5 and edge < MAX_GRASP_WIDTH]
    return any(abs(axis[0]) > 0.62 for axis in closing)


def _clear(at: np.ndarray, others: list[np.ndarray]) -> bool:
    return all(np.linalg.norm(at[:2] - other[:2]) > BLOCK_CLEARANCE for other in others)


def _block_tasks(state: PrivilegedState, locations: dict[str, str]) -> list[str]:
    limit = state.joint_limit("base__slide")
    # The expert first moves a half open door to its nearer end.
    door = state.fixtures.slide_x0 - (limit if state.joint_position("base__slide") > limit / 2 else 0.0)
    tasks = []
    for block, place in locations.items():
        color, at = block.removeprefix("block_"), state.block_pose(block)[0]
        others = [state.block_pose(other)[0] for other in locations if other != block]
        if place == "table" and _clear(at, others):
            if graspable(at, state.block_pose(block)[1], state.block_size(block)):
                tasks += [f"lift_{color}_block_table", f"rotate_{color}_block_left", f"rotate_{color}_block_right"]
            obstacles = [*others, np.array(state.fixtures.button)]
            tasks += [
                f"push_{color}_block_{side}"
                for side, sign in (("left", -1), ("right", 1))
                if corridor_free(at[:2], sign, obstacles)
            ]
        elif place == "cabinet" and reachable_in_cabinet(float(at[0]), door, state.fixtures.plank_x):
            tasks.append(f"lift_{color}_block_slider")
        elif place == "drawer" and state.joint_position("base__drawer") > 0.19:
            tasks.append(f"lift_{color}_block_drawer")
    return tasks


def feasible_tasks(state: PrivilegedState) -> list[str]:
    """The tasks that can be carried out in the present state, sorted. A held block excludes only its own lifts."""
    locations = {block: block_location(state, block) for block in state.blocks}
    drawer, slide = state.joint_position("base__drawer"), state.joint_position("base__slide")
    tasks = _block_tasks(state, locations)
    if slide < state.joint_limit("base__slide") - 0.16:
        tasks.append("move_slider_left")
    if slide > 0.16:
        tasks.append("move_slider_right")
    if drawer < state.joint_limit("base__drawer") - 0.13:
        tasks.append("open_drawer")
    if drawer > 0.13:
        tasks.append("close_drawer")
    for light in ("lightbulb", "led"):
        tasks.append(f"turn_off_{light}" if state.light_state(light) else f"turn_on_{light}")
    on_table = [block for block, place in locations.items() if place == "table"]
    held = [block for block, place in locations.items() if place == "hand"]
    if len(held) == 1 and state.get_contacts(held[0]) == {"robot"}:
        tasks.append("place_in_slider")
        tasks += ["place_in_drawer"] if drawer > 0.19 else []
        tasks += ["stack_block"] if on_table else []
    if "stacked" in locations.values():
        tasks.append("unstack_block")
    if drawer > 0.19 and any(abs(state.block_pose(b)[0][0] - state.fixtures.drawer_x) < 0.12 for b in on_table):
        tasks.append("push_into_drawer")
    return sorted(tasks)


@dataclass(frozen=True)
class EnvState:
    """Vectors for `Env.reset`. setup_task: the lift to carry out first, if the task needs a block in the gripper."""

    robot_obs: np.ndarray
    scene_obs: np.ndarray
    setup_task: str | None = None


def _sample_fixtures(task: str, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw slider, drawer, button, switch, lightbulb and led (6,), such that the task is not done yet."""
    limit = scene.limits["base__slide"]
    slide, drawer = limit * rng.integers(2), DRAWER_OPEN * rng.integers(2)
    bulb, led = rng.integers(2), rng.integers(2)
    slide = {"move_slider_left": 0.0, "move_slider_right": limit}.get(task, slide)
    drawer = {"open_drawer": 0.0, "close_drawer": DRAWER_OPEN}.get(task, drawer)
    if task in ("push_into_drawer", "place_in_drawer") or (task.startswith("lift") and task.endswith("drawer")):
        drawer = DRAWER_OPEN
    bulb = {"turn_on_lightbulb": 0, "turn_off_lightbulb": 1}.get(task, bulb)
    led = {"turn_on_led": 0, "turn_off_led": 1}.get(task, led)
    return np.array([slide, drawer, 0.0, SWITCH_ON * bulb, bulb, led])


def _sample_locations(task: str, scene: Scene, open_side: str, rng: np.random.Generator) -> dict[str, str]:
    """Draw the location of each block: at most one on each side of the cabinet, and what the task requires."""
    names = [str(name) for name in rng.permutation(scene.block_names)]
    sides = [str(side) for side in rng.permutation(["slider_left", "slider_right"])]
    places = dict(zip(names, rng.permutation(["table", "table" if rng.integers(2) else sides[0], sides[1]])))
    words = task.split("_")
    wanted = {}
    if words[0] in ("lift", "rotate", "push") and words[2] == "block":
        target = f"block_{words[1]}"
        wanted[target] = {"slider": open_side, "drawer": "drawer"}.get(words[3], "table")
    elif task == "push_into_drawer":
        wanted = dict(zip(names, ["table", *sides]))
    elif task in (*HELD_BLOCK_TASKS, "unstack_block"):
        wanted = {names[0]: "table", names[1]: "table"}
    for name, place in wanted.items():
        for other in names:
            if other not in wanted and places[other] == place and place.startswith("slider"):
                places[other] = "table"
        places[name] = place
    return {name: str(places[name]) for name in scene.block_names}


def _sample_position(place: str, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    if place == "drawer":
        return np.array([scene.drawer_x, -0.29, 0.36]) + rng.uniform(-1, 1, 3) * [0.08, 0.025, 0.0]
    low, high = scene.surfaces[place]
    position = rng.uniform(low, high)
    if place.startswith("slider"):
        left, right = scene.plank_x
        door = scene.slide_x0 - (0.0 if place == "slider_left" else scene.slide_travel)
        low_x, high_x = (left, door) if place == "slider_left" else (door + DOOR_WIDTH, right)
        position[0] = np.clip(position[0], low_x + WALL_CLEARANCE + 0.005, high_x - WALL_CLEARANCE - 0.005)
        position[1] = rng.uniform(0.075, 0.1)
    return position


def _placement_valid(task: str, block: str, poses: dict[str, np.ndarray], scene: Scene, slide: float) -> bool:
    """Whether the block that was placed last leaves room to the others, to the fixtures and for the task."""
    at, yaw = poses[block][:3], poses[block][3]
    button = np.array(scene.fixtures.button)
    others = [pose for name, pose in poses.items() if name != block]
    if not _clear(at, [*others, button]):
        return False
    if at[1] < 0:
        axes = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1.0]])
        edges = np.array(scene.sizes[block])
        beside_handle = abs(at[0] - (scene.slide_x0 + 0.14 - slide)) < 0.07
        front = at[1] + np.abs(axes[1]) @ edges / 2
        if front > (-0.04 if beside_handle else -0.005) or not within_reach(at) or not graspable(at, axes, edges):
            return False
    words = task.split("_")
    if task == "unstack_block":
        return at[1] > 0 or at[1] < -0.09  # a block that lies across another one must not touch the handles
    if task == "push_into_drawer":
        return at[1] > 0 or abs(at[0] - scene.drawer_x) < 0.1
    target = f"block_{words[1]}"
    if words[0] == "push" and target in poses:
        rest = [pose for name, pose in poses.items() if name != target]
        return corridor_free(poses[target][:2], 1 if words[3] == "right" else -1, [*rest, button])
    return True


def sample_env_state(task: str, scene: Scene, rng: np.random.Generator) -> EnvState:
    """Draw an initial state with the neutral pose in which `task` is possible, with blocks on the scene's surfaces.

    Raises UserError for an unknown task, RuntimeError if no such state is found.
    """
    check_tasks((task,))
    for _ in range(200):
        fixtures = _sample_fixtures(task, scene, rng)
        open_side = "slider_left" if fixtures[0] == 0 else "slider_right"
        locations = _sample_locations(task, scene, open_side, rng)
        poses: dict[str, np.ndarray] = {}
        for name, place in locations.items():
            for _ in range(60):
                poses[name] = np.append(_sample_position(place, scene, rng), _sample_yaw(place, rng))
                if _placement_valid(task, name, poses, scene, fixtures[0]):
                    break
            else:
                break
        else:
            return _make_env_state(task, scene, fixtures, locations=locations, poses=poses, rng=rng)
    raise RuntimeError(f"no initial state for {task} found in scene {scene.name}")


def _sample_yaw(place: str, rng: np.random.Generator) -> float:
    return rng.uniform(-np.pi, np.pi) if place in ("table", "drawer") else np.pi / 2 + rng.uniform(-0.4, 0.4)


def _make_env_state(
    task: str,
    scene: Scene,
    fixtures: np.ndarray,
    *,
    locations: dict[str, str],
    poses: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> EnvState:
    on_table = [name for name, place in locations.items() if place == "table"]
    if task == "unstack_block":
        low, top = on_table[:2]
        poses[top] = poses[low] + [0, 0, 0.04, rng.uniform(-0.2, 0.2)]
    blocks = [[*poses[name][:3], 0.0, 0.0, poses[name][3]] for name in scene.block_names]
    before = None
    if task in HELD_BLOCK_TASKS:
        before = f"lift_{rng.choice(on_table).removeprefix('block_')}_block_table"
    return EnvState(np.array(NEUTRAL_ROBOT_OBS), np.concatenate([fixtures, *blocks]), before)
