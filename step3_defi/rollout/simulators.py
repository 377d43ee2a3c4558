"""Many simulators, one policy: workers hold environments, the parent plans for all of them in one batch (DESIGN 6).

What a row of a batch comes to depends on the batch's size and on the row's place in it, in the last bits. So the policy
is always called with `workers` observations, a chain's plans are always made in the same row (its slot), rows that
nobody needs are filled with copies, and all chains in progress wait for each other. With noise that depends on
obs["rollout_key"] = (seed, sequence, sub-task, plan) alone, a run that was killed and goes on equals an unbroken one,
and so
does one whose simulators die: a new one takes the sequence up again from its start, once.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import numpy as np

from common.contracts import ChunkPolicy
from step3_defi.rollout.handle import RolloutError, SimulatorError, SimulatorHandle
from step3_defi.rollout.worker import ACTION_DIM, Branch, Chain, SequencesRequest, SimulatorConfig

LOG = logging.getLogger(__name__)
MAX_ATTEMPTS = 2  # at a sequence, before it is given up
MAX_CONSECUTIVE_FAILURES = 3  # sequences given up in a row: it is not them


class SimulatorPool:
    """`count` processes with one environment each, made from a Hydra configuration inside them. A context manager.

    The first comes up alone, and what it chooses by itself the others are told: many that look for a GPU at once may
    find different ones.
    `versions` are those of all; RolloutError where one that comes up has others. One that dies, reports an error or is
    silent for `response_timeout`
    seconds is replaced. `pictures`: each draws one as it comes up.
    """

    def __init__(
        self, env_config: dict[str, Any], *, count: int, response_timeout: float = 300, pictures: bool = False
    ):
        if count < 1:
            raise ValueError(f"workers={count}: at least one simulator is needed")
        self.count, self.response_timeout, self.setup = count, response_timeout, SimulatorConfig(env_config, pictures)
        self.versions: dict[str, str] = {}
        self.workers: list[SimulatorHandle] = []

    def __enter__(self) -> SimulatorPool:
        self.workers = [SimulatorHandle(0, self.setup, self.response_timeout)]
        try:
            first = self._ask("up")
        except RolloutError:
            self.close()
            raise
        self.versions = first["versions"]
        self.setup = replace(self.setup, env_config={**self.setup.env_config, **first["choices"]})
        self.workers += [SimulatorHandle(number, self.setup, self.response_timeout) for number in range(1, self.count)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.close()

    def survey(self, request: SequencesRequest) -> dict[str, Any]:
        """{"world": name, "sequences": [(initial state, tasks), ...]} of these environments. SimulatorError: twice in
        vain."""
        return self._ask("survey", request)

    def _ask(self, kind: str, request: SequencesRequest | None = None) -> dict[str, Any]:
        """What the first simulator says under `kind`. One that fails is replaced, once."""
        try:
            return self._answer(kind, request)
        except SimulatorError as error:
            LOG.warning("%s; a new simulator is asked", error)
        self._replace(self.workers[0])
        return self._answer(kind, request)

    def _answer(self, kind: str, request: SequencesRequest | None) -> dict[str, Any]:
        if request:
            self.workers[0].submit(request)
        while (said := self._listen(self.workers[0]))[0] != kind:
            pass
        return said[1]

    def _listen(self, worker: SimulatorHandle) -> tuple[str, Any]:
        """What a worker says; as it comes up it must be like the others."""
        kind, content = worker.receive()
        if kind == "up" and self.versions:
            check_same_versions(
                {"the first simulator": self.versions, f"simulator {worker.number}": content["versions"]}
            )
        return kind, content

    def branch(self, requests: Sequence[Branch]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(position of the request, what follows its moment) as they get done. Raises SimulatorError naming the
        sequence."""
        waiting, free = deque(enumerate(requests)), list(self.workers)
        busy: dict[SimulatorHandle, int] = {}
        while waiting or busy:
            while waiting and free:
                worker = free.pop()
                busy[worker], request = waiting.popleft()
                worker.submit(request)
            for worker in _ready_workers(list(busy)):
                kind, content = self._listen(worker)
                if kind == "branch":
                    free.append(worker)
                    yield busy.pop(worker), content

    def rollout(
        self, chains: list[Chain], policy: ChunkPolicy | None = None, claim: Callable[[int], bool] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Hand chains to workers as they get free; yields {"index", "steps_to_success", "clipped", "film"} as chains
        end.

        Chains of the agent "policy" need `policy`; those that `claim` refuses are left to other processes. A chain
        whose simulator fails is
        tried again from its start, in its slot; one that fails twice comes as {"index", "failure": why}. Raises
        RolloutError where that happens
        to MAX_CONSECUTIVE_FAILURES chains in a row.
        """
        waiting, failures = ChainQueue(chains, claim), FailureCounter()
        busy: dict[Connection, SimulatorHandle] = {}
        asking: dict[Connection, tuple[dict, str]] = {}
        for slot, worker in enumerate(self.workers):
            if chain := waiting.pop(slot):
                busy[worker.connection] = worker
                worker.submit(chain)
        while busy:
            for worker in _ready_workers([worker for connection, worker in busy.items() if connection not in asking]):
                chain = worker.task
                try:
                    kind, content = self._listen(worker)
                except SimulatorError as error:
                    del busy[worker.connection]
                    worker = self._replace(worker)
                    busy[worker.connection] = worker
                    if failures.again(chain, error):
                        worker.submit(chain)
                        continue
                    kind, content = "chain", {"index": chain.index, "failure": str(error)}
                if kind == "plan":
                    asking[worker.connection] = content
                elif kind == "chain":
                    yield content
                    failures.record_result(content)
                    if following := waiting.pop(chain.slot):
                        worker.submit(following)
                    else:
                        del busy[worker.connection]
            if asking and len(asking) == len(busy):
                for group in group_by_slot({connection: busy[connection].task.slot for connection in asking}):
                    plans = plan(policy, {slot: asking[c] for slot, c in group.items()}, size=len(self.workers))
                    for slot, connection in group.items():
                        busy[connection].send_actions(plans[slot])
                asking.clear()

    def _replace(self, worker: SimulatorHandle) -> SimulatorHandle:
        worker.kill()
        new = self.workers[worker.number] = SimulatorHandle(worker.number, self.setup, self.response_timeout)
        return new


def check_same_versions(versions: dict[str, dict[str, str]]) -> None:
    """Versions by whose they are. RolloutError, in one line, unless they are equal: scores move with the renderer."""
    (first, known), *others = versions.items()
    for name, own in others:
        if differing := [key for key in sorted({*known, *own}) if known.get(key) != own.get(key)]:
            raise RolloutError(
                "one table needs simulators of one kind: "
                + "; ".join(f"{key} is {known.get(key)} in {first}, {own.get(key)} in {name}" for key in differing)
                + "; choose the renderer by hand (env.renderer=egl|cpu of CALVIN) or machines that are alike"
            )


def _ready_workers(workers: list[SimulatorHandle]) -> list[SimulatorHandle]:
    """Waits until some worker has something to say, or has been silent for too long; these workers."""
    ready = wait([worker.connection for worker in workers], min((worker.remaining() for worker in workers), default=0))
    return [worker for worker in workers if worker.connection in ready or not worker.remaining()]


class FailureCounter:
    """Which sequences simulators failed in, and how many were given up since one was judged."""

    def __init__(self) -> None:
        self.attempts: Counter[int] = Counter()
        self.given_up = 0

    def again(self, chain: Chain, error: SimulatorError) -> bool:
        """Whether the chain is to be tried once more."""
        self.attempts[chain.index] += 1
        last = self.attempts[chain.index] == MAX_ATTEMPTS
        LOG.warning(
            "%s; a new simulator %s", error, "goes on without the sequence" if last else "tries the sequence again"
        )
        return not last

    def record_result(self, result: dict[str, Any]) -> None:
        """Told of every result. Raises RolloutError where simulators keep failing."""
        self.given_up = self.given_up + 1 if "failure" in result else 0
        if self.given_up == MAX_CONSECUTIVE_FAILURES:
            raise RolloutError(
                f"{MAX_CONSECUTIVE_FAILURES} sequences in a row failed twice, the last: {result['failure']}; finished sequences are in "
                "the journal, "
                "the same command goes on from there"
            )


class ChainQueue:
    """Chains that nobody works on yet, by slot. `claim`: whether a chain, by its index, is still to be had; all are
    where it is None."""

    def __init__(self, chains: list[Chain], claim: Callable[[int], bool] | None = None):
        self.claim = claim
        self.queues: dict[int, deque[Chain]] = {}
        for chain in chains:
            self.queues.setdefault(chain.slot, deque()).append(chain)

    def pop(self, slot: int) -> Chain | None:
        """The next chain of this slot, or where there is none of the slot with the most; None where all are taken."""
        while any(self.queues.values()):
            chain = (self.queues.get(slot) or max(self.queues.values(), key=len)).popleft()
            if self.claim is None or self.claim(chain.index):
                return chain
        return None


def group_by_slot(slots: dict[Connection, int]) -> list[dict[int, Connection]]:
    """Who asks, and their slots -> groups in which every slot is taken once; towards the end, chains of a slot may
    meet."""
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
        bad = int(np.argwhere(~np.isfinite(actions).all((1, 2)))[0, 0])
        raise RolloutError(
            f"the policy planned actions that are not finite, for {instructions[bad]!r}: check its weights"
        )
    return {slot: actions[slot, : policy.execute] for slot in requests}
