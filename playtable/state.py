"""What a scripted expert may know: the small privileged-state interface (DESIGN 7).

`playtable.env.PlayTableState` reads it from this package's simulator and, through `playtable.calvin.Calvin`, from the
real
`calvin_env`. World frame, metres, radians; Euler angles are fixed-axis xyz (roll, pitch, yaw), CALVIN's convention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Fixtures:
    """Where a scene's fixtures stand. `slide_x0` is the x of the door's joint frame when the slider reads 0."""

    slide_x0: float
    drawer_x: float
    switch_x: float
    button: tuple[float, float, float]
    plank_x: tuple[float, float]


class PrivilegedState(Protocol):
    """Everything an expert reads; it changes nothing except through actions."""

    blocks: tuple[str, ...]  # "block_red", ... in the scene's order
    fixtures: Fixtures

    def tcp(self) -> tuple[np.ndarray, np.ndarray]:
        """Measured tool centre point: position (3,), Euler angles (3,)."""

    def target(self) -> tuple[np.ndarray, np.ndarray]:
        """Commanded tool pose that the next relative action is added to: position (3,), Euler angles (3,)."""

    def gripper(self) -> int:
        """Last gripper command, -1 closes and 1 opens."""

    def opening(self) -> float:
        """Measured gripper opening, 0 to 0.08 m."""

    def joint(self, name: str) -> float:
        """Reading of "base__slide", "base__drawer", "base__button" or "base__switch" in metres, 0 to `limit(name)`."""

    def limit(self, name: str) -> float:
        """Upper end of that joint's range."""

    def light(self, name: str) -> int:
        """1 where "lightbulb" or "led" is on, else 0."""

    def block(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A block's centre (3,) and rotation matrix (3, 3), columns are its axes."""

    def size(self, name: str) -> np.ndarray:
        """A block's full edge lengths (3,) along its own axes."""

    def touching(self, name: str) -> frozenset[str]:
        """What a block touches now: "robot", other blocks' names, or the table's links, for instance
        "base_link", "plank_link", "drawer_link", "slide_link"."""
