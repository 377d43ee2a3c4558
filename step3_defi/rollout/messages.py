"""The messages between the program that plans and the processes that simulate (Sec. 4.2).

parent -> worker   SimulatorConfig, once; then SequencesRequest, Chain or Branch; after each PlanRequest the
                   actions to carry out, an array (n, 7)
worker -> parent   SimulatorReady, once; then SequencesAnswer, ChainResult or BranchResult, one for each request;
                   PlanRequest and Heartbeat while a chain runs; ErrorReport at any time, as the last message
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from step3_defi.action_chunk import RolloutKey


@dataclass(frozen=True)
class SimulatorConfig:
    """Which simulator a worker makes."""

    env_config: dict[str, Any]  # as Hydra instantiates it
    check_rendering: bool  # render once at the start: a machine without OpenGL then fails before the work begins


@dataclass(frozen=True)
class SequencesRequest:
    """Asks for the name of the world and for the sequences of an evaluation in it."""

    count: int
    tasks: list[str] | None  # the vocabulary; None: all tasks
    length: int  # sub-tasks in a sequence
    seed: int


@dataclass(frozen=True)
class Chain:
    """Asks to roll out one sequence of sub-tasks."""

    index: int  # of the sequence in the evaluation
    initial_state: dict
    tasks: list[str]
    controller: str  # "policy" (the parent plans), "random" or "expert"
    horizon: int  # control steps that a sub-task may take
    seed: int
    slot: int = 0  # row of the batch that its plans are made in
    film_every: int = 0  # control steps between two frames of the film; 0 for no film


@dataclass(frozen=True)
class Branch:
    """Asks to return to one moment of a sequence and to continue from there, with the scripted expert on `task` or
    with given actions."""

    index: int  # of the sequence in the evaluation
    initial_state: dict
    task: str
    prefix_actions: np.ndarray  # (T, 7), the actions from the initial state to the moment
    continuation_steps: int  # control steps after the moment
    frame_stride: int  # control steps between two pictures of the continuation
    seed: int
    override_actions: np.ndarray | None = None  # (continuation_steps, 7), carried out instead of the expert's


@dataclass(frozen=True)
class SimulatorReady:
    """The simulator has started."""

    versions: dict[str, str]  # of the simulator and its renderer
    resolved_options: dict[str, Any]  # constructor arguments in place of what the simulator chose by itself


@dataclass(frozen=True)
class SequencesAnswer:
    """Answers a SequencesRequest."""

    world: str  # for instance "playtable-D"
    sequences: list[tuple[dict, list[str]]]  # (initial state, tasks) each


@dataclass(frozen=True)
class PlanRequest:
    """Asks the parent for the next chunk of actions."""

    observation: dict
    instruction: str
    key: RolloutKey


@dataclass(frozen=True)
class Heartbeat:
    """Says that a chain is still being carried out."""


@dataclass(frozen=True)
class ChainResult:
    """How a chain ended."""

    index: int
    steps_to_success: list[int | None]  # of each sub-task that was tried; None for the one that failed
    clipped: int  # control steps whose action left [-1, 1]
    film: list[np.ndarray] | None  # frames (H, W, 3) uint8


@dataclass(frozen=True)
class ChainFailure:
    """Stands in for a ChainResult where the simulator failed in every attempt at the chain."""

    index: int
    reason: str


@dataclass(frozen=True)
class BranchResult:
    """What followed after the moment of a Branch."""

    start: np.ndarray  # robot_obs and scene_obs at the moment, concatenated
    frames: list[dict[str, np.ndarray]]  # the cameras' pictures at the moment and every `frame_stride` steps after it
    actions: np.ndarray  # (continuation_steps, 7), what was carried out


@dataclass(frozen=True)
class ErrorReport:
    """Why the worker's process ends, in one line."""

    reason: str
