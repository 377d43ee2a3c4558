"""A simulator's process as the program sees it that plans for it: `rollout.SimulatorPool` holds as many as it needs
(DESIGN 6)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Pipe
from typing import Any

import numpy as np
import torch

from step3_defi.rollout.gpu import egl_cuda_indices, egl_environment
from step3_defi.rollout.worker import Branch, Chain, SequencesRequest, SimulatorConfig

SHUTDOWN_TIMEOUT = 10  # seconds a worker gets to end on its own
STARTUP_TIMEOUT = 120  # seconds a simulator gets to its first word, where patience is shorter


class RolloutError(RuntimeError):
    """Sequences that could not be judged, or a policy whose actions cannot be carried out."""


class SimulatorError(RolloutError):
    """A simulator process that died, hung or reported an error."""


class SimulatorHandle:
    """A simulator process as the parent sees it. `response_timeout`: seconds without a word from it that count as hanging."""

    def __init__(self, number: int, setup: SimulatorConfig, response_timeout: float):
        self.number, self.response_timeout, self.started = number, response_timeout, False
        self.task: Chain | Branch | SequencesRequest | None = None
        self.connection, theirs = Pipe()
        # One thread a simulator: the cores belong to the other workers and to the policy.
        own = egl_environment(os.environ, egl_cuda_indices()) if torch.cuda.is_available() else {}
        settings = {
            **os.environ,
            **own,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        command = [sys.executable, "-c", "from step3_defi.rollout.worker import main; main()", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=settings, stdin=subprocess.DEVNULL)
        theirs.close()
        self._send(setup)

    def submit(self, task: Chain | Branch | SequencesRequest) -> None:
        """Hand out work."""
        self.task = task
        self._send(task)

    def send_actions(self, actions: np.ndarray) -> None:
        """Answer a "plan"."""
        self._send(actions)

    def remaining(self) -> float:
        """Seconds until its silence counts as hanging."""
        return max(0.0, self.deadline - time.monotonic())

    def receive(self) -> tuple[str, Any]:
        """The next answer. Raises SimulatorError where the worker reports an error, died, or stays silent past its
        deadline."""
        if not self.connection.poll(self.remaining()):
            raise SimulatorError(
                f"{self._where()}: no sign of life; where its pace is more than {self.response_timeout:g} s, raise patience="
            )
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise SimulatorError(f"{self._where()}: the process died (exit code {self._exit_code()})") from error
        if kind == "error":
            raise SimulatorError(f"{self._where()}: {content}")
        self.started = kind != "up"  # the work may have a beginning of its own
        self._reset_deadline()
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
        self._reset_deadline()
        with suppress(
            ConnectionError
        ):  # a worker that is gone shows where it is listened to, and may have left word why
            self.connection.send(message)

    def _reset_deadline(self) -> None:
        self.deadline = time.monotonic() + (
            self.response_timeout if self.started else max(self.response_timeout, STARTUP_TIMEOUT)
        )

    def _exit_code(self) -> int | None:
        try:
            return self.process.wait(SHUTDOWN_TIMEOUT)
        except subprocess.TimeoutExpired:
            return None

    def _where(self) -> str:
        if isinstance(self.task, Chain):
            return f"simulator {self.number}, sequence {self.task.index} ({', '.join(self.task.tasks)})"
        if isinstance(self.task, Branch):
            return f"simulator {self.number}, sequence {self.task.index} ({self.task.task}, gone back to step {len(self.task.past)})"
        return f"simulator {self.number}"
