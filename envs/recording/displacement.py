"""Where a demonstration begins: the hand brought off its course, unseen by the recording (DESIGN 7).

A policy ends up where no expert goes by itself: beside the block that it closes on, at the wrong side of a handle,
anywhere
over the table after a task. Only demonstrations that begin there show it the way back.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from envs.calvin.env import TabletopEnv
from envs.expert.expert import CABINET_TILT, ScriptedExpert, block_of
from envs.expert.motions import ACROSS_TOLERANCE, FORWARD, MotionBlocked, gripper_euler
from envs.tasks import TABLE_LIFT_TASKS

# of lifts from the table begin with the open hand near the block, where a policy finds that it came down beside it
HOVER_PROB = 0.2
WRONG_SIDE_PROB = (
    0.25  # of the door's moves begin with the shut hand low beside its handle, as often as not where it cannot push
)
RANDOM_POSE_PROB = 0.35  # of the others begin with the empty hand anywhere over the table
RANDOM_POSE_CLOSED_PROB = 0.6  # of lost hands are shut, as fixtures leave them
PERTURB_PROB = 0.4  # of the rest begin behind an unrecorded push off their course
PERTURB_AFTER, PERTURB_STEPS = (0, 45), (3, 11)
PERTURB_CLOSED_PROB = 0.3  # of pushes shut an open hand: a grasp that missed
HOVER_ASIDE, HOVER_TURN = 0.025, 0.35  # m (deviation) and rad
HOVER_ABOVE, HOVER_AROUND = (
    (0.035, 0.13),
    (-0.004, 0.13),
)  # m above a block's middle, where fingers would meet it and where they fit around it
HANDLE_BOUNDS = (-0.12, -0.07, 0.48), (0.12, 0.0, 0.56)  # m, x from the handle
RANDOM_POSE_BOUNDS = (-0.38, -0.35, 0.47), (0.38, -0.02, 0.68)  # m
RANDOM_POSE_YAW, RANDOM_POSE_TILT = 0.7, 0.4  # rad
BLOCK_RADIUS, ABOVE_BLOCKS_Z = 0.1, 0.54  # m, an open hand within the first of a block stays above the second
BACK_OFF_STEPS = 15


def displace(env: TabletopEnv, expert: ScriptedExpert, rng: np.random.Generator, task: str) -> bool:
    """Perhaps bring the hand, unseen by the recording, to where the expert would not have gone by itself. Did it
    move?"""
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
    # a block that a shut hand took by chance, or that is touched or falling before its lift begins, makes the task
    # another one
    touched = block or (expert.held_block() if free else None)
    for _ in range(BACK_OFF_STEPS if touched else 0):
        contacts = expert.state.get_contacts(touched)
        if contacts and "robot" not in contacts:
            break
        env.step(np.array([0, 0, 0.5, 0, 0, 0, 1.0]), render=False)
    return True


def _hover_near_block(env: TabletopEnv, expert: ScriptedExpert, rng: np.random.Generator, block: str) -> None:
    """The open hand near the grasp of a block: beside its axis, turned a little, high or low."""
    position, euler = expert.state.block_pose(block)[0], expert.grasp_euler(block)
    aside = rng.normal(0, HOVER_ASIDE, 2)
    fits = np.abs(aside).max() < ACROSS_TOLERANCE
    euler = euler + [0, 0, rng.uniform(-HOVER_TURN, HOVER_TURN)]
    _move_gripper(env, expert, position + [*aside, rng.uniform(*(HOVER_AROUND if fits else HOVER_ABOVE))], euler)


def _move_to_random_pose(env: TabletopEnv, expert: ScriptedExpert, rng: np.random.Generator) -> None:
    """The hand anywhere over the table, as high as blocks below allow, and perhaps shut."""
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
    """Over and down to a pose, unseen by the recording, or as far as nothing is in the way."""
    with suppress(MotionBlocked):
        for action in expert.move_above(place[0], place[1], euler, gripper_action=1):
            env.step(action, render=False)
        expert.gripper_action = gripper_action
        for action in expert.move_to(place, euler, no_stop=True, push_on=True, max_steps=40):
            env.step(action, render=False)


def _perturb(env: TabletopEnv, expert: ScriptedExpert, rng: np.random.Generator, *, lift: bool) -> None:
    """Some steps of the way, then a few into a random direction.

    The way ends where a fixture might begin to move, or at a block, before the hand closes: there it may miss.
    """
    for _ in range(int(rng.integers(*PERTURB_AFTER))):
        action = expert.act()
        if action[6] < env.gripper_action or not (expert.noise_allowed or lift):
            break
        env.step(action, render=False)
    shut = env.gripper_action > 0 and rng.random() < PERTURB_CLOSED_PROB
    push = np.append(rng.uniform(-0.8, 0.8, 6) * [1, 1, 1, 0.3, 0.3, 0.3], -1.0 if shut else env.gripper_action)
    for _ in range(int(rng.integers(*PERTURB_STEPS))):
        env.step(push, render=False)
