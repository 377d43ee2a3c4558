"""A rollout carried out again from its journal, with a memory of every plan, to go back to moments of it (DESIGN 6,
App. Q9)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from common.contracts import ChunkPolicy
from step3_defi.rollout.journal import Record
from step3_defi.rollout.stats import chain_length
from step3_defi.rollout.worker import Branch, Chain

PlanKey = tuple[int, int, int]  # sequence, sub-task in it, plan in that


@dataclass
class RecordedPlan:
    """What the policy did at one moment, and where it is to be judged, what it saw there."""

    actions: np.ndarray  # (execute, 7), clipped as they are carried out
    instruction: str
    observation: dict | None = None


class PlanRecorder:
    """A ChunkPolicy that remembers its plans; every `every`-th with what was seen, in the first `within` steps of a
    sub-task."""

    def __init__(self, policy: ChunkPolicy, *, every: int, max_step: int) -> None:
        self.policy, self.execute, self.every, self.max_step = policy, policy.execute, every, max_step
        self.plans: dict[PlanKey, RecordedPlan] = {}

    def plan(self, observations: list[dict], instructions: list[str]) -> np.ndarray:
        """As the policy's."""
        chunks = self.policy.plan(observations, instructions)
        for observation, instruction, chunk in zip(observations, instructions, chunks):
            _, index, number, k = observation["rollout_key"]
            seen = observation if self.judged(k) else None
            self.plans[index, number, k] = RecordedPlan(
                np.clip(np.asarray(chunk[: self.execute], np.float64), -1, 1), instruction, seen
            )
        return chunks

    def judged(self, k: int) -> bool:
        """Whether plan k of a sub-task is a moment to be judged."""
        return k % self.every == 0 and k * self.execute < self.max_step


class Replay:
    """The sequences of a journal, from the first one to the `failures`-th that failed. `horizon`: steps that a failed
    sub-task took."""

    def __init__(self, records: Mapping[int, Record], *, failures: int, horizon: int) -> None:
        self.horizon = horizon
        self.records: dict[int, Record] = {}
        for index, record in records.items():
            self.records[index] = record
            failures -= self.solved(index) < len(record["tasks"])
            if not failures:
                break

    def solved(self, index: int) -> int:
        """Sub-tasks that a sequence solved; the next one failed, where there is one."""
        return chain_length(self.records[index], self.horizon)

    def chains(self, *, slots: int) -> list[Chain]:
        """What to hand to as many simulators as the run had: every plan is then made in the row of the batch that it
        had there."""
        return [
            Chain(
                index,
                record["initial_state"],
                record["tasks"],
                "policy",
                self.horizon,
                record["seed"],
                slot=index % slots,
            )
            for index, record in self.records.items()
        ]

    def diverged(self, results: Iterable[dict]) -> set[int]:
        """Sequences whose result, {"index", "steps_to_success"} or a failure of the simulator, is not the journal's."""
        return {
            result["index"]
            for result in results
            if result.get("steps_to_success") != self.records[result["index"]]["steps_to_success"]
        }

    def moments(
        self, index: int, recorder: PlanRecorder, *, continuation_steps: int, every: int
    ) -> dict[PlanKey, Branch]:
        """The way back to every moment to be judged of a sequence that was carried out again."""
        record, done, found = self.records[index], np.zeros((0, 7)), {}
        for number, steps in enumerate(record["steps_to_success"]):
            plans = -(-(steps or self.horizon) // recorder.execute)
            actions = np.concatenate([recorder.plans[index, number, k].actions for k in range(plans)])[
                : steps or self.horizon
            ]
            for k in filter(recorder.judged, range(plans)):
                prefix_actions = np.concatenate([done, actions[: k * recorder.execute]])
                seed = int(np.random.SeedSequence((record["seed"], index, number, k)).generate_state(1)[0])
                found[index, number, k] = Branch(
                    index,
                    record["initial_state"],
                    record["tasks"][number],
                    prefix_actions,
                    continuation_steps,
                    every,
                    seed,
                )
            done = np.concatenate([done, actions])
        return found


def policy_continuation(branch: Branch, key: PlanKey, recorder: PlanRecorder) -> Branch:
    """The same moment, going on as the policy did, to the sub-task's last plan at most."""
    index, number, first = key
    keys = [(index, number, first + i) for i in range(-(-branch.continuation_steps // recorder.execute))]
    following = np.concatenate([recorder.plans[key].actions for key in keys if key in recorder.plans])[
        : branch.continuation_steps
    ]
    return replace(branch, following=following, continuation_steps=len(following))
