"""The processes of one launch, whether they share GPUs or have none."""

from __future__ import annotations

from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

SLOWEST = timedelta(
    days=7
)  # for work that one process does while the others wait, or that one ends long before another


def processes(timeout: timedelta | None = None) -> PartialState:
    """Which process this is, of how many; `timeout` is how long they wait for each other.

    PartialState alone looks for its fellows on GPUs only: without one, every process would take itself for the only
    one. The launcher says
    that there is none (`use_cpu` of configs/accelerate), and only AcceleratorState listens.
    """
    waiting = {} if timeout is None else {"timeout": timeout}
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **waiting)
