"""The process that holds one simulator and rolls out chains of sub-tasks in it (DESIGN 6; CALVIN's LH-MTLC protocol).

`rollout.SimulatorPool` starts it and talks to it through a pipe; a worker imports the simulator and nothing of the models.

    parent -> worker   Setup, once; then Survey, Chain or Branch; actions (A, 7) after each "plan"
    worker -> parent   ("up", dict), once; then ("survey", dict) | ("plan", (observation, instruction)) | ("alive",
    None) | ("chain", dict)
                       | ("branch", dict); at any time ("error", str)
"""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from step3_defi.rollout.film import Film

if TYPE_CHECKING:  # a simulator needs no torch: half a gigabyte and seconds for each worker
    from envs.protocol import Env

ACTION_DIM = 7
HEARTBEAT_STEPS = 100  # control steps between two signs of life


@dataclass(frozen=True)
class SimulatorConfig:
    """Which simulator to make, as Hydra configures it."""

    env_config: dict[str, Any]
    pictures: bool  # draw one at once: a machine without GL should say so now


@dataclass(frozen=True)
class SequencesRequest:
    """Ask a worker what its world is and which chains it would be judged on."""

    count: int
    tasks: list[str] | None
    length: int
    seed: int


@dataclass(frozen=True)
class Chain:
    """One sequence to roll out. `agent` is "policy" (the parent plans), "random" or "expert"."""

    index: int
    initial_state: dict
    tasks: list[str]
    agent: str
    horizon: int
    seed: int
    slot: int = 0  # row of the batch that its plans are made in
    film_every: int = 0  # control steps between two frames of the film, 0 for none


@dataclass(frozen=True)
class Branch:
    """Go back to a moment of a sequence and see what follows: of the scripted expert on `task`, or of known actions."""

    index: int
    initial_state: dict
    task: str
    prefix_actions: np.ndarray  # (T, 7) actions from the initial state to the moment
    continuation_steps: int  # steps after it
    every: int  # of them between two pictures
    seed: int
    following: np.ndarray | None = None  # (ahead, 7) actions in the expert's place


class Controller(Protocol):
    """What carries out one chain: told of each sub-task, asked for each action."""

    def start_task(self, number: int, task: str) -> None: ...

    def act(self) -> np.ndarray: ...


class RandomController:
    """Uniform actions, the gripper open or closed."""

    def __init__(self, chain: Chain):
        self.rng = np.random.default_rng((chain.seed, chain.index))

    def start_task(self, number: int, task: str) -> None:
        pass

    def act(self) -> np.ndarray:
        action = self.rng.uniform(-1, 1, ACTION_DIM)
        action[-1] = np.where(action[-1] > 0, 1.0, -1.0)
        return action


class ExpertController:
    """The environment's own scripted expert, which needs no pictures."""

    def __init__(self, env: Env, chain: Chain):
        self.expert = env.expert(seed=int(np.random.SeedSequence((chain.seed, chain.index)).generate_state(1)[0]))

    def start_task(self, number: int, task: str) -> None:
        self.expert.reset(task)

    def act(self) -> np.ndarray:
        return self.expert.act()


class PolicyController:
    """Asks the parent for a chunk of actions whenever the last one is used up; only then pictures are rendered."""

    def __init__(self, env: Env, chain: Chain, connection: Connection):
        self.env, self.chain, self.connection = env, chain, connection
        self.queue: deque[np.ndarray] = deque()

    def start_task(self, number: int, task: str) -> None:
        self.number, self.plans = number, 0
        self.instruction = self.env.instruction(task)
        self.queue.clear()

    def act(self) -> np.ndarray:
        if not self.queue:
            key = (self.chain.seed, self.chain.index, self.number, self.plans)
            self.connection.send(("plan", ({**self.env.get_obs(), "rollout_key": key}, self.instruction)))
            self.queue.extend(self.connection.recv())
            self.plans += 1
        return self.queue.popleft()


class ClippedController:
    """A controller's actions as they are carried out: clipped to [-1, 1], and the steps counted where that changed
    one."""

    def __init__(self, controller: Controller, connection: Connection):
        self.controller, self.connection = controller, connection
        self.steps = self.clipped = 0

    def start_task(self, number: int, task: str) -> None:
        self.controller.start_task(number, task)

    def act(self) -> np.ndarray:
        if self.steps % HEARTBEAT_STEPS == 0:
            self.connection.send(("alive", None))
        meant = self.controller.act()
        action = np.clip(meant, -1, 1)
        self.steps += 1
        self.clipped += bool((action != meant).any())
        return action


