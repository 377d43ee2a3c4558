"""Sequences of five tasks in a row and the initial states that they start from (Sec. 4.2; CALVIN's LH-MTLC protocol).

The random draws repeat those of CALVIN's code call by call with numpy's legacy generator, so `get_sequences(1000)` is
the published list. A symbolic state is a dictionary:
    led, lightbulb, grasped: 0 or 1; slider: "right" or "left"; drawer: "closed" or "open"
    red_block, blue_block, pink_block: "table", "slider_right", "slider_left", "drawer", "grasped", "stacked_top" or
    "stacked_bottom"
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from itertools import permutations, product
from typing import Any

import numpy as np

from common.errors import UserError
from envs.protocol import SceneLayout
from envs.tasks import BLOCK_COLORS, TASKS, check_tasks

State = dict[str, Any]
# (condition, effect) of a task. In a condition, a tuple lists the admitted values of a key.
Rule = tuple[dict[str, Any], dict[str, Any]]

NUM_SEQUENCES = 1000
OFFICIAL_SHA256 = {  # number of sequences -> `sequences_sha256` of the first so many of the published list
    1: "f691091afd3c0490bc2155e22c81b3b5345933e2db44a36496f76c9731218515",
    10: "8dbbd38e9470de4dc34a46d5e1682cec738330bebfac6320c1fc5e64634c5e18",
    100: "5532f4910b6fa1ecc5bc56dde07a64ea6b871d5383823258eb215fbae732285d",
    1000: "90191d9ac76baecb4f292ab766bbbf3ae65dbf43a83bbe5c376d99db10fd6446",
}
DRAW_BATCH = 512  # permutations that are drawn at once; each state has its own generator, so a surplus has no effect
# CALVIN's numbers for scene D. In the cabinet, x is relative to the joint frame of the sliding door, as in all scenes.
NEUTRAL_JOINTS = (-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928)
NEUTRAL_ROBOT_OBS = (
    *(0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963),
    *NEUTRAL_JOINTS,
    1.0,
)
CABINET_POSITIONS = {
    "slider_left": (-0.140851662, 0.0924044687, 0.460990009),
    "slider_right": (0.1703416330, 0.0924044687, 0.460990009),
}
TABLE_POSITIONS = ((0.0500000896, -0.120000177, 0.459990009), (0.229995412, -0.11999514, 0.45999001))
SWITCH_ON, DRAWER_OPEN = 0.088, 0.22
SIDES = ("slider_right", "slider_left")
OPEN_SIDE = {"right": "slider_left", "left": "slider_right"}  # position of the door -> the side that it leaves open


def _block_rules(color: str) -> dict[str, list[Rule]]:
    """Rules of the tasks that name a block's color."""
    block = f"{color}_block"
    still = [({block: "table", "grasped": 0}, {block: "table"})]
    taken = {block: "grasped", "grasped": 1}
    in_cabinet = [({block: OPEN_SIDE[door], "slider": door, "grasped": 0}, taken) for door in OPEN_SIDE]
    return {
        **{f"rotate_{block}_{side}": still for side in ("right", "left")},
        **{f"push_{block}_{side}": still for side in ("right", "left")},
        f"lift_{block}_table": [({block: "table", "grasped": 0}, taken)],
        f"lift_{block}_slider": in_cabinet,
        f"lift_{block}_drawer": [({block: "drawer", "drawer": "open", "grasped": 0}, taken)],
    }


def _rules() -> dict[str, list[Rule]]:
    blocks = [f"{color}_block" for color in BLOCK_COLORS]
    pairs = list(permutations(blocks, 2))
    rules: dict[str, list[Rule]] = {}
    for color in BLOCK_COLORS:
        rules.update(_block_rules(color))
    rules["move_slider_left"] = [({"slider": "right", "grasped": 0}, {"slider": "left"})]
    rules["move_slider_right"] = [({"slider": "left", "grasped": 0}, {"slider": "right"})]
    rules["open_drawer"] = [({"drawer": "closed", "grasped": 0}, {"drawer": "open"})]
    rules["close_drawer"] = [({"drawer": "open", "grasped": 0}, {"drawer": "closed"})]
    # CALVIN records a placed block on the side where the door stands, which is the closed one. It is repeated here,
    # because the published list depends on it.
    rules["place_in_slider"] = [
        ({block: "grasped", "slider": door, "grasped": 1}, {block: f"slider_{door}", "grasped": 0})
        for block in blocks
        for door in ("right", "left")
    ]
    rules["place_in_drawer"] = [
        ({block: "grasped", "drawer": "open", "grasped": 1}, {block: "drawer", "grasped": 0}) for block in blocks
    ]
    rules["stack_block"] = [
        ({top: "grasped", low: "table", "grasped": 1}, {top: "stacked_top", low: "stacked_bottom", "grasped": 0})
        for top, low in pairs
    ]
    rules["unstack_block"] = [
        ({top: "stacked_top", low: "stacked_bottom", "grasped": 0}, {top: "table", low: "table"}) for top, low in pairs
    ]
    for light in ("lightbulb", "led"):
        rules[f"turn_on_{light}"] = [({light: 0, "grasped": 0}, {light: 1})]
        rules[f"turn_off_{light}"] = [({light: 1, "grasped": 0}, {light: 0})]
    rules["push_into_drawer"] = [
        (
            {block: "table", **{other: SIDES for other in blocks if other != block}, "drawer": "open", "grasped": 0},
            {block: "drawer", "grasped": 0},
        )
        for block in blocks
    ]
    return {task: rules[task] for task in TASKS}


