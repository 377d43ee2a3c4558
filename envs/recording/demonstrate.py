"""One chain of scripted demonstrations: tasks in a row without a reset, so that they start where chains arrive (DESIGN
7).

A *segment* is what one sentence describes. Labels are the expert's clean commands; what is executed carries noise.
The shares follow a first policy's lessons (starting anywhere in a chain matters most; lifts are what needs eyes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from envs.calvin.env import TabletopEnv
from envs.expert.expert import ScriptedExpert, add_action_noise
from envs.playtable.env import PlayTableState
from envs.recording.displacement import displace
from envs.recording.starts import feasible_tasks, sample_env_state
from envs.sequences import INITIAL_STATES, TASK_CATEGORIES, get_env_state_for_initial_condition
from envs.tasks import HELD_BLOCK_TASKS, TABLE_LIFT_TASKS

NOISE_SIGMAS = (0.0, 0.1, 0.25)
CHAIN_LENGTH_PROBS = (
    0.55,
    0.15,
    0.08,
    0.07,
    0.15,
)  # of chains with 1..5 segments: half of all segments start from neutral
CHAINS_PER_START = 2  # chains begin alike; where both are one lift, the sentence alone tells them apart
TWO_BLOCKS_PROB = 0.75  # of single lifts begin with two blocks on the table
LIFT_LAST_PROB = 0.65  # of chains are fixtures and then a lift, where no task takes a lifted block further
LIFT_PROB = 0.3  # of the other choices where a lift is possible; a third of all with the one above
USE_BLOCK_PROB = 0.75  # of the choices that have a block in the hand and a task for it
UNDISTURBED_PROB = 0.55  # of single lifts begin undisturbed: there the sentence must choose
OVERRUN_PROB = 0.35  # of segments run on past success
OVERRUN_STEPS = (5, 11)
SCATTERED_PROB = 0.1  # of chains start from blocks anywhere on the scene's surfaces
POSITION_JITTER, YAW_JITTER = 0.01, 0.15  # m and rad, of blocks on the table in the others
HORIZON = 240  # steps in which a demonstration must succeed
MIN_FRAMES = 12  # frames; less holds no chunk of actions


@dataclass
class Segment:
    """Frames of one annotated sub-task; every list has one entry a frame."""

    task: str
    instruction: str
    rgb_static: list[np.ndarray] = field(default_factory=list)
    rgb_gripper: list[np.ndarray] = field(default_factory=list)
    robot_obs: list[np.ndarray] = field(default_factory=list)
    scene_obs: list[np.ndarray] = field(default_factory=list)
    rel_actions: list[np.ndarray] = field(default_factory=list)
    final_robot_obs: np.ndarray | None = None  # robot_obs (15,) behind the last frame

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
        poses = np.array([*self.robot_obs[1:], self.final_robot_obs])[:, :6]
        return np.concatenate([poses, np.array(self.rel_actions)[:, 6:]], axis=1)


def demonstrate_chain(
    env: TabletopEnv, tasks: Sequence[str], longest: int, *, seed: int, number: int
) -> tuple[list[Segment], int]:
    """Chain `number` of a recording in the scene of `env`: a function of these alone. TWINS in a row begin alike.

    A hand's chains are others than the robot's of the same seed, for nobody films a person repeating a robot's motions.
    """
    is_human = getattr(env, "embodiment", "robot") == "hand"
    key = (seed, "ABCD".index(env.scene.name) + len("ABCD") * is_human)
    return demonstrate(
        env,
        tasks,
        longest,
        np.random.default_rng((*key, number)),
        start_rng=np.random.default_rng((*key, number // CHAINS_PER_START, CHAINS_PER_START)),
        lift_index=number % CHAINS_PER_START,
    )


def demonstrate(
    env: TabletopEnv,
    tasks: Sequence[str],
    longest: int,
    rng: np.random.Generator,
    *,
    start_rng: np.random.Generator | None = None,
    lift_index: int = 0,
) -> tuple[list[Segment], int]:
    """Demonstrated segments, at most `longest`, and the number of attempts that failed. `env` is reset first.

    `start_rng` draws how the chain begins and of what kind it is (`rng`), `lift_index` which of the possible lifts a single lift
    is.
    """
    start_rng = start_rng or rng
    shares = np.array(CHAIN_LENGTH_PROBS[:longest]) / sum(CHAIN_LENGTH_PROBS[:longest])
    length = 1 + int(start_rng.choice(len(shares), p=shares))
    lift_last = start_rng.random() < LIFT_LAST_PROB and not set(tasks) & set(HELD_BLOCK_TASKS)
    single_lift = lift_last and length == 1
    _reset_env(env, tasks, start_rng, two_blocks=single_lift and start_rng.random() < TWO_BLOCKS_PROB)
    state, failed, segments = PlayTableState(env), 0, []
    expert = env.expert(seed=int(rng.integers(2**31)))
    task = None
    for place in range(length):
        lift = place == length - 1 if lift_last else None
        choices = [name for name in feasible_tasks(state) if name in tasks and name != task]
        lifts = [name for name in choices if name in TABLE_LIFT_TASKS]
        task = lifts[lift_index % len(lifts)] if single_lift and lifts else _sample_task(choices, rng, lift=lift)
        if task is None:
            break
        segment = _demonstrate_task(env, expert, task, rng, undisturbed=single_lift and rng.random() < UNDISTURBED_PROB)
        if segment is None:
            failed += 1
        elif len(segment) >= MIN_FRAMES:
            segments.append(segment)
    return segments, failed


def _reset_env(env: TabletopEnv, tasks: Sequence[str], rng: np.random.Generator, *, two_blocks: bool) -> None:
    """The neutral pose, with blocks and fixtures as an evaluation has them (a little shifted) or anywhere."""
    if rng.random() < SCATTERED_PROB:
        start = sample_env_state(str(rng.choice(tasks)), env.scene, rng)
        env.reset(robot_obs=start.robot_obs, scene_obs=start.scene_obs)
        return
    states = [state for state in INITIAL_STATES if not two_blocks or list(state.values()).count("table") == 2]
    robot_obs, scene_obs = get_env_state_for_initial_condition(states[rng.integers(len(states))], env.scene)
    blocks = scene_obs[6:].reshape(3, 6)
    on_table = blocks[:, 1] < 0
    blocks[on_table, :2] += rng.uniform(-POSITION_JITTER, POSITION_JITTER, (int(on_table.sum()), 2))
    blocks[on_table, 5] += rng.uniform(-YAW_JITTER, YAW_JITTER, int(on_table.sum()))
    env.reset(robot_obs=robot_obs, scene_obs=np.concatenate([scene_obs[:6], blocks.ravel()]))


def _sampling_group(task: str) -> str:
    words = task.split("_")
    if words[0] in ("rotate", "turn"):
        return words[0] + words[2]
    return TASK_CATEGORIES[task]


def _sample_task(tasks: list[str], rng: np.random.Generator, *, lift: bool | None = None) -> str | None:
    """One of the possible tasks: kinds of tasks are equally likely, lifts and what uses a held block more so.

    `lift` asks for a lift (True) or for anything else (False) where there is a choice.
    """
    lifts = [task for task in tasks if task.startswith("lift")]
    rest = [task for task in tasks if task not in lifts]
    uses = [task for task in rest if task in HELD_BLOCK_TASKS]
    if uses and rng.random() < USE_BLOCK_PROB:
        rest, lifts = uses, []
    if lift is None:
        lift = rng.random() < LIFT_PROB
    pool = (lifts or rest) if lift else (rest or lifts)
    if not pool:
        return None
    kind = rng.choice(sorted({_sampling_group(task) for task in pool}))
    return str(rng.choice([task for task in pool if _sampling_group(task) == kind]))


def _demonstrate_task(
    env: TabletopEnv, expert: ScriptedExpert, task: str, rng: np.random.Generator, *, undisturbed: bool
) -> Segment | None:
    """The segment that the oracle accepted, or None."""
    sigma = float(rng.choice(NOISE_SIGMAS))
    overrun = int(rng.integers(*OVERRUN_STEPS)) if rng.random() < OVERRUN_PROB else 0
    expert.reset(task)
    if not undisturbed and displace(env, expert, rng, task):
        expert.reset(task)
    segment, start = Segment(task, env.instruction(task)), env.get_info()
    succeeded_at = None
    for step in range(HORIZON):
        observation = env.get_obs()
        action = expert.act()
        segment.add(observation, action)
        now, info = env.step(add_action_noise(action, rng, sigma, noise_allowed=expert.noise_allowed), render=False)
        segment.final_robot_obs = now["robot_obs"]
        if succeeded_at is None and env.check_success(task, start, info):
            succeeded_at = step
        if succeeded_at is not None and step >= succeeded_at + overrun:
            return segment
    return None
