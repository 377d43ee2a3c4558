"""A world without physics, in which a task is done after as many steps as its name says, and policies for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from step3_defi.action_chunk import RolloutKey


def make_tasks(steps: list[int]) -> list[str]:
    return [f"task{number}_{pace}" for number, pace in enumerate(steps)]


class FakeExpert:
    def reset(self, task: str) -> None:
        self.task = task

    def act(self) -> np.ndarray:
        return np.ones(7)


class FakeEnv:
    """Tasks are named <name>_<steps> and done once the first action entry, summed over the sub-task, reaches <steps>.

    `trouble` has rows (sequence, "kill" | "hang" | "raise", number of trials in which that happens at the 20th step);
    the trials are counted in the folder `trials`. With `renderer="auto"` the first environment that starts finds egl
    and later ones cpu; the folder `starts` counts them. With `drifts` each environment has another reference frame.
    """

    name = "fake-D"

    def __init__(
        self,
        chains: list[list[int]],
        scene: str = "D",
        log: str | None = None,
        trouble: Sequence[tuple[int, str, int]] = (),
        trials: str | None = None,
        version: str = "1",
        refuse: str | None = None,
        pace: float = 0.0,
        renderer: str = "none",
        starts: str | None = None,
        drifts: bool = False,
    ):
        if refuse:
            raise RuntimeError(refuse)
        number = self._count(starts)
        self.renderer = ("cpu" if number else "egl") if renderer == "auto" else renderer
        self.frame = {"reference_frame": str(number)} if drifts else {}
        self.chains, self.log, self.version, self.pace = chains, log, version, pace
        self.trouble, self.trials = {index: (kind, times) for index, kind, times in trouble}, trials
        self.name = f"fake-{scene}"
        self.progress, self.renders, self.index = 0.0, 0, -1

    def get_sequences(
        self, count: int, *, tasks: list[str] | None = None, length: int = 5, seed: int = 0
    ) -> list[tuple[dict, list[str]]]:
        return [
            ({"index": i, "seed": seed}, make_tasks(self.chains[i % len(self.chains)][:length])) for i in range(count)
        ]

    def reset(self, state: dict | None = None, **raw: Any) -> dict:
        self.index, self.progress, self.steps = state["index"], 0.0, 0
        self._note(f"reset {self.index}")
        return {}

    def step(self, action: np.ndarray, *, render: bool = True) -> tuple[dict, dict]:
        assert action.shape == (7,)
        if render:
            self.get_obs()
        self.steps += 1
        time.sleep(self.pace)
        if self.steps == 20 and self.index in self.trouble:
            self._fail(*self.trouble[self.index])
        self.progress += float(action[0])
        return {"robot_obs": np.full(15, self.progress)}, self.get_info()

    def get_obs(self) -> dict:
        self._note("render")
        pictures = {
            "rgb_static": np.full((200, 200, 3), int(self.progress) % 256, np.uint8),
            "rgb_gripper": np.zeros((84, 84, 3), np.uint8),
        }
        return {"rgb_obs": pictures, "robot_obs": np.full(15, self.progress), "scene_obs": np.zeros(24)}

    def get_info(self) -> dict[str, Any]:
        return {"progress": self.progress}

    def instruction(self, task: str) -> str:
        return f"please do {task}"

    def check_success(self, task: str, start_info: dict, end_info: dict) -> bool:
        return end_info["progress"] - start_info["progress"] >= int(task.rsplit("_", 1)[1]) - 1e-9

    def expert(self, seed: int = 0) -> FakeExpert:
        return FakeExpert()

    def versions(self) -> dict[str, str]:
        return {"simulator": f"fake {self.version}", "renderer": self.renderer, **self.frame}

    def resolved_options(self) -> dict[str, str]:
        return {"renderer": self.renderer}

    def close(self) -> None:
        self._note("close")

    def _count(self, starts: str | None) -> int:
        if starts is None:
            return 0
        before = len(list(Path(starts).iterdir()))
        (Path(starts) / str(os.getpid())).touch()
        return before

    def _fail(self, kind: str, times: int) -> None:
        mark = Path(self.trials) / str(self.index)
        tried = len(mark.read_text()) if mark.is_file() else 0
        if tried == times:
            return
        mark.write_text("x" * (tried + 1))
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(60)
        if kind == "raise":
            raise ValueError("block fell off the table")

    def _note(self, text: str) -> None:
        if self.log:
            with open(f"{self.log}.{os.getpid()}", "a") as file:
                file.write(text + "\n")


class SteadyPolicy:
    """Every action advances by one."""

    def __init__(
        self,
        folder: str = "",
        *,
        execute: int = 10,
        device: str = "cpu",
        compile: bool = False,
        length: int = 10,
        delay: float = 0.0,
    ):
        self.execute, self.length, self.delay = execute, length, delay
        self.batches: list[list[tuple[int, ...]]] = []

    def predict_action_chunk(
        self, observations: list[dict], instructions: list[str], *, rollout_keys: Sequence[RolloutKey]
    ) -> np.ndarray:
        self.batches.append(list(rollout_keys))
        return np.ones((len(observations), self.length, 7))


class NoisyPolicy(SteadyPolicy):
    """Its pace is drawn from the rollout key, as a sampler's noise is."""

    def predict_action_chunk(
        self, observations: list[dict], instructions: list[str], *, rollout_keys: Sequence[RolloutKey]
    ) -> np.ndarray:
        time.sleep(self.delay)
        paces = [np.random.default_rng(key).uniform(0, 2) for key in rollout_keys]
        return np.stack([np.full((self.length, 7), pace) for pace in paces])


