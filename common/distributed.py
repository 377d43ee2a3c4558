"""The processes of one launch, on GPUs or on CPUs."""

from __future__ import annotations

from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

SLOWEST = timedelta(days=7)  # a timeout for work that one process does while the others wait


def processes(timeout: timedelta | None = None) -> PartialState:
    """The index of this process and their number; `timeout` is how long they wait for each other.

    PartialState alone finds other processes on GPUs only: on CPUs every process would believe that it is the only one.
    The launcher tells that there are no GPUs (`use_cpu` in configs/accelerate), but only AcceleratorState reads that.
    """
    waiting = {} if timeout is None else {"timeout": timeout}
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **waiting)
