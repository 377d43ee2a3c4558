"""One chain of scripted demonstrations: tasks in a row without a reset, so that they start where chains arrive (DESIGN 7).

A *segment* is what one sentence describes. Labels are the expert's clean commands; what is executed carries noise.
The shares follow a first policy's lessons (starting anywhere in a chain matters most; lifts are what needs eyes).
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from playtable.env import PlayTable, PlayTableState
from playtable.expert import CABINET_TILT, LIFTS_FROM_TABLE, Expert, disturbed
from playtable.motions import FITS, FORWARD, Stuck, hand
from playtable.sequences import CATEGORIES, INITIAL_STATES, initial_state
from playtable.starts import NEEDS_BLOCK, possible, random_start

SIGMAS = (0.0, 0.1, 0.25)
LENGTHS = (0.55, 0.15, 0.08, 0.07, 0.15)  # of chains with 1..5 segments: half of all segments start from neutral
TWINS = 2  # chains begin alike; where both are one lift, the sentence alone tells them apart
TWO_BLOCKS_SHARE = 0.75  # of single lifts begin with two blocks on the table
LIFT_LAST_SHARE = 0.65  # of chains are fixtures and then a lift, where no task takes a lifted block further
LIFT_SHARE = 0.3  # of the other choices where a lift is possible; a third of all with the one above
USE_BLOCK_SHARE = 0.75  # of the choices that have a block in the hand and a task for it
BURST_SHARE = 0.4  # of the rest begin behind an unrecorded push off their course
BURST_AFTER, BURST_STEPS = (0, 45), (3, 11)
BURST_CLOSED_SHARE = 0.3  # of pushes shut an open hand: a grasp that missed
LOST_CLOSED_SHARE = 0.6  # of lost hands are shut, as fixtures leave them
CALM_SHARE = 0.55  # of single lifts begin undisturbed: there the sentence must choose
HOVER_SHARE = 0.2  # of lifts from the table begin with the open hand near the block, where a policy finds that it came down beside it
WRONG_SIDE_SHARE = 0.25  # of the door's moves begin with the shut hand low beside its handle, as often as not where it cannot push
LOST_SHARE = 0.35  # of the others begin with the empty hand anywhere over the table
HOVER_ASIDE, HOVER_TURN = 0.025, 0.35  # m (deviation) and rad
HOVER_ABOVE, HOVER_AROUND = (0.035, 0.13), (-0.004, 0.13)  # m above a block's middle, where fingers would meet it and where they fit around it
AT_HANDLE = (-0.12, -0.07, 0.48), (0.12, 0.0, 0.56)  # m, x from the handle
LOST_WITHIN = (-0.38, -0.35, 0.47), (0.38, -0.02, 0.68)  # m
LOST_TURN, LOST_TILT = 0.7, 0.4  # rad
BESIDE, OVER_BLOCKS = 0.1, 0.54  # m, an open hand within the first of a block stays above the second
BACK_OFF_STEPS = 15
OVERRUN_SHARE = 0.35  # of segments run on past success
OVERRUN_STEPS = (5, 11)
SCATTERED_SHARE = 0.1  # of chains start from blocks anywhere on the scene's surfaces
JITTER, TURN = 0.01, 0.15  # m and rad, of blocks on the table in the others
LIMIT = 240  # steps in which a demonstration must succeed
SHORTEST = 12  # frames; less holds no chunk of actions


@dataclass
class Segment:
    """Frames of one annotated sub-task; every list has one entry a frame."""

    task: str
    sentence: str
    rgb_static: list[np.ndarray] = field(default_factory=list)
    rgb_gripper: list[np.ndarray] = field(default_factory=list)
    robot_obs: list[np.ndarray] = field(default_factory=list)
    scene_obs: list[np.ndarray] = field(default_factory=list)
    rel_actions: list[np.ndarray] = field(default_factory=list)
    after: np.ndarray | None = None  # robot_obs (15,) behind the last frame

    def __len__(self) -> int:
        return len(self.rel_actions)

    def add(self, observation: dict, action: np.ndarray) -> None:
        """One frame: what is seen and the clean command given there."""
        self.rgb_static.append(observation["rgb_obs"]["rgb_static"])
        self.rgb_gripper.append(observation["rgb_obs"]["rgb_gripper"])
        self.robot_obs.append(observation["robot_obs"])
        self.scene_obs.append(observation["scene_obs"])
        self.rel_actions.append(action)

    def absolute_actions(self) -> np.ndarray:
        """(T, 7): the hand's pose of the following frame and the gripper command, CALVIN's "actions"."""
        poses = np.array([*self.robot_obs[1:], self.after])[:, :6]
        return np.concatenate([poses, np.array(self.rel_actions)[:, 6:]], axis=1)


def numbered(env: PlayTable, tasks: Sequence[str], longest: int, *, seed: int, number: int) -> tuple[list[Segment], int]:
    """Chain `number` of a recording in the scene of `env`: a function of these alone. TWINS in a row begin alike."""
    key = (seed, "ABCD".index(env.scene.name))
    return chain(env, tasks, longest, np.random.default_rng((*key, number)), begin=np.random.default_rng((*key, number // TWINS, TWINS)), turn=number % TWINS)


def chain(env: PlayTable, tasks: Sequence[str], longest: int, rng: np.random.Generator, *, begin: np.random.Generator | None = None,
          turn: int = 0) -> tuple[list[Segment], int]:
    """Demonstrated segments, at most `longest`, and the number of attempts that failed. `env` is reset first.

    `begin` draws how the chain begins and of what kind it is (`rng`), `turn` which of the possible lifts a single lift is.
    """
    begin = begin or rng
    shares = np.array(LENGTHS[:longest]) / sum(LENGTHS[:longest])
    length = 1 + int(begin.choice(len(shares), p=shares))
    lift_last = begin.random() < LIFT_LAST_SHARE and not set(tasks) & set(NEEDS_BLOCK)
    single_lift = lift_last and length == 1
    _start(env, tasks, begin, two_blocks=single_lift and begin.random() < TWO_BLOCKS_SHARE)
    state, failed, segments = PlayTableState(env), 0, []
    expert = env.expert(seed=int(rng.integers(2**31)))
    task = None
    for place in range(length):
        lift = place == length - 1 if lift_last else None
        choices = [name for name in possible(state) if name in tasks and name != task]
        lifts = [name for name in choices if name in LIFTS_FROM_TABLE]
        task = lifts[turn % len(lifts)] if single_lift and lifts else _choose(choices, rng, lift=lift)
        if task is None:
            break
        segment = _demonstrate(env, expert, task, rng, calm=single_lift and rng.random() < CALM_SHARE)
        if segment is None:
            failed += 1
        elif len(segment) >= SHORTEST:
            segments.append(segment)
    return segments, failed


def _start(env: PlayTable, tasks: Sequence[str], rng: np.random.Generator, *, two_blocks: bool) -> None:
    """The neutral pose, with blocks and fixtures as an evaluation has them (a little shifted) or anywhere."""
    if rng.random() < SCATTERED_SHARE:
        start = random_start(str(rng.choice(tasks)), env.scene, rng)
        env.reset(robot_obs=start.robot_obs, scene_obs=start.scene_obs)
        return
    states = [state for state in INITIAL_STATES if not two_blocks or list(state.values()).count("table") == 2]
    robot_obs, scene_obs = initial_state(states[rng.integers(len(states))], env.scene)
    blocks = scene_obs[6:].reshape(3, 6)
    on_table = blocks[:, 1] < 0
    blocks[on_table, :2] += rng.uniform(-JITTER, JITTER, (int(on_table.sum()), 2))
    blocks[on_table, 5] += rng.uniform(-TURN, TURN, int(on_table.sum()))
    env.reset(robot_obs=robot_obs, scene_obs=np.concatenate([scene_obs[:6], blocks.ravel()]))


def _group(task: str) -> str:
    words = task.split("_")
    if words[0] in ("rotate", "turn"):
        return words[0] + words[2]
    return CATEGORIES[task]


def _choose(tasks: list[str], rng: np.random.Generator, *, lift: bool | None = None) -> str | None:
    """One of the possible tasks: kinds of tasks are equally likely, lifts and what uses a held block more so.

    `lift` asks for a lift (True) or for anything else (False) where there is a choice.
    """
    lifts = [task for task in tasks if task.startswith("lift")]
    rest = [task for task in tasks if task not in lifts]
    uses = [task for task in rest if task in NEEDS_BLOCK]
    if uses and rng.random() < USE_BLOCK_SHARE:
        rest, lifts = uses, []
    if lift is None:
        lift = rng.random() < LIFT_SHARE
    pool = (lifts or rest) if lift else (rest or lifts)
    if not pool:
        return None
    kind = rng.choice(sorted({_group(task) for task in pool}))
    return str(rng.choice([task for task in pool if _group(task) == kind]))


def _demonstrate(env: PlayTable, expert: Expert, task: str, rng: np.random.Generator, *, calm: bool) -> Segment | None:
    """The segment that the oracle accepted, or None."""
    sigma = float(rng.choice(SIGMAS))
    overrun = int(rng.integers(*OVERRUN_STEPS)) if rng.random() < OVERRUN_SHARE else 0
    expert.reset(task)
    if not calm and _displace(env, expert, rng, task):
        expert.reset(task)
    segment, start = Segment(task, env.instruction(task)), env.get_info()
    succeeded_at = None
    for step in range(LIMIT):
        observation = env.observe()
        action = expert.act()
        segment.add(observation, action)
        now, info = env.step(disturbed(action, rng, sigma, fast=expert.fast), render=False)
        segment.after = now["robot_obs"]
        if succeeded_at is None and env.succeeded(task, start, info):
            succeeded_at = step
        if succeeded_at is not None and step >= succeeded_at + overrun:
            return segment
    return None


def _displace(env: PlayTable, expert: Expert, rng: np.random.Generator, task: str) -> bool:
    """Perhaps bring the hand, unseen by the recording, to where the expert would not have gone by itself. Did it move?"""
    block = f"block_{task.split('_')[1]}" if task.startswith("lift") else None
    free = expert.held() is None
    if free and task in LIFTS_FROM_TABLE and rng.random() < HOVER_SHARE:
        _hover(env, expert, rng, block)
    elif free and task.startswith("move_slider") and rng.random() < WRONG_SIDE_SHARE:
        _send(env, expert, rng.uniform(*AT_HANDLE) + [expert.handle(), 0, 0], hand(tilt=CABINET_TILT), grip=-1)
    elif free and rng.random() < LOST_SHARE:
        _lose(env, expert, rng)
    elif rng.random() < BURST_SHARE:
        _burst(env, expert, rng, lift=block is not None)
    else:
        return False
    # a block that is held, or touched or falling before its lift begins, makes the task another one
    touched = block or (expert.held() if env.gripper_command < 0 else None)
    for _ in range(BACK_OFF_STEPS if touched else 0):
        contacts = expert.state.touching(touched)
        if contacts and "robot" not in contacts:
            break
        env.step(np.array([0, 0, 0.5, 0, 0, 0, 1.0]), render=False)
    return True


def _hover(env: PlayTable, expert: Expert, rng: np.random.Generator, block: str) -> None:
    """The open hand near the grasp of a block: beside its axis, turned a little, high or low."""
    position, euler = expert.state.block(block)[0], expert.hold(block)
    aside = rng.normal(0, HOVER_ASIDE, 2)
    fits = np.abs(aside).max() < FITS
    euler = euler + [0, 0, rng.uniform(-HOVER_TURN, HOVER_TURN)]
    _send(env, expert, position + [*aside, rng.uniform(*(HOVER_AROUND if fits else HOVER_ABOVE))], euler)


def _lose(env: PlayTable, expert: Expert, rng: np.random.Generator) -> None:
    """The hand anywhere over the table, as high as blocks below allow, and perhaps shut."""
    place = rng.uniform(*LOST_WITHIN)
    if any(np.linalg.norm(expert.state.block(name)[0][:2] - place[:2]) < BESIDE for name in expert.state.blocks):
        place[2] = max(place[2], OVER_BLOCKS)
    _send(env, expert, place, hand(FORWARD + rng.uniform(-LOST_TURN, LOST_TURN), rng.uniform(0, LOST_TILT)),
          grip=-1 if rng.random() < LOST_CLOSED_SHARE else 1)


def _send(env: PlayTable, expert: Expert, place: np.ndarray, euler: np.ndarray, grip: int = 1) -> None:
    """Over and down to a pose, unseen by the recording, or as far as nothing is in the way."""
    with suppress(Stuck):
        for action in expert.above(place[0], place[1], euler, grip=1):
            env.step(action, render=False)
        expert.grip = grip
        for action in expert.goto(place, euler, through=True, firm=True, timeout=40):
            env.step(action, render=False)


def _burst(env: PlayTable, expert: Expert, rng: np.random.Generator, *, lift: bool) -> None:
    """Some steps of the way, then a few into a random direction.

    The way ends where a fixture might begin to move, or at a block, before the hand closes: there it may miss.
    """
    for _ in range(int(rng.integers(*BURST_AFTER))):
        action = expert.act()
        if action[6] < env.gripper_command or not (expert.fast or lift):
            break
        env.step(action, render=False)
    shut = env.gripper_command > 0 and rng.random() < BURST_CLOSED_SHARE
    push = np.append(rng.uniform(-0.8, 0.8, 6) * [1, 1, 1, 0.3, 0.3, 0.3], -1.0 if shut else env.gripper_command)
    for _ in range(int(rng.integers(*BURST_STEPS))):
        env.step(push, render=False)
