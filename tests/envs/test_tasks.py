"""Success detection: each predicate is tested with hand-made infos at its thresholds. Sets of tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from common.errors import UserError
from envs.tasks import ELEVEN, INSTRUCTIONS, TASK_SETS, TASKS, check_success, check_tasks, resolve_tasks

ROBOT, TABLE = 0, 1
UIDS = {"block_red": 2, "block_blue": 3, "block_pink": 4}
LINK_FRAMES = {"base_link": -1, "plank_link": 0, "drawer_link": 1}


def touch(*others: tuple[int, int]) -> list[tuple]:
    return [(0, 9, uid, -1, link) for uid, link in others]


def yaw(degrees: float) -> list[float]:
    half = np.radians(degrees) / 2
    return [0.0, 0.0, float(np.sin(half)), float(np.cos(half))]


def info(*, doors: dict | None = None, lights: dict | None = None, robot: list | None = None, **blocks: dict) -> dict:
    """The info of a scene with all blocks on the table; keyword arguments change entries of a block."""
    movable = {}
    for name, uid in UIDS.items():
        movable[name] = {
            "current_pos": np.array([0.1 * uid, -0.1, 0.46]),
            "current_orn": yaw(0),
            "uid": uid,
            "contacts": touch((TABLE, -1)),
            "current_lin_vel": np.zeros(3),
            "current_ang_vel": np.zeros(3),
            **blocks.get(name, {}),
        }
    return {
        "robot_info": {"uid": ROBOT, "contacts": robot or []},
        "scene_info": {
            "fixed_objects": {"table": {"uid": TABLE, "links": LINK_FRAMES}},
            "movable_objects": movable,
            "doors": {n: {"current_state": (doors or {}).get(n, 0.0)} for n in ("base__slide", "base__drawer")},
            "lights": {n: {"logical_state": (lights or {}).get(n, 0)} for n in ("lightbulb", "led")},
        },
    }


def at(x: float, z: float = 0.46) -> np.ndarray:
    return np.array([x, -0.1, z])


def test_there_are_calvins_34_tasks_each_with_its_own_sentence() -> None:
    assert len(TASKS) == 34 == len(set(INSTRUCTIONS.values()))
    assert INSTRUCTIONS["push_red_block_right"] == "go push the red block right"
    assert INSTRUCTIONS["lift_pink_block_drawer"] == "Take the pink block from the drawer"


def test_a_set_of_tasks_is_named_or_listed() -> None:
    assert {name: len(resolve_tasks(name)) for name in TASK_SETS} == {"all": 34, "eleven": 11, "lifts": 3}
    assert resolve_tasks(["open_drawer", "turn_on_led"]) == ("open_drawer", "turn_on_led")
    for value, message in (
        ("twelve", r"tasks=twelve is not a set .*all, eleven, lifts.*tasks=\[open_drawer,close_drawer\]"),
        (["open_drawer", "sing"], "unknown task 'sing'"),
        ([], "tasks is empty: choose one of all, eleven, lifts"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_tasks(value)


def test_names_agree_with_calvins_own_configuration(shared_data: Path) -> None:
    config = yaml.safe_load((shared_data / "calvin_meta" / "merged_config.yaml").read_text())
    assert list(config["tasks"]["tasks"]) == list(TASKS)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="'open_window'"):
        check_tasks(["open_drawer", "open_window"])
    with pytest.raises(ValueError, match="open_window"):
        check_success("open_window", info(), info())


@pytest.mark.parametrize(
    ("task", "joint", "before", "after"),
    [
        ("open_drawer", "base__drawer", 0.0, 0.12),
        ("close_drawer", "base__drawer", 0.22, 0.10),
        ("move_slider_left", "base__slide", 0.0, 0.15),
        ("move_slider_right", "base__slide", 0.28, 0.13),
    ],
)
def test_doors_must_pass_their_threshold_in_the_right_direction(
    task: str, joint: str, before: float, after: float
) -> None:
    step = 0.001 if after > before else -0.001
    start = info(doors={joint: before})
    assert check_success(task, start, info(doors={joint: after + step}))
    assert not check_success(task, start, info(doors={joint: after - step}))
    assert not check_success(task, info(doors={joint: after + step}), start)


@pytest.mark.parametrize("light", ["lightbulb", "led"])
def test_lights_must_change(light: str) -> None:
    off, on = info(), info(lights={light: 1})
    assert check_success(f"turn_on_{light}", off, on) and check_success(f"turn_off_{light}", on, off)
    assert not check_success(f"turn_on_{light}", on, on) and not check_success(f"turn_on_{light}", on, off)


def test_rotation_counts_from_60_degrees_on_the_spot_and_on_a_surface() -> None:
    def turned(degrees: float, **more: object) -> dict:
        return info(block_red={"current_orn": yaw(degrees), **more})

    assert check_success("rotate_red_block_left", info(), turned(61)) and not check_success(
        "rotate_red_block_left", info(), turned(59)
    )
    assert check_success("rotate_red_block_right", info(), turned(-61)) and not check_success(
        "rotate_red_block_right", info(), turned(61)
    )
    assert not check_success("rotate_blue_block_left", info(), turned(61))
    assert not check_success("rotate_red_block_left", info(), turned(61, current_pos=at(0.31)))
    assert not check_success("rotate_red_block_left", info(), turned(61, contacts=touch((ROBOT, 9))))
    start = info(block_red={"current_orn": yaw(150)})
    assert check_success("rotate_red_block_left", start, turned(-140))  # 70 degrees further, past 180 degrees
    tipped = [float(np.sin(np.pi / 4)), 0.0, 0.0, float(np.cos(np.pi / 4))]
    assert not check_success("rotate_red_block_left", info(), info(block_red={"current_orn": tipped}))


def test_push_needs_a_decimetre_and_the_surface_it_stood_on() -> None:
    far, near = info(block_red={"current_pos": at(0.305)}), info(block_red={"current_pos": at(0.295)})
    assert check_success("push_red_block_right", info(), far) and not check_success(
        "push_red_block_right", info(), near
    )
    assert check_success("push_red_block_left", far, info()) and not check_success("push_red_block_left", info(), far)
    held = info(block_red={"current_pos": at(0.305), "contacts": touch((ROBOT, 9))})
    assert not check_success("push_red_block_right", info(), held)
    against = info(block_red={"current_pos": at(0.305), "contacts": touch((TABLE, -1), (3, -1), (ROBOT, 9))})
    assert check_success("push_red_block_right", info(), against)


@pytest.mark.parametrize(("place", "link", "rise"), [("table", -1, 0.05), ("slider", 0, 0.03), ("drawer", 1, 0.05)])
def test_lift_needs_height_the_right_start_and_the_hand_alone(place: str, link: int, rise: float) -> None:
    task = f"lift_blue_block_{place}"
    start = info(block_blue={"contacts": touch((TABLE, link))})

    def lifted(by: float, *contacts: tuple[int, int]) -> dict:
        return info(block_blue={"current_pos": at(0.3, 0.46 + by), "contacts": touch(*(contacts or [(ROBOT, 9)]))})

    assert check_success(task, start, lifted(rise + 0.001)) and not check_success(task, start, lifted(rise - 0.001))
    assert not check_success(task, start, lifted(0.1, (ROBOT, 9), (3, -1)))
    assert not check_success(task, info(block_blue={"contacts": touch((TABLE, 5))}), lifted(0.1))
    assert not check_success(task, info(block_blue={"contacts": touch((TABLE, link), (ROBOT, 9))}), lifted(0.1))


@pytest.mark.parametrize(("task", "link"), [("place_in_slider", 0), ("place_in_drawer", 1)])
def test_place_starts_with_the_block_in_the_hand_and_ends_without(task: str, link: int) -> None:
    hand = touch((UIDS["block_pink"], -1))
    start = info(robot=hand, block_pink={"contacts": touch((ROBOT, 9))})
    done = info(block_pink={"contacts": touch((TABLE, link))})
    assert check_success(task, start, done)
    assert not check_success(task, start, info(robot=hand, block_pink={"contacts": touch((TABLE, link), (ROBOT, 9))}))
    assert not check_success(task, info(), done)
    assert not check_success(task, start, info())
    leaning = info(robot=hand + touch((TABLE, -1)), block_pink={"contacts": touch((ROBOT, 9))})
    assert not check_success(task, leaning, done)


def test_stack_and_unstack_mirror_each_other() -> None:
    flat = info()
    high = info(block_red={"contacts": touch((3, -1))}, block_blue={"contacts": touch((TABLE, -1), (2, -1))})
    assert check_success("stack_block", flat, high) and check_success("unstack_block", high, flat)
    assert not check_success("stack_block", high, high) and not check_success("unstack_block", flat, high)
    falling = info(block_red={"contacts": touch((3, -1)), "current_lin_vel": np.array([0, 0, -1.2])})
    assert not check_success("stack_block", flat, falling)
    leaning = info(block_red={"contacts": touch((3, -1), (TABLE, -1))})
    assert not check_success("stack_block", flat, leaning)


def test_push_into_drawer_goes_from_the_table_alone_to_the_drawer() -> None:
    done = info(block_red={"contacts": touch((TABLE, 1))})
    assert check_success("push_into_drawer", info(), done)
    assert not check_success("push_into_drawer", info(block_red={"contacts": touch((TABLE, -1), (ROBOT, 9))}), done)
    assert not check_success("push_into_drawer", info(), info())


def test_eleven_is_fixtures_and_lifts_from_the_table() -> None:
    assert len(ELEVEN) == 11 and sum(task.endswith("block_table") for task in ELEVEN) == 3
