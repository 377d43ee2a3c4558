"""Many simulators, one policy: workers hold environments, the parent plans for all of them in one batch (DESIGN 6).

What a row of a batch comes to depends on the batch's size and on the row's place in it, in the last bits. So the policy
is always called with `workers` observations, a chain's plans are always made in the same row (its slot), rows that
nobody needs are filled with copies, and all chains in progress wait for each other. With noise that depends on
obs["rollout_key"] = (seed, sequence, sub-task, plan) alone, a run that was killed and goes on equals an unbroken one.
"""
from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any

import numpy as np

from common.contracts import ChunkPolicy
from step3_defi.worker import ACTION_DIM, Branch, Chain, Survey

PATIENCE = 10  # seconds a worker gets to end on its own


class RolloutError(RuntimeError):
    """A simulator process that failed, or a policy whose actions cannot be carried out."""


class Worker:
    """A simulator process as the parent sees it."""

    def __init__(self, number: int, env_config: dict[str, Any]):
        self.number = number
        self.task: Chain | Branch | Survey | None = None
        self.connection, theirs = Pipe()
        # One thread a simulator: the cores belong to the other workers and to the policy.
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        command = [sys.executable, "-c", "from step3_defi.worker import main; main()", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=settings, stdin=subprocess.DEVNULL)
        theirs.close()
        self._send(env_config)

    def give(self, task: Chain | Branch | Survey) -> None:
        """Hand out work."""
        self.task = task
        self._send(task)

    def steer(self, actions: np.ndarray) -> None:
        """Answer a "plan"."""
        self._send(actions)

    def receive(self) -> tuple[str, Any]:
        """The next answer. Raises RolloutError where the worker reports an error or died."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._died() from error
        if kind == "error":
            raise RolloutError(f"{self._where()}: {content}")
        return kind, content

    def close(self) -> None:
        """Hang up; the worker frees its simulator and ends."""
        self.connection.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except ConnectionError:
            # what it wrote before it ended says why
            kind, content = self.receive()
            raise RolloutError(f"{self._where()} ended early ({kind}: {content})") from None

    def _died(self) -> RolloutError:
        try:
            code: int | None = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        return RolloutError(f"{self._where()}: the process died (exit code {code}); finished sequences are in the journal, "
                            "the same command goes on from there")

    def _where(self) -> str:
        if isinstance(self.task, Chain):
            return f"simulator {self.number}, sequence {self.task.index} ({', '.join(self.task.tasks)})"
        if isinstance(self.task, Branch):
            return f"simulator {self.number}, sequence {self.task.index} ({self.task.task}, gone back to step {len(self.task.past)})"
        return f"simulator {self.number}"


class Simulators:
    """`count` processes with one environment each, made from a Hydra configuration inside them. A context manager."""

    def __init__(self, env_config: dict[str, Any], *, count: int):
        if count < 1:
            raise ValueError(f"workers={count}: at least one simulator is needed")
        self.workers: list[Worker] = []
        try:
            for number in range(count):
                self.workers.append(Worker(number, env_config))
        except RolloutError:
            self.close()
            raise

    def __enter__(self) -> Simulators:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.close()

    def survey(self, request: Survey) -> dict[str, Any]:
        """{"world": name, "versions": {...}, "sequences": [(initial state, tasks), ...]} of these environments."""
        self.workers[0].give(request)
        return self.workers[0].receive()[1]

    def branch(self, requests: Sequence[Branch]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(position of the request, what follows its moment) as they get done. Raises RolloutError naming the sequence."""
        waiting = deque(enumerate(requests))
        busy: dict[Connection, tuple[Worker, int]] = {}
        free = list(self.workers)
        while waiting or busy:
            while waiting and free:
                worker = free.pop()
                position, request = waiting.popleft()
                worker.give(request)
                busy[worker.connection] = (worker, position)
            for connection in wait(list(busy)):
                worker, position = busy.pop(connection)
                free.append(worker)
                yield position, worker.receive()[1]

    def rollout(self, chains: list[Chain], policy: ChunkPolicy | None = None) -> Iterator[dict[str, Any]]:
        """Hand chains to workers as they get free; yields {"index", "steps_to_success", "film"} as chains end.

        Chains of the agent "policy" need `policy`. Raises RolloutError naming the sequence that a worker failed in.
        """
        waiting = Waiting(chains)
        busy = {worker.connection: worker for worker in self.workers[:len(chains)]}
        asking: dict[Connection, tuple[dict, str]] = {}
        for slot, worker in enumerate(busy.values()):
            worker.give(waiting.pop(slot))
        while busy:
            for connection in wait([c for c in busy if c not in asking]):
                kind, content = busy[connection].receive()
                if kind == "plan":
                    asking[connection] = content
                    continue
                yield content
                if waiting:
                    busy[connection].give(waiting.pop(busy[connection].task.slot))
                else:
                    del busy[connection]
            if asking and len(asking) == len(busy):
                for group in in_slots({connection: busy[connection].task.slot for connection in asking}):
                    plans = plan(policy, {slot: asking[c] for slot, c in group.items()}, size=len(self.workers))
                    for slot, connection in group.items():
                        busy[connection].steer(plans[slot])
                asking.clear()


class Waiting:
    """Chains that nobody works on yet, by slot."""

    def __init__(self, chains: list[Chain]):
        self.queues: dict[int, deque[Chain]] = {}
        for chain in chains:
            self.queues.setdefault(chain.slot, deque()).append(chain)

    def __bool__(self) -> bool:
        return any(self.queues.values())

    def pop(self, slot: int) -> Chain:
        """The next chain of this slot, or where there is none of the slot with the most."""
        queue = self.queues.get(slot) or max(self.queues.values(), key=len)
        return queue.popleft()


def in_slots(slots: dict[Connection, int]) -> list[dict[int, Connection]]:
    """Who asks, and their slots -> groups in which every slot is taken once; towards the end, chains of a slot may meet."""
    groups: list[dict[int, Connection]] = []
    for connection, slot in slots.items():
        free = next((group for group in groups if slot not in group), None)
        if free is None:
            groups.append(free := {})
        free[slot] = connection
    return groups


def plan(policy: ChunkPolicy, requests: dict[int, tuple[dict, str]], *, size: int) -> dict[int, np.ndarray]:
    """Plan for requests by slot in one batch of `size` -> slot: (policy.execute, 7). Raises RolloutError."""
    filler = next(iter(requests.values()))
    observations, instructions = map(list, zip(*(requests.get(slot, filler) for slot in range(size))))
    actions = np.asarray(policy.plan(observations, instructions), dtype=np.float64)
    fits = actions.ndim == 3 and len(actions) == size and actions.shape[1] >= policy.execute and actions.shape[2] == ACTION_DIM
    if not fits:
        raise RolloutError(f"the policy planned actions of shape {actions.shape}; needed are ({size}, at least {policy.execute}, "
                           f"{ACTION_DIM}) for {size} simulators: check the policy's chunk length, execute and action width")
    if not np.isfinite(actions).all():
        bad = int(np.argwhere(~np.isfinite(actions).all((1, 2)))[0, 0])
        raise RolloutError(f"the policy planned actions that are not finite, for {instructions[bad]!r}: check its weights")
    return {slot: actions[slot, :policy.execute] for slot in requests}
