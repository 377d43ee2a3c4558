"""Many simulators and one policy: workers hold the environments, the parent plans for all of them in one batch.

Kernels of different batch sizes differ in their last bits, and so do the rows of one batch. Rollouts repeat exactly
nevertheless, because the policy is always called with one row for each worker, the plans of a sequence are always made
in the same row (its slot), rows that nobody needs are filled with copies, and a plan waits until every sequence in
progress needs one. The policy's noise depends on nothing but the RolloutKey. Hence a run that was killed and resumed
equals an uninterrupted one, and so does one whose simulators die: a new simulator starts the sequence again, once.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from common.contracts import ChunkPolicy
from common.errors import UserError
from step3_defi.rollout.handle import RolloutError, SimulatorError, SimulatorHandle
from step3_defi.rollout.messages import (
    Branch,
    BranchResult,
    Chain,
    ChainFailure,
    ChainResult,
    PlanRequest,
    SequencesAnswer,
    SequencesRequest,
    SimulatorConfig,
    SimulatorReady,
)
from step3_defi.rollout.worker import ACTION_DIM

LOG = logging.getLogger(__name__)
MAX_ATTEMPTS = 2  # at one sequence, before it is given up
MAX_CONSECUTIVE_FAILURES = 3  # so many sequences given up in a row mean that simulators fail whatever the sequence

Message = TypeVar("Message")


class SimulatorPool:
    """`count` processes with one environment each, made inside them from a Hydra configuration. A context manager.

    The first simulator starts before the others, which get the options that it chose by itself, for instance its
    renderer: simulators that look for a GPU at the same time may make different choices. `versions` holds the versions
    that all simulators share. A simulator that dies, reports an error or sends no message for `response_timeout`
    seconds is replaced. With `check_rendering` each simulator renders once when it starts.

    Raises UserError for a count below 1, and RolloutError where the first simulator does not start or a later one has
    other versions.
    """

    def __init__(
        self, env_config: dict[str, Any], *, count: int, response_timeout: float = 300, check_rendering: bool = False
    ):
        if count < 1:
            raise UserError(f"workers={count}: at least one simulator is needed")
        self.count, self.response_timeout = count, response_timeout
        self.config = SimulatorConfig(env_config, check_rendering)
        self.versions: dict[str, str] = {}
        self.workers: list[SimulatorHandle] = []

    def __enter__(self) -> SimulatorPool:
        self.workers = [SimulatorHandle(0, self.config, self.response_timeout)]
        try:
            first = self._ask(SimulatorReady)
        except RolloutError:
            self.close()
            raise
        self.versions = first.versions
        self.config = replace(self.config, env_config={**self.config.env_config, **first.resolved_options})
        self.workers += [SimulatorHandle(number, self.config, self.response_timeout) for number in range(1, self.count)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.close()

    def get_sequences(self, request: SequencesRequest) -> SequencesAnswer:
        """The name of the world and the sequences of an evaluation. Raises SimulatorError if the retry fails too."""
        return self._ask(SequencesAnswer, request)

    def _ask(self, answer: type[Message], request: SequencesRequest | None = None) -> Message:
        """The first simulator's next message of the type `answer`. The simulator is replaced once if it fails."""
        try:
            return self._wait_for(answer, request)
        except SimulatorError as error:
            LOG.warning("%s; trying again with a new simulator", error)
        self._replace(self.workers[0])
        return self._wait_for(answer, request)

    def _wait_for(self, answer: type[Message], request: SequencesRequest | None) -> Message:
        if request:
            self.workers[0].submit(request)
        while not isinstance(message := self._receive(self.workers[0]), answer):
            pass
        return message

    def _receive(self, worker: SimulatorHandle) -> Any:
        """A worker's next message. Raises RolloutError where it just started with other versions than the first."""
        message = worker.receive()
        if isinstance(message, SimulatorReady) and self.versions:
            check_same_versions({"the first simulator": self.versions, f"simulator {worker.number}": message.versions})
        return message

    def branch(self, requests: Sequence[Branch]) -> Iterator[tuple[int, BranchResult]]:
        """Carry out branches, in the order in which workers become free.

        Yields (position in `requests`, result) in the order in which they end. Raises SimulatorError, which names the
        sequence, where a simulator fails.
        """
        waiting, free = deque(enumerate(requests)), list(self.workers)
        busy: dict[SimulatorHandle, int] = {}
        while waiting or busy:
            while waiting and free:
                worker = free.pop()
                busy[worker], request = waiting.popleft()
                worker.submit(request)
            for worker in _ready_workers(list(busy)):
                message = self._receive(worker)
                if isinstance(message, BranchResult):
                    free.append(worker)
                    yield busy.pop(worker), message

    def rollout(
        self, chains: list[Chain], policy: ChunkPolicy | None = None, claim: Callable[[int], bool] | None = None
    ) -> Iterator[ChainResult | ChainFailure]:
        """Give chains to workers as they become free, and yield the results in the order in which they end.

        `policy` plans for the chains whose controller is "policy". Where several processes share the chains,
        `claim(index)` says whether this process may take a chain; those it may not take are skipped. A chain whose
        simulator fails is started again in its slot, and yields a ChainFailure if that fails too. Raises RolloutError
        where that happens to MAX_CONSECUTIVE_FAILURES chains in a row.
        """
        waiting, failures = ChainQueue(chains, claim), FailureCounter()
        busy: dict[Connection, SimulatorHandle] = {}
        plan_requests: dict[Connection, PlanRequest] = {}
        for slot, worker in enumerate(self.workers):
            if chain := waiting.pop(slot):
                busy[worker.connection] = worker
                worker.submit(chain)
        while busy:
            running = [worker for connection, worker in busy.items() if connection not in plan_requests]
            for worker in _ready_workers(running):
                chain = worker.task
                try:
                    message = self._receive(worker)
                except SimulatorError as error:
                    del busy[worker.connection]
                    worker = self._replace(worker)
                    busy[worker.connection] = worker
                    if failures.should_retry(chain, error):
                        worker.submit(chain)
                        continue
                    message = ChainFailure(chain.index, str(error))
                if isinstance(message, PlanRequest):
                    plan_requests[worker.connection] = message
                elif isinstance(message, (ChainResult, ChainFailure)):
                    yield message
                    failures.record_result(message)
                    if following := waiting.pop(chain.slot):
                        worker.submit(following)
                    else:
                        del busy[worker.connection]
            if plan_requests and len(plan_requests) == len(busy):
                for group in group_by_slot({connection: busy[connection].task.slot for connection in plan_requests}):
                    requests = {slot: plan_requests[connection] for slot, connection in group.items()}
                    chunks = plan_batch(policy, requests, size=len(self.workers))
                    for slot, connection in group.items():
                        busy[connection].send_actions(chunks[slot])
                plan_requests.clear()

    def _replace(self, worker: SimulatorHandle) -> SimulatorHandle:
        worker.kill()
        new = self.workers[worker.number] = SimulatorHandle(worker.number, self.config, self.response_timeout)
        return new


