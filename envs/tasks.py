"""CALVIN's 34 tasks: their sentences, and the success detection that compares two infos (Sec. 4.2; CALVIN's `Tasks`).

An info is CALVIN's dictionary with `robot_info` and `scene_info`. A contact is a sequence in the order of pybullet's
getContactPoints: entry 2 is the uid of the other body, entry 4 is the link of the other body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from common.errors import UserError

Info = dict[str, Any]
Predicate = Callable[[Info, Info], bool]

BLOCK_COLORS = ("red", "blue", "pink")
MAX_RESTING_SPEED = 1.0  # m/s and rad/s, per axis; a faster block does not count as stacked


def _contact_uids(contacts: Iterable) -> set[int]:
    return {contact[2] for contact in contacts}


def _contact_links(contacts: Iterable) -> set[tuple[int, int]]:
    return {(contact[2], contact[4]) for contact in contacts}


def _block(info: Info, name: str) -> Info:
    return info["scene_info"]["movable_objects"][name]


def _table_link(info: Info, link: str) -> tuple[int, int]:
    table = info["scene_info"]["fixed_objects"]["table"]
    return table["uid"], table["links"][link]


def _relative_euler_deg(q_start: Iterable[float], q_end: Iterable[float]) -> np.ndarray:
    """Fixed-axis xyz Euler angles in degrees (3,) of the rotation from one quaternion (x, y, z, w) to another."""
    x0, y0, z0, w0 = q_start
    x1, y1, z1, w1 = q_end
    # The product of the end quaternion and the conjugate of the start quaternion.
    x = -w1 * x0 + x1 * w0 - y1 * z0 + z1 * y0
    y = -w1 * y0 + y1 * w0 - z1 * x0 + x1 * z0
    z = -w1 * z0 + z1 * w0 - x1 * y0 + y1 * x0
    w = w1 * w0 + x1 * x0 + y1 * y0 + z1 * z0
    roll = np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    pitch = np.arcsin(np.clip(2 * (w * y - z * x), -1, 1))
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return np.degrees([roll, pitch, yaw])


def _rotate_object(name: str, degrees: float, start_info: Info, end_info: Info) -> bool:
    """The block turned about z by more than `degrees` (with its sign), stayed within 0.1 m and lies on something."""
    before, after = _block(start_info, name), _block(end_info, name)
    if np.linalg.norm(np.subtract(after["current_pos"], before["current_pos"])) > 0.1:
        return False
    if not _contact_uids(after["contacts"]) - {start_info["robot_info"]["uid"]}:
        return False
    roll, pitch, yaw = _relative_euler_deg(before["current_orn"], after["current_orn"])
    return bool(abs(degrees) < yaw * np.sign(degrees) < 180 and abs(roll) < 30 and abs(pitch) < 30)


def _push_object(name: str, metres: float, start_info: Info, end_info: Info) -> bool:
    """The block moved along x by more than `metres` (with its sign) and still touches what it rested on."""
    before, after = _block(start_info, name), _block(end_info, name)
    robot = start_info["robot_info"]["uid"]
    resting, still = (
        {pair for pair in _contact_links(block["contacts"]) if pair[0] != robot} for block in (before, after)
    )
    moved = after["current_pos"][0] - before["current_pos"][0]
    return bool(resting and resting <= still and moved * np.sign(metres) > abs(metres))


def _lift_object(name: str, metres: float, link: str, start_info: Info, end_info: Info) -> bool:
    """The block rested on `link` without the robot, rose by more than `metres` and touches the robot only."""
    before, after = _block(start_info, name), _block(end_info, name)
    robot = start_info["robot_info"]["uid"]
    return bool(
        after["current_pos"][2] - before["current_pos"][2] > metres
        and robot not in _contact_uids(before["contacts"])
        and _contact_uids(after["contacts"]) == {robot}
        and _table_link(start_info, link) in _contact_links(before["contacts"])
    )


def _place_object(link: str, start_info: Info, end_info: Info) -> bool:
    """The block that the robot alone held at the start was released and touches `link`."""
    robot = start_info["robot_info"]["uid"]
    touched = _contact_uids(start_info["robot_info"]["contacts"])
    for name, block in start_info["scene_info"]["movable_objects"].items():
        if touched == {block["uid"]} and _contact_uids(block["contacts"]) == {robot}:
            let_go = block["uid"] not in _contact_uids(end_info["robot_info"]["contacts"])
            return let_go and _table_link(end_info, link) in _contact_links(_block(end_info, name)["contacts"])
    return False


def _push_object_into(source: str, target: str, start_info: Info, end_info: Info) -> bool:
    """A block that touched only `source` at the start touches `target` at the end."""
    # CALVIN's code also intends to require that the robot has let go, but it compares a uid with pairs, so the
    # condition has no effect. It is left out here.
    return any(
        _contact_links(block["contacts"]) == {_table_link(start_info, source)}
        and _table_link(end_info, target) in _contact_links(_block(end_info, name)["contacts"])
        for name, block in start_info["scene_info"]["movable_objects"].items()
    )


def _move_door_rel(joint: str, metres: float, start_info: Info, end_info: Info) -> bool:
    """The joint of a door moved by more than `metres` (with its sign)."""
    doors = start_info["scene_info"]["doors"], end_info["scene_info"]["doors"]
    moved = float(doors[1][joint]["current_state"]) - float(doors[0][joint]["current_state"])
    return moved * np.sign(metres) > abs(metres)


def _toggle_light(light: str, before: int, after: int, start_info: Info, end_info: Info) -> bool:
    lights = start_info["scene_info"]["lights"], end_info["scene_info"]["lights"]
    return lights[0][light]["logical_state"] == before and lights[1][light]["logical_state"] == after


def _at_rest(block: Info) -> bool:
    speeds = np.abs([*block["current_lin_vel"], *block["current_ang_vel"]])
    return bool((speeds < MAX_RESTING_SPEED).all())


def _on_blocks_only(block: Info, uids: set[int]) -> bool:
    bodies = _contact_uids(block["contacts"])
    return bool(bodies) and bodies <= uids and _at_rest(block)


def _stack_objects(sign: int, start_info: Info, end_info: Info) -> bool:
    """Sign 1: a block that touched no other block at the start rests on blocks only at the end. -1: the reverse."""
    before, after = (start_info, end_info) if sign > 0 else (end_info, start_info)
    uids = {block["uid"] for block in start_info["scene_info"]["movable_objects"].values()}
    return any(
        not _contact_uids(_block(before, name)["contacts"]) & uids and _on_blocks_only(_block(after, name), uids)
        for name in start_info["scene_info"]["movable_objects"]
    )


def _build_tasks() -> dict[str, tuple[str, Predicate]]:
    """Map each task to (sentence, predicate), in the order of CALVIN's configuration."""
    rows: dict[str, tuple[str, Predicate]] = {}
    for color in BLOCK_COLORS:
        for side, degrees in (("right", -60.0), ("left", 60.0)):
            rows[f"rotate_{color}_block_{side}"] = (
                f"take the {color} block and rotate it to the {side}",
                partial(_rotate_object, f"block_{color}", degrees),
            )
    for color in BLOCK_COLORS:
        for side, metres in (("right", 0.1), ("left", -0.1)):
            rows[f"push_{color}_block_{side}"] = (
                f"go push the {color} block {side}",
                partial(_push_object, f"block_{color}", metres),
            )
    rows["move_slider_left"] = ("push the sliding door to the left side", partial(_move_door_rel, "base__slide", 0.15))
    rows["move_slider_right"] = (
        "push the sliding door to the right side",
        partial(_move_door_rel, "base__slide", -0.15),
    )
    rows["open_drawer"] = ("pull the handle to open the drawer", partial(_move_door_rel, "base__drawer", 0.12))
    rows["close_drawer"] = ("push the handle to close the drawer", partial(_move_door_rel, "base__drawer", -0.12))
    for color in BLOCK_COLORS:
        for place, metres, link, sentence in (
            ("table", 0.05, "base_link", f"grasp and lift the {color} block"),
            ("slider", 0.03, "plank_link", f"lift the {color} block from the sliding cabinet"),
            ("drawer", 0.05, "drawer_link", f"Take the {color} block from the drawer"),
        ):
            predicate = partial(_lift_object, f"block_{color}", metres, link)
            rows[f"lift_{color}_block_{place}"] = (sentence, predicate)
    rows["place_in_slider"] = ("store the grasped block in the sliding cabinet", partial(_place_object, "plank_link"))
    rows["place_in_drawer"] = ("store the grasped block in the drawer", partial(_place_object, "drawer_link"))
    rows["stack_block"] = ("stack the grasped block", partial(_stack_objects, 1))
    rows["unstack_block"] = ("remove the stacked block", partial(_stack_objects, -1))
    rows["turn_on_lightbulb"] = ("use the switch to turn on the light bulb", partial(_toggle_light, "lightbulb", 0, 1))
    rows["turn_off_lightbulb"] = (
        "use the switch to turn off the light bulb",
        partial(_toggle_light, "lightbulb", 1, 0),
    )
    rows["turn_on_led"] = ("press the button to turn on the led light", partial(_toggle_light, "led", 0, 1))
    rows["turn_off_led"] = ("press the button to turn off the led light", partial(_toggle_light, "led", 1, 0))
    rows["push_into_drawer"] = (
        "slide the block that it falls into the drawer",
        partial(_push_object_into, "base_link", "drawer_link"),
    )
    return rows


