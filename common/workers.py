"""Worker processes that end with the program that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


def pool(workers: int, prepare: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """A pool of spawned processes, each of which calls `prepare(*arguments)` first.

    They end with the program, even if it was killed with SIGKILL.
    """
    return ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(prepare, arguments)
    )


def _begin(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare(*arguments)


def _end_with_parent() -> None:
    """Exit when the parent process ends: after SIGKILL it cannot tell its workers."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