def _task_category(task: str) -> str:
    if task.startswith(("rotate", "push")) and task != "push_into_drawer":
        return "move_block"
    if task.startswith("lift"):
        return "lift_" + task.rsplit("_", 1)[1]
    if task.startswith("turn"):
        return "light"
    return {
        "move_slider_left": "slider",
        "move_slider_right": "slider",
        "open_drawer": "drawer",
        "close_drawer": "drawer",
        "place_in_slider": "place",
        "place_in_drawer": "place",
    }.get(task, task)


RULES = _rules()
TASK_CATEGORIES: dict[str, str] = {task: _task_category(task) for task in TASKS}


def _check_condition(state: State, condition: dict[str, Any]) -> bool:
    return all(state[key] in want if isinstance(want, tuple) else state[key] == want for key, want in condition.items())


def next_state(state: State, task: str) -> State | None:
    """The symbolic state after `task`, or None if it is impossible or has more than one outcome."""
    effects = [effect for condition, effect in RULES[task] if _check_condition(state, condition)]
    return {**state, **effects[0]} if len(effects) == 1 else None


def _initial_states() -> list[State]:
    """CALVIN's 192 states: each setting of the fixtures with each placement of one or two blocks on the table."""
    states = []
    for values in product((0, 1), (0, 1), ("right", "left"), ("closed", "open"), *[("table", *SIDES)] * 3):
        blocks = values[4:]
        if blocks.count("table") in (1, 2) and all(blocks.count(side) < 2 for side in SIDES):
            keys = ("led", "lightbulb", "slider", "drawer", *(f"{color}_block" for color in BLOCK_COLORS), "grasped")
            states.append(dict(zip(keys, (*values, 0))))
    return states


INITIAL_STATES: list[State] = _initial_states()


def _is_valid_sequence(state: State, tasks: tuple[str, ...]) -> bool:
    for task in tasks:
        if (after := next_state(state, task)) is None:
            return False
        state = after
    return True


def _sequence_exists(
    state: State, tasks: tuple[str, ...], length: int, num_categories: int, done: tuple[str, ...] = ()
) -> bool:
    """Whether any sequence of `length` different tasks with `num_categories` categories starts in this state."""
    seen = {TASK_CATEGORIES[task] for task in done}
    left = length - len(done)
    if len(seen) + left < num_categories:
        return False
    return left == 0 or any(
        _sequence_exists(after, tasks, length, num_categories, (*done, task))
        for task in tasks
        if task not in done and (after := next_state(state, task)) is not None
    )


def _sample_sequences(
    state: State, tasks: tuple[str, ...], length: int, num_categories: int, *, count: int, seed: Any
) -> list[list[str]]:
    """Draw `count` sequences of `length` different tasks that are possible and have enough categories.

    Each draw is one shuffle of all tasks, as numpy's legacy `choice` without replacement makes it.
    """
    rng = np.random.RandomState(seed)
    labels = {name: number for number, name in enumerate(sorted({TASK_CATEGORIES[task] for task in tasks}))}
    category = np.array([1 << labels[TASK_CATEGORIES[task]] for task in tasks])
    starts = np.array([next_state(state, task) is not None for task in tasks])
    found: list[list[str]] = []
    while len(found) < count:
        picks = np.tile(np.arange(len(tasks)), (DRAW_BATCH, 1))
        for row in picks:
            rng.shuffle(row)
        picks = picks[:, :length]
        masks = np.bitwise_or.reduce(category[picks], axis=1)
        distinct = sum((masks >> bit) & 1 for bit in range(len(labels)))
        for pick in picks[starts[picks[:, 0]] & (distinct >= num_categories)]:
            names = tuple(tasks[index] for index in pick)
            if _is_valid_sequence(state, names):
                found.append(list(names))
    return found[:count]


@lru_cache(maxsize=4)
def _sequence_schedule(
    tasks: tuple[str, ...], length: int, total: int, seed: int
) -> tuple[int, list[State], list[tuple[int, int]]]:
    """Return (number of categories in a sequence, usable states, (index of its state, rank there) per sequence)."""
    num_categories = min(length, len({TASK_CATEGORIES[task] for task in tasks}))
    states = [state for state in INITIAL_STATES if _sequence_exists(state, tasks, length, num_categories)]
    if not states:
        raise UserError(
            f"no sequence of {length} of the tasks {', '.join(tasks)} is possible: add tasks or use a smaller length"
        )
    shares = [len(part) for part in np.array_split(range(total), len(states))]
    order = [(index, rank) for index, share in enumerate(shares) for rank in range(share)]
    np.random.RandomState(seed).shuffle(order)
    return num_categories, states, order