def check_same_versions(versions: dict[str, dict[str, str]]) -> None:
    """Raise RolloutError, in one line, unless all simulators have equal versions: scores depend on the renderer.

    `versions` maps a name of each simulator, or of each process, to its versions.
    """
    (first, expected), *others = versions.items()
    for name, own in others:
        if differing := [key for key in sorted({*expected, *own}) if expected.get(key) != own.get(key)]:
            raise RolloutError(
                "the simulators of one evaluation must have equal versions: "
                + "; ".join(f"{key} is {expected.get(key)} in {first}, {own.get(key)} in {name}" for key in differing)
                + "; choose the renderer by hand (env.renderer=egl|cpu of CALVIN), or use machines of one kind"
            )


def _ready_workers(workers: list[SimulatorHandle]) -> list[SimulatorHandle]:
    """Wait until a worker has sent a message or reached its deadline; returns all workers of which this is true."""
    ready = wait([worker.connection for worker in workers], min((worker.remaining() for worker in workers), default=0))
    return [worker for worker in workers if worker.connection in ready or not worker.remaining()]


class FailureCounter:
    """Counts the failed attempts at each sequence, and the sequences that were given up in a row."""

    def __init__(self) -> None:
        self.attempts: Counter[int] = Counter()
        self.given_up = 0

    def should_retry(self, chain: Chain, error: SimulatorError) -> bool:
        """Record a failed attempt; returns whether another one follows."""
        self.attempts[chain.index] += 1
        retry = self.attempts[chain.index] < MAX_ATTEMPTS
        LOG.warning("%s; %s", error, "trying the sequence again" if retry else "going on without the sequence")
        return retry

    def record_result(self, result: ChainResult | ChainFailure) -> None:
        """Record how a sequence ended. Raises RolloutError at MAX_CONSECUTIVE_FAILURES failures in a row."""
        self.given_up = self.given_up + 1 if isinstance(result, ChainFailure) else 0
        if self.given_up == MAX_CONSECUTIVE_FAILURES:
            raise RolloutError(
                f"{MAX_CONSECUTIVE_FAILURES} sequences in a row failed {MAX_ATTEMPTS} times each, the last with: "
                f"{result.reason}; the finished sequences are in the journal, and the same command resumes the run"
            )


