"""Many simulators, one policy: workers hold environments, the parent plans for all of them in one batch (DESIGN 6).

What a row of a batch comes to depends on the batch's size and on the row's place in it, in the last bits. So the policy
is always called with `workers` observations, a chain's plans are always made in the same row (its slot), rows that
nobody needs are filled with copies, and all chains in progress wait for each other. With noise that depends on
obs["rollout_key"] = (seed, sequence, sub-task, plan) alone, a run that was killed and goes on equals an unbroken one, and so
does one whose simulators die: a new one takes the sequence up again from its start, once.
"""
from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any

import numpy as np

from common.contracts import ChunkPolicy
from step3_defi.worker import ACTION_DIM, Branch, Chain, Survey

LOG = logging.getLogger(__name__)
GRACE = 10  # seconds a worker gets to end on its own
START = 120  # seconds a simulator gets to its first word, where patience is shorter
ATTEMPTS = 2  # at a sequence, before it is given up
HOPELESS = 3  # sequences given up in a row: it is not them


class RolloutError(RuntimeError):
    """Sequences that could not be judged, or a policy whose actions cannot be carried out."""


class SimulatorError(RolloutError):
    """A simulator process that died, hung or reported an error."""


class Worker:
    """A simulator process as the parent sees it. `patience`: seconds without a word from it that count as hanging."""

    def __init__(self, number: int, env_config: dict[str, Any], patience: float):
        self.number, self.patience, self.started = number, patience, False
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

    def remaining(self) -> float:
        """Seconds until its silence counts as hanging."""
        return max(0.0, self.deadline - time.monotonic())

    def receive(self) -> tuple[str, Any]:
        """The next answer. Raises SimulatorError where the worker reports an error, died, or stays silent past its deadline."""
        if not self.connection.poll(self.remaining()):
            raise SimulatorError(f"{self._where()}: no sign of life; where its pace is more than {self.patience:g} s, raise patience=")
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise SimulatorError(f"{self._where()}: the process died (exit code {self._exit_code()})") from error
        if kind == "error":
            raise SimulatorError(f"{self._where()}: {content}")
        self.started = True
        self._wait_from_now()
        return kind, content

    def close(self) -> None:
        """Hang up; the worker frees its simulator and ends."""
        self.connection.close()
        if self._exit_code() is None:
            self.kill()

    def kill(self) -> None:
        """End a worker that answers to nothing else."""
        self.connection.close()
        self.process.kill()
        self.process.wait()

    def _send(self, message: Any) -> None:
        self._wait_from_now()
        with suppress(ConnectionError):  # a worker that is gone shows where it is listened to, and may have left word why
            self.connection.send(message)

    def _wait_from_now(self) -> None:
        self.deadline = time.monotonic() + (self.patience if self.started else max(self.patience, START))

    def _exit_code(self) -> int | None:
        try:
            return self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return None

    def _where(self) -> str:
        if isinstance(self.task, Chain):
            return f"simulator {self.number}, sequence {self.task.index} ({', '.join(self.task.tasks)})"
        if isinstance(self.task, Branch):
            return f"simulator {self.number}, sequence {self.task.index} ({self.task.task}, gone back to step {len(self.task.past)})"
        return f"simulator {self.number}"