@lru_cache(maxsize=1024)
def _sequences_for_state(tasks: tuple[str, ...], length: int, total: int, seed: int, index: int) -> list[list[str]]:
    num_categories, states, order = _sequence_schedule(tasks, length, total, seed)
    share = sum(1 for where, _ in order if where == index)
    # Seed 0 repeats CALVIN, which seeds each state with its index.
    return _sample_sequences(
        states[index], tasks, length, num_categories, count=share, seed=index if seed == 0 else [seed, index]
    )


def get_sequences(
    count: int, tasks: list[str] | None = None, length: int = 5, seed: int = 0
) -> list[tuple[State, list[str]]]:
    """Return `count` pairs of (symbolic initial state, `length` tasks in a row); by default CALVIN's published ones.

    They are the first ones of a list of NUM_SEQUENCES (or of `count`, if that is more), so that a short evaluation is
    the beginning of a long one. tasks: the names that may occur, None for all 34. If they have fewer categories than
    `length`, each category occurs at least once. Raises UserError for unknown tasks, a length outside 1 to 5, and tasks
    that allow no sequence.
    """
    vocabulary = TASKS if tasks is None else check_tasks(dict.fromkeys(tasks))
    if not 1 <= length <= min(5, len(vocabulary)):
        raise UserError(f"length={length}: choose 1 to {min(5, len(vocabulary))} for {len(vocabulary)} task(s)")
    total = max(count, NUM_SEQUENCES)
    _, states, order = _sequence_schedule(vocabulary, length, total, seed)
    return [
        (dict(states[index]), list(_sequences_for_state(vocabulary, length, total, seed, index)[rank]))
        for index, rank in order[:count]
    ]


def sequences_sha256(pairs: list[tuple[State, list[str]]]) -> str:
    """sha256 of the sequences, written as compact JSON."""
    return hashlib.sha256(
        json.dumps([list(pair) for pair in pairs], sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def check_published_sequences(pairs: list[tuple[State, list[str]]]) -> None:
    """Raise UserError if these are not the beginning of the published list, because numpy draws other numbers."""
    known = max(count for count in OFFICIAL_SHA256 if count <= len(pairs))
    if sequences_sha256(pairs[:known]) != OFFICIAL_SHA256[known]:
        raise UserError(
            f"the first {known} sequences are not CALVIN's published ones: numpy {np.__version__} draws other numbers, "
            "install the version in requirements-lock.txt"
        )


def _fnv1_32(text: str) -> int:
    """32-bit FNV-1 over UTF-16-LE that begins with 0 instead of the offset basis, as CALVIN's pyhash computes it."""
    value = 0
    for byte in text.encode("utf-16-le"):
        value = (value * 0x01000193 & 0xFFFFFFFF) ^ byte
    return value


def get_env_state_for_initial_condition(condition: State, scene: SceneLayout) -> tuple[np.ndarray, np.ndarray]:
    """Convert a symbolic state into (robot_obs (15,), scene_obs (24,)), in scene D exactly as CALVIN does.

    In the other scenes, positions in the cabinet are relative to the joint frame of the door, an open slider stands at
    the scene's limit, blocks are in the scene's order, and positions on the table are mirrored if the button is on the
    right (scene B). Raises ValueError for blocks in other places than the table and the two sides of the cabinet.
    """
    rng = np.random.RandomState(_fnv1_32(str({key: condition[key] for key in INITIAL_STATES[0]}.values())))
    table = [list(place) for place in TABLE_POSITIONS]
    if scene.fixtures.button[0] > 0:
        table = [[-x, y, z] for x, y, z in table]
    rng.shuffle(table)
    places = [condition[f"{color}_block"] for color in BLOCK_COLORS]
    if any(place not in ("table", *SIDES) for place in places) or not 1 <= places.count("table") <= 2:
        raise ValueError(
            f"no initial poses for blocks at {places}: one or two have to be on the table, the others in the cabinet"
        )
    scene_obs = np.zeros(24)
    scene_obs[0] = scene.limits["base__slide"] if condition["slider"] == "left" else 0.0
    scene_obs[1] = DRAWER_OPEN if condition["drawer"] == "open" else 0.0
    scene_obs[3] = SWITCH_ON if condition["lightbulb"] == 1 else 0.0
    scene_obs[4:6] = condition["lightbulb"], condition["led"]
    for number, (color, place) in enumerate(zip(BLOCK_COLORS, places)):
        if place == "table":
            slot = 1 if number == 2 or (number == 1 and places[0] == "table") else 0
            position = table[slot]
        else:
            x, y, z = CABINET_POSITIONS[place]
            position = (scene.fixtures.slide_x0 + x, y, z)
        row = 6 + 6 * scene.block_names.index(f"block_{color}")
        scene_obs[row : row + 3] = position
        scene_obs[row + 5] = rng.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
    return np.array(NEUTRAL_ROBOT_OBS), scene_obs