class RowPolicy(SteadyPolicy):
    """Its pace is drawn from the rollout key and the row of the batch: a real model's last bits depend on the row."""

    def predict_action_chunk(
        self, observations: list[dict], instructions: list[str], *, rollout_keys: Sequence[RolloutKey]
    ) -> np.ndarray:
        paces = [np.random.default_rng((*key, row)).uniform(0, 2) for row, key in enumerate(rollout_keys)]
        return np.stack([np.full((self.length, 7), pace) for pace in paces])


class InstructionDependentPolicy(SteadyPolicy):
    """It acts as the expert does, but backwards where the sentence ends in _250. Its forecast gains grey levels with
    every frame, but stays as it is where the sentence ends in _999."""

    def __init__(self, folder: str = "", *, execute: int = 10, device: str = "cpu", compile: bool = False):
        super().__init__(folder, execute=execute, device=device)
        latents = SimpleNamespace(decode=lambda latents: latents / 2 + 0.5)
        gfdm = SimpleNamespace(generate=self.generate, encode_image=lambda image: image, vae=latents, num_frames=4)
        gidm = SimpleNamespace(embed=lambda pictures: pictures.flatten(2).transpose(1, 2), num_tokens=64)
        self.model = SimpleNamespace(
            forward_model=gfdm, gidm=gidm, views=("static", "gripper"), image_size=8, imagine_seed=0, device=device
        )

    def predict_action_chunk(
        self, observations: list[dict], instructions: list[str], *, rollout_keys: Sequence[RolloutKey]
    ) -> np.ndarray:
        chunks = super().predict_action_chunk(observations, instructions, rollout_keys=rollout_keys)
        scales = np.array([-0.1 if sentence.endswith("_250") else 1.0 for sentence in instructions])
        return chunks * scales[:, None, None]

    def generate(self, image: Any, text: list[str], *, steps: int, seed: int) -> Any:
        speed = 0.0 if text[0].endswith("_999") else 10 / 255
        return (image / 2 + 0.5)[:, None].repeat(1, 4, 1, 1, 1) + speed * image.new_tensor(range(4)).view(1, 4, 1, 1, 1)