class Simulators:
    """`count` processes with one environment each, made from a Hydra configuration inside them. A context manager.

    One that dies, reports an error or is silent for `patience` seconds is replaced.
    """

    def __init__(self, env_config: dict[str, Any], *, count: int, patience: float = 300):
        if count < 1:
            raise ValueError(f"workers={count}: at least one simulator is needed")
        self.env_config, self.patience = env_config, patience
        self.workers = [Worker(number, env_config, patience) for number in range(count)]

    def __enter__(self) -> Simulators:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.close()

    def survey(self, request: Survey) -> dict[str, Any]:
        """{"world": name, "versions": {...}, "sequences": [(initial state, tasks), ...]} of these environments. SimulatorError: twice in vain."""
        self.workers[0].give(request)
        try:
            return self.workers[0].receive()[1]
        except SimulatorError as error:
            LOG.warning("%s; a new simulator is asked", error)
        self._replace(self.workers[0]).give(request)
        return self.workers[0].receive()[1]

    def branch(self, requests: Sequence[Branch]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(position of the request, what follows its moment) as they get done. Raises SimulatorError naming the sequence."""
        waiting, free = deque(enumerate(requests)), list(self.workers)
        busy: dict[Worker, int] = {}
        while waiting or busy:
            while waiting and free:
                worker = free.pop()
                busy[worker], request = waiting.popleft()
                worker.give(request)
            for worker in _speaking(list(busy)):
                content = worker.receive()[1]
                free.append(worker)
                yield busy.pop(worker), content

    def rollout(self, chains: list[Chain], policy: ChunkPolicy | None = None) -> Iterator[dict[str, Any]]:
        """Hand chains to workers as they get free; yields {"index", "steps_to_success", "clipped", "film"} as chains end.

        Chains of the agent "policy" need `policy`. A chain whose simulator fails is tried again from its start, in its slot; one that fails
        twice comes as {"index", "failure": why}. Raises RolloutError where that happens to HOPELESS chains in a row.
        """
        waiting, failures = Waiting(chains), Failures()
        busy = {worker.connection: worker for worker in self.workers[:len(chains)]}
        asking: dict[Connection, tuple[dict, str]] = {}
        for slot, worker in enumerate(busy.values()):
            worker.give(waiting.pop(slot))
        while busy:
            for worker in _speaking([worker for connection, worker in busy.items() if connection not in asking]):
                chain = worker.task
                try:
                    kind, content = worker.receive()
                except SimulatorError as error:
                    del busy[worker.connection]
                    worker = self._replace(worker)
                    busy[worker.connection] = worker
                    if failures.again(chain, error):
                        worker.give(chain)
                        continue
                    kind, content = "chain", {"index": chain.index, "failure": str(error)}
                if kind == "plan":
                    asking[worker.connection] = content
                elif kind == "chain":
                    yield content
                    failures.judged(content)
                    if waiting:
                        worker.give(waiting.pop(chain.slot))
                    else:
                        del busy[worker.connection]
            if asking and len(asking) == len(busy):
                for group in in_slots({connection: busy[connection].task.slot for connection in asking}):
                    plans = plan(policy, {slot: asking[c] for slot, c in group.items()}, size=len(self.workers))
                    for slot, connection in group.items():
                        busy[connection].steer(plans[slot])
                asking.clear()

    def _replace(self, worker: Worker) -> Worker:
        worker.kill()
        new = self.workers[worker.number] = Worker(worker.number, self.env_config, self.patience)
        return new


def _speaking(workers: list[Worker]) -> list[Worker]:
    """Waits until some worker has something to say, or has been silent for too long; these workers."""
    ready = wait([worker.connection for worker in workers], min((worker.remaining() for worker in workers), default=0))
    return [worker for worker in workers if worker.connection in ready or not worker.remaining()]


class Failures:
    """Which sequences simulators failed in, and how many were given up since one was judged."""

    def __init__(self) -> None:
        self.attempts: Counter[int] = Counter()
        self.given_up = 0

    def again(self, chain: Chain, error: SimulatorError) -> bool:
        """Whether the chain is to be tried once more."""
        self.attempts[chain.index] += 1
        last = self.attempts[chain.index] == ATTEMPTS
        LOG.warning("%s; a new simulator %s", error, "goes on without the sequence" if last else "tries the sequence again")
        return not last

    def judged(self, result: dict[str, Any]) -> None:
        """Told of every result. Raises RolloutError where simulators keep failing."""
        self.given_up = self.given_up + 1 if "failure" in result else 0
        if self.given_up == HOPELESS:
            raise RolloutError(f"{HOPELESS} sequences in a row failed twice, the last: {result['failure']}; finished sequences are in the journal, "
                               "the same command goes on from there")


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
