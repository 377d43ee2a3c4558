"""Displace the hand before a demonstration starts, without recording it.

A policy arrives at states that the expert never reaches by itself: beside the block that it is to grasp, on the wrong
side of a handle, or anywhere over the table after the previous task. Only demonstrations that start there show how to
continue.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from envs.calvin.env import TabletopEnv
from envs.expert.expert import CABINET_TILT, ScriptedExpert, block_of
from envs.expert.motions import ACROSS_TOLERANCE, FORWARD, MotionBlocked, gripper_euler
from envs.tasks import TABLE_LIFT_TASKS

HOVER_PROB = 0.2  # of lifts from the table start with the open gripper near the block, as after a missed grasp
WRONG_SIDE_PROB = (
    0.25  # of moves of the slider start with the closed gripper beside its handle, often on the wrong side
)
RANDOM_POSE_PROB = 0.35  # of the others start with the empty gripper anywhere over the table
RANDOM_POSE_CLOSED_PROB = 0.6  # of random poses have a closed gripper, as after a task with a fixture
PERTURB_PROB = 0.4  # of the rest start after an unrecorded push
PERTURB_AFTER, PERTURB_STEPS = (0, 45), (3, 11)  # steps of the expert before the push, and steps of the push
PERTURB_CLOSED_PROB = 0.3  # of pushes close an open gripper, as in a missed grasp
HOVER_ASIDE, HOVER_TURN = 0.025, 0.35  # m (standard deviation) and rad (at most) from the grasp
HOVER_ABOVE = (0.035, 0.13)  # m above the middle of the block, where the fingers would otherwise touch it
HOVER_AROUND = (-0.004, 0.13)  # m above the middle of the block, where the fingers fit around it
HANDLE_BOUNDS = (-0.12, -0.07, 0.48), (0.12, 0.0, 0.56)  # m, x from the handle of the slider
RANDOM_POSE_BOUNDS = (-0.38, -0.35, 0.47), (0.38, -0.02, 0.68)  # m
RANDOM_POSE_YAW, RANDOM_POSE_TILT = 0.7, 0.4  # rad, at most
BLOCK_RADIUS, ABOVE_BLOCKS_Z = 0.1, 0.54  # m; a random pose nearer to a block than the first is above the second
BACK_OFF_STEPS = 15  # steps upwards, at most, to get away from a block


def displace(env: TabletopEnv, expert: ScriptedExpert, rng: np.random.Generator, task: str) -> bool:
    """Draw whether and how to displace the hand before `task`, and do it. Returns whether it was displaced.

    The expert has to be reset afterwards.
    """
    block = block_of(task) if task.startswith("lift") else None
    free = expert.held_block() is None
    if free and task in TABLE_LIFT_TASKS and rng.random() < HOVER_PROB:
        _hover_near_block(env, expert, rng, block)
    elif free and task.startswith("move_slider") and rng.random() < WRONG_SIDE_PROB:
        _move_gripper(
            env,
            expert,
            rng.uniform(*HANDLE_BOUNDS) + [expert.handle_x(), 0, 0],
            gripper_euler(tilt=CABINET_TILT),
            gripper_action=-1,
        )
    elif free and rng.random() < RANDOM_POSE_PROB:
        _move_to_random_pose(env, expert, rng)
    elif rng.random() < PERTURB_PROB:
        _perturb(env, expert, rng, lift=block is not None)
    else:
        return False
    # A block that the closing gripper took by chance, or that is touched or falls before its lift starts, would change
    # the task. The hand moves up until the block rests on something and is not touched.
    touched = block or (expert.held_block() if free else None)
    for _ in range(BACK_OFF_STEPS if touched else 0):
        contacts = expert.state.get_contacts(touched)
        if contacts and "robot" not in contacts:
            break
        env.step(np.array([0, 0, 0.5, 0, 0, 0, 1.0]), render=False)
    return True


def _hover_near_block(env: TabletopEnv, expert: ScriptedExpert, rng: np.random.Generator, block: str) -> None:
    """Move the open gripper near the grasp of a block: beside its axis, slightly rotated, above or around the block."""
    position, euler = expert.state.block_pose(block)[0], expert.grasp_euler(block)
    aside = rng.normal(0, HOVER_ASIDE, 2)
    fits = np.abs(aside).max() < ACROSS_TOLERANCE
    euler = euler + [0, 0, rng.uniform(-HOVER_TURN, HOVER_TURN)]
    _move_gripper(env, expert, position + [*aside, rng.uniform(*(HOVER_AROUND if fits else HOVER_ABOVE))], euler)


def _move_to_random_pose(env: TabletopEnv, expert: ScriptedExpert, rng: np.random.Generator) -> None:
    """Move the hand to a random pose over the table, above nearby blocks, with an open or a closed gripper."""
    place = rng.uniform(*RANDOM_POSE_BOUNDS)
    if any(
        np.linalg.norm(expert.state.block_pose(name)[0][:2] - place[:2]) < BLOCK_RADIUS for name in expert.state.blocks
    ):
        place[2] = max(place[2], ABOVE_BLOCKS_Z)
    _move_gripper(
        env,
        expert,
        place,
        gripper_euler(FORWARD + rng.uniform(-RANDOM_POSE_YAW, RANDOM_POSE_YAW), rng.uniform(0, RANDOM_POSE_TILT)),
        gripper_action=-1 if rng.random() < RANDOM_POSE_CLOSED_PROB else 1,
    )


def _move_gripper(
    env: TabletopEnv, expert: ScriptedExpert, place: np.ndarray, euler: np.ndarray, gripper_action: int = 1
) -> None:
    """Move the hand above a pose and down to it, until something is in the way."""
    with suppress(MotionBlocked):
        for action in expert.move_above(place[0], place[1], euler, gripper_action=1):
            env.step(action, render=False)
        expert.gripper_action = gripper_action
        for action in expert.move_to(place, euler, no_stop=True, push_on=True, max_steps=40):
            env.step(action, render=False)


def _perturb(env: TabletopEnv, expert: ScriptedExpert, rng: np.random.Generator, *, lift: bool) -> None:
    """Let the expert act for some steps, then move in a random direction for a few.

    The expert is stopped before it closes the gripper, and before it can move a fixture.
    """
    for _ in range(int(rng.integers(*PERTURB_AFTER))):
        action = expert.act()
        if action[6] < env.gripper_action or not (expert.noise_allowed or lift):
            break
        env.step(action, render=False)
    close = env.gripper_action > 0 and rng.random() < PERTURB_CLOSED_PROB
    push = np.append(rng.uniform(-0.8, 0.8, 6) * [1, 1, 1, 0.3, 0.3, 0.3], -1.0 if close else env.gripper_action)
    for _ in range(int(rng.integers(*PERTURB_STEPS))):
        env.step(push, render=False)
