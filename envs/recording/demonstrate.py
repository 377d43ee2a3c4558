"""Demonstrate one chain of tasks: in a row without a reset, so that a task starts where a rollout would arrive at it.

A *segment* is the part that one sentence describes. The recorded actions are the clean actions of the expert; the
executed ones contain noise. The probabilities below follow what a first policy got wrong. It had to be trained on tasks
that start anywhere in a chain, and on lifts, where only the images tell where the block is.
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

NOISE_SIGMAS = (0.0, 0.1, 0.25)  # of the noise on executed actions; each segment draws one
# Probabilities of chains with 1 to 5 segments. About half of all segments then start from the neutral pose.
CHAIN_LENGTH_PROBS = (0.55, 0.15, 0.08, 0.07, 0.15)
CHAINS_PER_START = 2  # consecutive chains share their start; where both are a single lift, only the sentences differ
TWO_BLOCKS_PROB = 0.75  # of single lifts start with two blocks on the table
LIFT_LAST_PROB = 0.65  # of chains consist of fixtures and a lift at the end, unless a task needs a held block
LIFT_PROB = 0.3  # of the other choices are a lift, if one is possible; with the line above, a third of all segments
USE_BLOCK_PROB = 0.75  # of the choices with a block in the gripper are a task that needs it
UNDISTURBED_PROB = 0.55  # of single lifts start without displacement, so that only the sentence tells which block
OVERRUN_PROB = 0.35  # of segments continue after success
OVERRUN_STEPS = (5, 11)  # steps after success, drawn from this range
SCATTERED_PROB = 0.1  # of chains start with blocks anywhere on the surfaces of the scene
POSITION_JITTER, YAW_JITTER = 0.01, 0.15  # m and rad, of the blocks on the table at the start of all other chains
HORIZON = 240  # steps within which a demonstration has to succeed
MIN_FRAMES = 12  # shorter segments are dropped, because they hold no full chunk of actions


@dataclass
class Segment:
    """The frames of one task with its sentence. Every list has one entry per frame."""

    task: str
    instruction: str
    rgb_static: list[np.ndarray] = field(default_factory=list)
    rgb_gripper: list[np.ndarray] = field(default_factory=list)
    robot_obs: list[np.ndarray] = field(default_factory=list)
    scene_obs: list[np.ndarray] = field(default_factory=list)
    rel_actions: list[np.ndarray] = field(default_factory=list)
    final_robot_obs: np.ndarray | None = None  # robot_obs (15,) after the last action

    def __len__(self) -> int:
        return len(self.rel_actions)

    def add(self, observation: dict, action: np.ndarray) -> None:
        """Append a frame: an observation and the clean action (7,) that the expert chose for it."""
        self.rgb_static.append(observation["rgb_obs"]["rgb_static"])
        self.rgb_gripper.append(observation["rgb_obs"]["rgb_gripper"])
        self.robot_obs.append(observation["robot_obs"])
        self.scene_obs.append(observation["scene_obs"])
        self.rel_actions.append(action)

    def absolute_actions(self) -> np.ndarray:
        """CALVIN's "actions" (T, 7): the pose of the tool in the following frame, and the gripper command."""
        poses = np.array([*self.robot_obs[1:], self.final_robot_obs])[:, :6]
        return np.concatenate([poses, np.array(self.rel_actions)[:, 6:]], axis=1)


def demonstrate_chain(
    env: TabletopEnv, tasks: Sequence[str], longest: int, *, seed: int, number: int
) -> tuple[list[Segment], int]:
    """Demonstrate chain `number` of a recording in the scene of `env`; see `demonstrate` for what is returned.

    The result depends on scene, embodiment, tasks, longest, seed and number alone. CHAINS_PER_START consecutive chains
    have the same start. A person's hand gets other chains than the robot, as no person repeats a robot's motions.
    """
    is_human = env.embodiment == "hand"
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
    """Reset `env`, demonstrate a chain and return (its segments, at most `longest`; number of failed attempts).

    start_rng: draws the initial state and the kind of the chain, `rng` if None. lift_index: which of the possible lifts
    is demonstrated, if the chain is a single lift.
    """
    start_rng = start_rng or rng
    probs = np.array(CHAIN_LENGTH_PROBS[:longest]) / sum(CHAIN_LENGTH_PROBS[:longest])
    length = 1 + int(start_rng.choice(len(probs), p=probs))
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
    """Reset to the neutral pose, with blocks and fixtures as an evaluation starts (with jitter) or anywhere."""
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
    """Draw one of the possible tasks, or None if there is none. Groups of similar tasks are equally likely.

    lift: prefer a lift (True) or any other task (False); None draws between them with LIFT_PROB. A task that needs the
    held block is preferred with USE_BLOCK_PROB.
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
    """Demonstrate a task and return its segment, or None if it does not succeed within HORIZON steps."""
    sigma = float(rng.choice(NOISE_SIGMAS))
    overrun = int(rng.integers(*OVERRUN_STEPS)) if rng.random() < OVERRUN_PROB else 0
    expert.reset(task)
    if not undisturbed and displace(env, expert, rng, task):
        expert.reset(task)
    segment, start_info = Segment(task, env.instruction(task)), env.get_info()
    succeeded_at = None
    for step in range(HORIZON):
        observation = env.get_obs()
        action = expert.act()
        segment.add(observation, action)
        executed, end_info = env.step(
            add_action_noise(action, rng, sigma, noise_allowed=expert.noise_allowed), render=False
        )
        segment.final_robot_obs = executed["robot_obs"]
        if succeeded_at is None and env.check_success(task, start_info, end_info):
            succeeded_at = step
        if succeeded_at is not None and step >= succeeded_at + overrun:
            return segment
    return None
