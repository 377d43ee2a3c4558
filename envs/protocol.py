"""What environments promise: CALVIN's protocol to a rollout, and privileged state to a scripted expert (Sec. 4.2).

`envs.playtable.env.PlayTableState` reads the privileged state from playtable and, through `envs.calvin.env.Calvin`,
from the real `calvin_env`. World frame, metres, radians; Euler angles are fixed-axis xyz (roll, pitch, yaw), CALVIN's convention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

CONTROL_FREQ = 30  # Hz, control steps and recorded frames per second
MAX_REL_POS, MAX_REL_ORN = 0.02, 0.05  # m and rad that an action entry of 1 moves the commanded pose by (CALVIN)


@dataclass(frozen=True)
class Fixtures:
    """Where a scene's fixtures stand. `slide_x0` is the x of the door's joint frame when the slider reads 0."""

    slide_x0: float
    drawer_x: float
    switch_x: float
    button: tuple[float, float, float]
    plank_x: tuple[float, float]


class SceneLayout(Protocol):
    """What the initial states of CALVIN's sequences need to know of a scene."""

    block_names: tuple[str, ...]  # in the order in which scene_obs lists them
    limits: dict[str, float]  # upper ends of the fixtures' joint ranges
    fixtures: Fixtures


class PrivilegedState(Protocol):
    """Everything an expert reads; it changes nothing except through actions."""

    blocks: tuple[str, ...]  # "block_red", ... in the scene's order
    fixtures: Fixtures

    def tcp_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Measured tool centre point: position (3,), Euler angles (3,)."""

    def target_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Commanded tool pose that the next relative action is added to: position (3,), Euler angles (3,)."""

    def gripper_action(self) -> int:
        """Last gripper command, -1 closes and 1 opens."""

    def gripper_opening_width(self) -> float:
        """Measured gripper opening, 0 to 0.08 m."""

    def joint_position(self, name: str) -> float:
        """Reading of "base__slide", "base__drawer", "base__button" or "base__switch" in metres, 0 to `limit(name)`."""

    def joint_limit(self, name: str) -> float:
        """Upper end of that joint's range."""

    def light_state(self, name: str) -> int:
        """1 where "lightbulb" or "led" is on, else 0."""

    def block_pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A block's centre (3,) and rotation matrix (3, 3), columns are its axes."""

    def block_size(self, name: str) -> np.ndarray:
        """A block's full edge lengths (3,) along its own axes."""

    def get_contacts(self, name: str) -> frozenset[str]:
        """What a block touches now: "robot", other blocks' names, or the table's links, for instance
        "base_link", "plank_link", "drawer_link", "slide_link"."""


class Expert(Protocol):
    """A scripted policy with privileged state, made by an environment for itself."""

    def reset(self, task: str) -> None:
        """Start on a task from wherever the robot stands."""

    def act(self) -> np.ndarray:
        """The next (7,) action."""


class Env(Protocol):
    """A benchmark with CALVIN's protocol: simulator, oracle, sentences and five-in-a-row sequences in one."""

    name: str  # the world and scene that reports print, for instance "playtable-D"

    def get_sequences(
        self, count: int, *, tasks: list[str] | None = None, length: int = 5, seed: int = 0
    ) -> list[tuple[dict, list[str]]]:
        """`count` pairs of (symbolic initial state, tasks in a row); `tasks` restricts the vocabulary."""

    def reset(
        self, state: dict | None = None, *, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None
    ) -> dict:
        """Put the world into a symbolic state, or into raw vectors; returns the observation without pictures."""

    def step(self, action: np.ndarray, *, render: bool = True) -> tuple[dict, dict]:
        """One control step of 1/30 s with a (7,) relative action -> (observation, info); pictures only when asked."""

    def get_obs(self) -> dict:
        """The present observation with pictures: rgb_obs/{rgb_static (200,200,3), rgb_gripper (84,84,3)} uint8,
        robot_obs (15,), scene_obs (24,)."""

    def get_info(self) -> dict[str, Any]:
        """CALVIN's privileged info, which the oracle compares between two moments."""

    def instruction(self, task: str) -> str:
        """The sentence that the policy is told."""

    def check_success(self, task: str, start_info: dict, end_info: dict) -> bool:
        """The oracle: was `task` carried out between two infos?"""

    def expert(self, seed: int = 0) -> Expert:
        """A scripted expert bound to this environment."""

    def versions(self) -> dict[str, str]:
        """Simulator and renderer with their versions, for the result file."""

    def resolved_options(self) -> dict[str, Any]:
        """Arguments of its constructor in place of what it chose by itself, a renderer: another one made with them
        draws alike."""

    def close(self) -> None:
        """Free the simulator and its GL context."""
