"""One chain of scripted demonstrations: several tasks in a row without a reset, so that they start where chains arrive (DESIGN 7).

A *segment* is what one sentence describes. Labels are the expert's clean commands; what is executed carries noise.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from playtable.env import PlayTable
from playtable.expert import Expert, disturbed
from playtable.sequences import INITIAL_STATES, initial_state
from playtable.starts import possible
from playtable.state import PlayTableState

SIGMAS = (0.0, 0.1, 0.25)
BURST_SHARE = 0.3  # of segments are pushed away from their course once
BURST_STEPS = (4, 10)
OVERRUN_SHARE = 0.35  # of segments run on past success
OVERRUN_STEPS = (4, 9)
SCATTERED_SHARE = 0.3  # of chains start from blocks anywhere on the scene's surfaces
JITTER = 0.025  # m, of blocks on the table in the others
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

    def absolute_actions(self) -> np.ndarray:
        """(T, 7): the hand's pose of the following frame and the gripper command, CALVIN's "actions"."""
        poses = np.array([*self.robot_obs[1:], self.after])[:, :6]
        return np.concatenate([poses, np.array(self.rel_actions)[:, 6:]], axis=1)


def chain(env: PlayTable, tasks: Sequence[str], length: int, rng: np.random.Generator) -> tuple[list[Segment], int]:
    """Up to `length` demonstrated segments and the number of attempts that failed. `env` is reset first."""
    _start(env, rng)
    state, failed, segments = PlayTableState(env), 0, []
    expert = env.expert(seed=int(rng.integers(2**31)))
    last = None
    for _ in range(length):
        task = _choose([t for t in possible(state) if t in tasks and t != last], rng)
        if task is None:
            break
        segment = _demonstrate(env, expert, task, rng)
        last = task
        if segment is None:
            failed += 1
        elif len(segment) >= SHORTEST:
            segments.append(segment)
    return segments, failed


def _start(env: PlayTable, rng: np.random.Generator) -> None:
    if rng.random() < SCATTERED_SHARE:
        condition = INITIAL_STATES[rng.integers(len(INITIAL_STATES))]
        _, fixtures = initial_state(condition, env.scene)
        blocks = env.reset()["scene_obs"]
        env.reset(scene_obs=np.concatenate([fixtures[:6], blocks[6:]]))
        return
    robot_obs, scene_obs = initial_state(INITIAL_STATES[rng.integers(len(INITIAL_STATES))], env.scene)
    blocks = scene_obs[6:].reshape(3, 6)
    on_table = blocks[:, 1] < 0
    blocks[on_table, :2] += rng.uniform(-JITTER, JITTER, (int(on_table.sum()), 2))
    blocks[on_table, 5] += rng.uniform(-0.4, 0.4, int(on_table.sum()))
    env.reset(robot_obs=robot_obs, scene_obs=np.concatenate([scene_obs[:6], blocks.ravel()]))


def _choose(tasks: list[str], rng: np.random.Generator) -> str | None:
    """A third of what a chain does is lifting where that is possible: it is what needs eyes."""
    lifts = [task for task in tasks if task.startswith("lift")]
    rest = [task for task in tasks if not task.startswith("lift")]
    pool = lifts if lifts and (not rest or rng.random() < 1 / 3) else rest
    return str(pool[rng.integers(len(pool))]) if pool else None


def _demonstrate(env: PlayTable, expert: Expert, task: str, rng: np.random.Generator) -> Segment | None:
    """The segment that the oracle accepted, or None."""
    sigma = float(rng.choice(SIGMAS))
    burst_at = int(rng.integers(0, 25)) if rng.random() < BURST_SHARE else -1
    overrun = int(rng.integers(*OVERRUN_STEPS)) if rng.random() < OVERRUN_SHARE else 0
    segment, start = Segment(task, env.instruction(task)), env.get_info()
    expert.reset(task)
    left = None
    for step in range(LIMIT):
        if step == burst_at:
            _burst(env, rng)
            segment = Segment(task, env.instruction(task))  # what came before does not lead to what follows
            expert.reset(task)
        observation = env.observe()
        action = expert.act()
        segment.rgb_static.append(observation["rgb_obs"]["rgb_static"])
        segment.rgb_gripper.append(observation["rgb_obs"]["rgb_gripper"])
        segment.robot_obs.append(observation["robot_obs"])
        segment.scene_obs.append(observation["scene_obs"])
        segment.rel_actions.append(action)
        now, info = env.step(disturbed(action, rng, sigma, fast=expert.fast), render=False)
        segment.after = now["robot_obs"]
        if left is None and env.succeeded(task, start, info):
            left = overrun
        if left is not None:
            if left == 0:
                return segment
            left -= 1
    return None


def _burst(env: PlayTable, rng: np.random.Generator) -> None:
    """A few steps into a random direction, unseen by the recording; the gripper keeps what it does."""
    push = np.append(rng.uniform(-0.8, 0.8, 6) * [1, 1, 1, 0.3, 0.3, 0.3], env.gripper_command)
    for _ in range(int(rng.integers(*BURST_STEPS))):
        env.step(push, render=False)
