"""A simulator's process as its parent sees it: starting it, sending it work, noticing that it hangs or died."""

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
from step3_defi.rollout.messages import Branch, Chain, ErrorReport, SequencesRequest, SimulatorConfig, SimulatorReady

SHUTDOWN_TIMEOUT = 10  # seconds that a worker gets to end on its own
STARTUP_TIMEOUT = 120  # seconds that a simulator gets to start, where `response_timeout` is shorter


class RolloutError(RuntimeError):
    """A rollout that cannot be completed: simulators that fail, or a policy whose actions cannot be carried out.

    The message is one line and says all that a user needs, so the programs that roll out print nothing else.
    """


class SimulatorError(RolloutError):
    """A simulator's process that died, hung or reported an error."""


class SimulatorHandle:
    """One simulator's process.

    `number` is its place in the pool. A process that sends no message for `response_timeout` seconds counts as
    hanging.
    """

    def __init__(self, number: int, config: SimulatorConfig, response_timeout: float):
        self.number, self.response_timeout, self.started = number, response_timeout, False
        self.task: Chain | Branch | SequencesRequest | None = None
        self.connection, worker_end = Pipe()
        egl = egl_environment(os.environ, egl_cuda_indices()) if torch.cuda.is_available() else {}
        environment = {
            **os.environ,
            **egl,
            "OMP_NUM_THREADS": "1",  # the other cores belong to the other workers and to the policy
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        command = [sys.executable, "-c", "from step3_defi.rollout.worker import main; main()", str(worker_end.fileno())]
        self.process = subprocess.Popen(
            command, pass_fds=[worker_end.fileno()], env=environment, stdin=subprocess.DEVNULL
        )
        worker_end.close()
        self._send(config)

    def submit(self, task: Chain | Branch | SequencesRequest) -> None:
        """Send a request. Its answer, and for a chain the messages before it, come from `receive`."""
        self.task = task
        self._send(task)

    def send_actions(self, actions: np.ndarray) -> None:
        """Answer a PlanRequest with the actions (n, 7) to carry out."""
        self._send(actions)

    def remaining(self) -> float:
        """Seconds until the process counts as hanging."""
        return max(0.0, self.deadline - time.monotonic())

    def receive(self) -> Any:
        """The next message (see `messages`).

        Raises SimulatorError where the worker reports an error, died, or sends nothing until its deadline.
        """
        if not self.connection.poll(self.remaining()):
            raise SimulatorError(
                f"{self._describe()}: no sign of life for {self.timeout:g} s; raise response_timeout= if it is slow"
            )
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise SimulatorError(f"{self._describe()}: the process died (exit code {self._exit_code()})") from error
        if isinstance(message, ErrorReport):
            raise SimulatorError(f"{self._describe()}: {message.reason}")
        # The first request may have been submitted during the start and be slow to begin: it gets the long deadline.
        self.started = not isinstance(message, SimulatorReady)
        self._reset_deadline()
        return message

    def close(self) -> None:
        """Close the connection; the worker then frees its simulator and ends. It is killed where it does not."""
        self.connection.close()
        if self._exit_code() is None:
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self.connection.close()
        self.process.kill()
        self.process.wait()

    def _send(self, message: Any) -> None:
        self._reset_deadline()
        # A dead worker is noticed in `receive`, where the error that it reported last may still be read.
        with suppress(ConnectionError):
            self.connection.send(message)

    def _reset_deadline(self) -> None:
        self.timeout = self.response_timeout if self.started else max(self.response_timeout, STARTUP_TIMEOUT)
        self.deadline = time.monotonic() + self.timeout

    def _exit_code(self) -> int | None:
        try:
            return self.process.wait(SHUTDOWN_TIMEOUT)
        except subprocess.TimeoutExpired:
            return None

    def _describe(self) -> str:
        task = self.task
        if isinstance(task, Chain):
            return f"simulator {self.number}, sequence {task.index} ({', '.join(task.tasks)})"
        if isinstance(task, Branch):
            moment = f"{task.task}, returning to step {len(task.prefix_actions)}"
            return f"simulator {self.number}, sequence {task.index} ({moment})"
        return f"simulator {self.number}"
