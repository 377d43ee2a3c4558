"""Repeats a rollout from its journal and records every plan, so that its moments can be visited again (App. Q9)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from common.contracts import ChunkPolicy
from step3_defi.action_chunk import RolloutKey
from step3_defi.rollout.journal import Record
from step3_defi.rollout.messages import Branch, Chain, ChainFailure, ChainResult
from step3_defi.rollout.stats import chain_length


class Moment(NamedTuple):
    """The moment of a rollout at which a plan was made."""

    sequence: int
    subtask: int  # its place in the sequence
    plan: int  # its place in the sub-task


@dataclass
class RecordedPlan:
    """What the policy planned at one moment and, where the moment is to be scored, what it observed."""

    actions: np.ndarray  # (execute, 7), clipped as they are carried out
    instruction: str
    observation: dict | None = None


class PlanRecorder:
    """A ChunkPolicy that wraps another one and records its plans in `plans`.

    It keeps the observation of every `plan_stride`-th plan within the first `max_step` steps of a sub-task: the
    moments to score.
    """

    def __init__(self, policy: ChunkPolicy, *, plan_stride: int, max_step: int) -> None:
        self.policy, self.execute = policy, policy.execute
        self.plan_stride, self.max_step = plan_stride, max_step
        self.plans: dict[Moment, RecordedPlan] = {}

    def predict_action_chunk(
        self, observations: list[dict], instructions: list[str], *, rollout_keys: Sequence[RolloutKey]
    ) -> np.ndarray:
        """The chunks of the wrapped policy."""
        chunks = self.policy.predict_action_chunk(observations, instructions, rollout_keys=rollout_keys)
        for observation, instruction, key, chunk in zip(observations, instructions, rollout_keys, chunks):
            _, sequence, subtask, plan = key
            self.plans[Moment(sequence, subtask, plan)] = RecordedPlan(
                np.clip(np.asarray(chunk[: self.execute], np.float64), -1, 1),
                instruction,
                observation if self.is_scored(plan) else None,
            )
        return chunks

    def is_scored(self, plan: int) -> bool:
        """Whether the moment of this plan of a sub-task is to be scored."""
        return plan % self.plan_stride == 0 and plan * self.execute < self.max_step


class Replay:
    """The sequences of a journal, from the first one to the one with the `failures`-th failure.

    `horizon` is the number of steps that a failed sub-task took.
    """

    def __init__(self, records: Mapping[int, Record], *, failures: int, horizon: int) -> None:
        self.horizon = horizon
        self.records: dict[int, Record] = {}
        for index, record in records.items():
            self.records[index] = record
            failures -= self.num_solved(index) < len(record["tasks"])
            if not failures:
                break

    def num_solved(self, index: int) -> int:
        """How many sub-tasks of a sequence succeeded. The next one, if there is one, failed."""
        return chain_length(self.records[index], self.horizon)

    def chains(self, *, slots: int) -> list[Chain]:
        """The requests that repeat the rollout.

        With as many `slots` as the run had simulators, each plan is made in the row of the batch that it had there.
        """
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

    def diverged(self, results: Iterable[ChainResult | ChainFailure]) -> set[int]:
        """The sequences that ended otherwise than in the journal, or whose simulator failed."""
        return {
            result.index
            for result in results
            if isinstance(result, ChainFailure)
            or result.steps_to_success != self.records[result.index]["steps_to_success"]
        }

    def moments(
        self, index: int, recorder: PlanRecorder, *, continuation_steps: int, frame_stride: int
    ) -> dict[Moment, Branch]:
        """For each moment to score of a sequence that `recorder` has recorded, the branch that continues from it."""
        record, done, found = self.records[index], np.zeros((0, 7)), {}
        for subtask, steps in enumerate(record["steps_to_success"]):
            length = steps or self.horizon
            plans = -(-length // recorder.execute)
            chunks = [recorder.plans[Moment(index, subtask, plan)].actions for plan in range(plans)]
            actions = np.concatenate(chunks)[:length]
            for plan in filter(recorder.is_scored, range(plans)):
                seed = int(np.random.SeedSequence((record["seed"], index, subtask, plan)).generate_state(1)[0])
                found[Moment(index, subtask, plan)] = Branch(
                    index,
                    record["initial_state"],
                    record["tasks"][subtask],
                    np.concatenate([done, actions[: plan * recorder.execute]]),
                    continuation_steps,
                    frame_stride,
                    seed,
                )
            done = np.concatenate([done, actions])
        return found


def policy_continuation(branch: Branch, moment: Moment, recorder: PlanRecorder) -> Branch:
    """The same branch continued with the policy's own actions, as far as the sub-task went."""
    sequence, subtask, first = moment
    plans = range(first, first + -(-branch.continuation_steps // recorder.execute))
    moments = [Moment(sequence, subtask, plan) for plan in plans]
    chunks = [recorder.plans[moment].actions for moment in moments if moment in recorder.plans]
    actions = np.concatenate(chunks)[: branch.continuation_steps]
    return replace(branch, override_actions=actions, continuation_steps=len(actions))