def run_chain(env: Env, chain: Chain, controller: Controller, film: Film | None = None) -> list[int | None]:
    """Sub-tasks one after the other without a reset, to the first that is not done within the horizon.

    Returns the steps to success of each sub-task that was tried, None for the one that failed.
    """
    env.reset(chain.initial_state)
    steps: list[int | None] = []
    for number, task in enumerate(chain.tasks):
        steps.append(_run_task(env, chain, number, task, controller, film))
        if steps[-1] is None:
            break
    return steps


def _run_task(env: Env, chain: Chain, number: int, task: str, controller: Controller, film: Film | None) -> int | None:
    controller.start_task(number, task)
    start = env.get_info()
    if film:
        film.start_task(f"{number + 1}/{len(chain.tasks)} {env.instruction(task)}")
    for step in range(1, chain.horizon + 1):
        _, info = env.step(controller.act(), render=False)
        done = env.check_success(task, start, info)
        if film and (done or step % chain.film_every == 0):
            film.add(env.get_obs()["rgb_obs"]["rgb_static"], done=done)
        if done:
            return step
    return None


def run_branch(env: Env, branch: Branch) -> dict[str, Any]:
    """{"start": scene and robot vectors at the moment, "frames": pictures of all cameras there and every so many steps
    after, "actions": (ahead, 7)}.

    The past is carried out again from the initial state: that needs no more of a simulator than to repeat itself.
    """
    env.reset(branch.initial_state)
    for action in branch.prefix_actions:
        env.step(action, render=False)
    observation = env.get_obs()
    start = np.concatenate([observation["robot_obs"], observation["scene_obs"]])
    frames, actions = [observation["rgb_obs"]], []
    following = _expert_actions(env, branch) if branch.following is None else iter(branch.following)
    for step in range(branch.continuation_steps):
        actions.append(next(following))
        env.step(actions[-1], render=False)
        if (step + 1) % branch.every == 0:
            frames.append(env.get_obs()["rgb_obs"])
    return {"start": start, "frames": frames, "actions": np.stack(actions)}


def _expert_actions(env: Env, branch: Branch) -> Iterator[np.ndarray]:
    expert = env.expert(seed=branch.seed)
    expert.reset(branch.task)
    while True:
        yield expert.act()


def handle_request(
    env: Env, request: SequencesRequest | Chain | Branch, connection: Connection
) -> tuple[str, dict[str, Any]]:
    """Do what the parent asked and name the kind of the answer."""
    if isinstance(request, SequencesRequest):
        sequences = env.sequences(request.count, tasks=request.tasks, length=request.length, seed=request.seed)
        return "survey", {"world": env.name, "sequences": sequences}
    if isinstance(request, Branch):
        return "branch", run_branch(env, request)
    controllers = {
        "random": lambda: RandomController(request),
        "expert": lambda: ExpertController(env, request),
        "policy": lambda: PolicyController(env, request, connection),
    }
    film = Film() if request.film_every else None
    carried = ClippedController(controllers[request.agent](), connection)
    steps = run_chain(env, request, carried, film)
    return "chain", {
        "index": request.index,
        "steps_to_success": steps,
        "clipped": carried.clipped,
        "film": film.frames if film else None,
    }


class ErrorReporter:
    """Tells the parent in one line why this process ends; a parent that is gone needs no answer."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None or issubclass(kind, (EOFError, ConnectionError)):
            return True
        # hydra wraps what an environment's constructor raised
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        where = trace
        while where.tb_next:
            where = where.tb_next
        code = where.tb_frame.f_code
        self.connection.send(("error", f"{type(cause).__name__}: {cause} ({code.co_name}, line {where.tb_lineno})"))
        return True


def serve(connection: Connection) -> None:
    """Say what came up, then answer requests until the parent hangs up."""
    with ErrorReporter(connection):
        setup = connection.recv()
        env = instantiate(setup.env_config)
        try:
            if setup.pictures:
                env.get_obs()
            connection.send(("up", {"versions": env.versions(), "choices": env.resolved_options()}))
            while True:
                connection.send(handle_request(env, connection.recv(), connection))
        finally:
            env.close()


def main() -> None:
    """Serve the pipe whose file descriptor is the last argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the parent, which hangs up
    serve(Connection(int(sys.argv[-1])))
