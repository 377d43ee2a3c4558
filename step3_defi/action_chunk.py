"""Carrying out a chunk of actions step by step, before the policy looks again (Sec. 3.4).

A real robot (`step3_defi.policy`) and a simulator's process (`step3_defi.rollout.worker`) share it, so it imports
nothing that is slow to import.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class RolloutKey(NamedTuple):
    """Identifies one plan of a rollout. The noise that a policy samples with depends on nothing else."""

    seed: int
    sequence: int
    subtask: int  # its place in the sequence
    plan: int  # its place in the sub-task


class ActionChunkBroker:
    """Hands out the actions of a chunk one at a time and asks for the next chunk when none is left.

    `predict_chunk` returns the actions to carry out, (n, 7) with n at least 1. It gets the arguments of the call of
    `next_action` that found the queue empty.
    """

    def __init__(self, predict_chunk: Callable[..., np.ndarray]) -> None:
        self.predict_chunk = predict_chunk
        self.queue: deque[np.ndarray] = deque()

    def reset(self) -> None:
        """Drop the actions that are left, so that the next action belongs to a new chunk."""
        self.queue.clear()

    def next_action(self, *arguments: Any) -> np.ndarray:
        """The next action, (7,)."""
        if not self.queue:
            self.queue.extend(self.predict_chunk(*arguments))
        return self.queue.popleft()