class ChainQueue:
    """The chains that have not begun yet, by slot.

    `claim(index)` says whether this process may take a chain; without it all chains are this process's.
    """

    def __init__(self, chains: list[Chain], claim: Callable[[int], bool] | None = None):
        self.claim = claim
        self.queues: dict[int, deque[Chain]] = {}
        for chain in chains:
            self.queues.setdefault(chain.slot, deque()).append(chain)

    def pop(self, slot: int) -> Chain | None:
        """The next chain of this slot, or of the slot with the most chains left where it has none. None at the end."""
        while any(self.queues.values()):
            chain = (self.queues.get(slot) or max(self.queues.values(), key=len)).popleft()
            if self.claim is None or self.claim(chain.index):
                return chain
        return None


def group_by_slot(slots: dict[Connection, int]) -> list[dict[int, Connection]]:
    """{connection: its chain's slot} -> groups {slot: connection} that hold each slot at most once.

    There is more than one group only near the end of a run, when several chains of one slot are in progress.
    """
    groups: list[dict[int, Connection]] = []
    for connection, slot in slots.items():
        free = next((group for group in groups if slot not in group), None)
        if free is None:
            groups.append(free := {})
        free[slot] = connection
    return groups


def plan_batch(policy: ChunkPolicy, requests: dict[int, PlanRequest], *, size: int) -> dict[int, np.ndarray]:
    """Plan for the requests, given by slot, in one batch of `size` rows.

    Returns {slot: (policy.execute, 7) float64}. Raises RolloutError where the policy's actions cannot be carried out.
    """
    filler = next(iter(requests.values()))
    rows = [requests.get(slot, filler) for slot in range(size)]
    instructions = [row.instruction for row in rows]
    chunks = policy.predict_action_chunk(
        [row.observation for row in rows], instructions, rollout_keys=[row.key for row in rows]
    )
    actions = np.asarray(chunks, dtype=np.float64)
    fits = (
        actions.ndim == 3
        and len(actions) == size
        and actions.shape[1] >= policy.execute
        and actions.shape[2] == ACTION_DIM
    )
    if not fits:
        raise RolloutError(
            f"the policy planned actions of shape {actions.shape}; needed are ({size}, at least {policy.execute}, "
            f"{ACTION_DIM}) for {size} simulators: check the policy's chunk length, execute and action width"
        )
    if not np.isfinite(actions).all():
        row = int(np.argwhere(~np.isfinite(actions).all((1, 2)))[0, 0])
        raise RolloutError(
            f"the policy planned actions that are not finite, for {instructions[row]!r}: check its weights"
        )
    return {slot: actions[slot, : policy.execute] for slot in requests}
