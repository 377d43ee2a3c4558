"""The process that holds one simulator and rolls out sequences of sub-tasks in it (CALVIN's LH-MTLC protocol).

`simulators.SimulatorPool` starts it and talks to it through a pipe, in the terms of `messages`. A worker imports the
simulator and no models: torch would cost each worker half a gigabyte of memory and seconds at the start.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np
from hydra.utils import instantiate

from common.program import root_cause
from step3_defi.action_chunk import ActionChunkBroker, RolloutKey
from step3_defi.rollout.film import Film
from step3_defi.rollout.messages import (
    Branch,
    BranchResult,
    Chain,
    ChainResult,
    ErrorReport,
    Heartbeat,
    PlanRequest,
    SequencesAnswer,
    SequencesRequest,
    SimulatorReady,
)

if TYPE_CHECKING:  # envs.protocol is needed for annotations only
    from envs.protocol import Env

ACTION_DIM = 7
HEARTBEAT_STEPS = 100  # control steps between two heartbeats


class Controller(Protocol):
    """Chooses the actions of one chain."""

    def start_task(self, number: int, task: str) -> None:
        """Called when sub-task `number` of the chain begins."""

    def act(self) -> np.ndarray:
        """The next action, (7,)."""


class RandomController:
    """Uniform actions in [-1, 1]; the gripper is either open or closed."""

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
    """Asks the parent for a chunk of actions whenever the last one is used up. Pictures are rendered only then."""

    def __init__(self, env: Env, chain: Chain, connection: Connection):
        self.env, self.chain, self.connection = env, chain, connection
        self.broker = ActionChunkBroker(self._request_chunk)

    def start_task(self, number: int, task: str) -> None:
        self.number, self.plans = number, 0
        self.instruction = self.env.instruction(task)
        self.broker.reset()

    def act(self) -> np.ndarray:
        return self.broker.next_action()

    def _request_chunk(self) -> np.ndarray:
        key = RolloutKey(self.chain.seed, self.chain.index, self.number, self.plans)
        self.connection.send(PlanRequest(self.env.get_obs(), self.instruction, key))
        self.plans += 1
        return self.connection.recv()


class ClippedController:
    """Clips another controller's actions to [-1, 1] and counts the steps where that changed the action.

    It also sends the parent a Heartbeat every HEARTBEAT_STEPS steps.
    """

    def __init__(self, controller: Controller, connection: Connection):
        self.controller, self.connection = controller, connection
        self.steps = self.clipped = 0

    def start_task(self, number: int, task: str) -> None:
        self.controller.start_task(number, task)

    def act(self) -> np.ndarray:
        if self.steps % HEARTBEAT_STEPS == 0:
            self.connection.send(Heartbeat())
        chosen = self.controller.act()
        action = np.clip(chosen, -1, 1)
        self.steps += 1
        self.clipped += bool((action != chosen).any())
        return action


def run_chain(env: Env, chain: Chain, controller: Controller, film: Film | None = None) -> list[int | None]:
    """Carry out the sub-tasks one after the other, without a reset between them, up to the first that fails.

    Returns the steps to success of each sub-task that was tried, and None for one that was not done within the horizon.
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
    start_info = env.get_info()
    if film:
        film.start_task(f"{number + 1}/{len(chain.tasks)} {env.instruction(task)}")
    for step in range(1, chain.horizon + 1):
        _, info = env.step(controller.act(), render=False)
        done = env.check_success(task, start_info, info)
        if film and (done or step % chain.film_every == 0):
            film.add(env.get_obs()["rgb_obs"]["rgb_static"], done=done)
        if done:
            return step
    return None


def run_branch(env: Env, branch: Branch) -> BranchResult:
    """Return to the moment of a branch and continue from there.

    The moment is reached by carrying out its prefix actions from the initial state, so the simulator needs to be
    deterministic and need not save its state.
    """
    env.reset(branch.initial_state)
    for action in branch.prefix_actions:
        env.step(action, render=False)
    observation = env.get_obs()
    start = np.concatenate([observation["robot_obs"], observation["scene_obs"]])
    frames, actions = [observation["rgb_obs"]], []
    upcoming = _expert_actions(env, branch) if branch.override_actions is None else iter(branch.override_actions)
    for step in range(branch.continuation_steps):
        actions.append(next(upcoming))
        env.step(actions[-1], render=False)
        if (step + 1) % branch.frame_stride == 0:
            frames.append(env.get_obs()["rgb_obs"])
    return BranchResult(start, frames, np.stack(actions))


def _expert_actions(env: Env, branch: Branch) -> Iterator[np.ndarray]:
    expert = env.expert(seed=branch.seed)
    expert.reset(branch.task)
    while True:
        yield expert.act()


def handle_request(
    env: Env, request: SequencesRequest | Chain | Branch, connection: Connection
) -> SequencesAnswer | ChainResult | BranchResult:
    """Do what the parent asked and return the answer. A chain sends messages through `connection` meanwhile."""
    if isinstance(request, SequencesRequest):
        sequences = env.get_sequences(request.count, tasks=request.tasks, length=request.length, seed=request.seed)
        return SequencesAnswer(env.name, sequences)
    if isinstance(request, Branch):
        return run_branch(env, request)
    controllers = {
        "random": lambda: RandomController(request),
        "expert": lambda: ExpertController(env, request),
        "policy": lambda: PolicyController(env, request, connection),
    }
    film = Film() if request.film_every else None
    controller = ClippedController(controllers[request.controller](), connection)
    steps = run_chain(env, request, controller, film)
    return ChainResult(request.index, steps, controller.clipped, film.frames if film else None)


class ErrorReporter:
    """A context manager that sends the parent an ErrorReport where its body raises.

    Nothing is sent where the connection itself broke, because the parent is gone then.
    """

    def __init__(self, connection: Connection):
        self.connection = connection

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None or issubclass(kind, (EOFError, ConnectionError)):
            return True
        cause = root_cause(error)  # Hydra wraps the error that an environment's constructor raised
        where = trace
        while where.tb_next:
            where = where.tb_next
        code = where.tb_frame.f_code
        self.connection.send(ErrorReport(f"{type(cause).__name__}: {cause} ({code.co_name}, line {where.tb_lineno})"))
        return True


def serve(connection: Connection) -> None:
    """Make the simulator, report its versions, then answer requests until the parent closes the connection."""
    with ErrorReporter(connection):
        config = connection.recv()
        env = instantiate(config.env_config)
        try:
            if config.check_rendering:
                env.get_obs()
            connection.send(SimulatorReady(env.versions(), env.resolved_options()))
            while True:
                connection.send(handle_request(env, connection.recv(), connection))
        finally:
            env.close()


def main() -> None:
    """Serve the pipe whose file descriptor is the last argument."""
    # Ctrl-C reaches the parent as well, which then closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(Connection(int(sys.argv[-1])))