_TASK_SPECS = _build_tasks()
TASKS: tuple[str, ...] = tuple(_TASK_SPECS)
INSTRUCTIONS: dict[str, str] = {task: sentence for task, (sentence, _) in _TASK_SPECS.items()}
TABLE_LIFT_TASKS: tuple[str, ...] = tuple(f"lift_{color}_block_table" for color in BLOCK_COLORS)
# These start with a block in the gripper.
HELD_BLOCK_TASKS: tuple[str, ...] = ("place_in_slider", "place_in_drawer", "stack_block")
ELEVEN: tuple[str, ...] = (
    *("open_drawer", "close_drawer", "move_slider_left", "move_slider_right"),
    *("turn_on_lightbulb", "turn_off_lightbulb", "turn_on_led", "turn_off_led"),
    *TABLE_LIFT_TASKS,
)
# The sets that a config may name. `eleven`: the eight tasks of the fixtures and the three lifts from the table.
# `lifts`: the three lifts from the table alone; with length=1 each of them starts from the neutral pose of the arm.
TASK_SETS: dict[str, tuple[str, ...]] = {"all": TASKS, "eleven": ELEVEN, "lifts": TABLE_LIFT_TASKS}


def check_tasks(tasks: Iterable[str]) -> tuple[str, ...]:
    """Return the same names as a tuple. Raises UserError for a name that is not one of CALVIN's 34 tasks."""
    tasks = tuple(tasks)
    for task in tasks:
        if task not in INSTRUCTIONS:
            raise UserError(f"unknown task {task!r}: CALVIN's tasks are {', '.join(TASKS)}")
    return tasks


def resolve_tasks(value: str | Iterable[str]) -> tuple[str, ...]:
    """Return the tasks that the config key `tasks` stands for: the name of a set in TASK_SETS, or a list of tasks.

    Raises UserError for an unknown set, an unknown task and an empty list.
    """
    if isinstance(value, str):
        if value not in TASK_SETS:
            raise UserError(
                f"tasks={value} is not a set of tasks: choose one of {', '.join(TASK_SETS)}, "
                "or give a list of tasks such as tasks=[open_drawer,close_drawer]"
            )
        return TASK_SETS[value]
    tasks = check_tasks(value or ())
    if not tasks:
        raise UserError(f"tasks is empty: choose one of {', '.join(TASK_SETS)}, or give a list of tasks")
    return tasks


def check_success(task: str, start_info: Info, end_info: Info) -> bool:
    """Whether `task` was carried out between the two infos, by CALVIN's rules. Raises UserError for an unknown task."""
    check_tasks((task,))
    return bool(_TASK_SPECS[task][1](start_info, end_info))
