"""What an environment offers: CALVIN's evaluation protocol (Sec. 4.2), and the state that a scripted expert reads.

To add an environment, a "world", for the rollouts of step 3:
1. Write a class with the members of `Env`, for instance in envs/<name>/env.py. It need not inherit from `Env`. Its
   constructor takes `scene` and whatever else its config sets, and it imports no model and no torch.
2. Add configs/env/<name>.yaml with `_target_: envs.<name>.env.<Class>` and the arguments of the constructor.
3. Run `python -m step3_defi.eval env=<name> policy=random ...`. Every worker process makes one environment and calls
   `get_sequences`, then for each sequence `reset`, and for each task in it `get_info`, `instruction`, and in a loop
   `get_obs` (when the policy is asked), `step` and `check_success`.
An environment in which no expert can be scripted raises UserError in `expert`; only policy=expert, `envs.record` and
`step3_defi.rollout.diagnose` call it.

To reuse the expert of `envs.expert`, which knows CALVIN's table, an environment gives it an object with the members of
`PrivilegedState`. `envs.playtable.env.PlayTableState` is that object for playtable and for the real CALVIN alike.

Conventions. World frame: metres and radians, x to the right as seen from the robot, y from the robot towards the
cabinet, z upwards. Euler angles are fixed-axis xyz (roll, pitch, yaw), CALVIN's convention.
    action (7,)      translation (3) and rotation (3) in the world frame, each entry in [-1, 1], in units of MAX_REL_POS
                     and MAX_REL_ORN, added to the commanded pose; then the gripper, positive opens and negative closes
    robot_obs (15,)  tool position (m), its Euler angles (rad), opening of the gripper (m), seven joint angles (rad),
                     last gripper command (-1 or 1)
    scene_obs (24,)  slider, drawer, button, switch (m), lightbulb, led (0 or 1), then position (m) and Euler angles
                     (rad) of each of the three blocks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

CONTROL_FREQ = 30  # control steps per second, and recorded frames per second
MAX_REL_POS, MAX_REL_ORN = 0.02, 0.05  # m and rad by which an entry of 1 in an action moves the commanded pose (CALVIN)


@dataclass(frozen=True)
class Fixtures:
    """Positions of a scene's fixtures in the world frame, in metres.

    slide_x0: x of the sliding door's joint frame (its left edge) when the slider reads 0; the door moves to -x.
    drawer_x, switch_x: x of the middle of the drawer and of the switch. button: position of the button. plank_x: x of
    the left and the right end of the plank in the cabinet, on which blocks can stand.
    """

    slide_x0: float
    drawer_x: float
    switch_x: float
    button: tuple[float, float, float]
    plank_x: tuple[float, float]


class SceneLayout(Protocol):
    """The facts about a scene that turn CALVIN's symbolic initial states into poses (`envs.sequences`)."""

    block_names: tuple[str, ...]  # "block_red", "block_blue", "block_pink" in the order of scene_obs
    limits: dict[str, float]  # joint name of a fixture, as in PrivilegedState.joint_position -> upper limit in metres
    fixtures: Fixtures


class PrivilegedState(Protocol):
    """The true state of the simulator, as far as a scripted expert reads it. All methods return the present values.

    The expert changes the state only through the actions that the environment executes.
    """

    blocks: tuple[str, ...]  # "block_red", "block_blue", "block_pink" in the order of scene_obs
    fixtures: Fixtures

    def tcp_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Measured pose of the tool centre point, between the fingertips: position (3,) and Euler angles (3,)."""

    def target_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Commanded pose of the tool centre point, to which the next action is added: position (3,), angles (3,)."""

    def gripper_action(self) -> int:
        """The last gripper command: -1 closes, 1 opens."""

    def gripper_opening_width(self) -> float:
        """Measured distance between the fingers, 0 to 0.08 m."""

    def joint_position(self, name: str) -> float:
        """Position of "base__slide", "base__drawer", "base__button" or "base__switch", from 0 to its limit, in m."""

    def joint_limit(self, name: str) -> float:
        """Upper limit of that joint in metres."""

    def light_state(self, name: str) -> int:
        """1 if the light "lightbulb" or "led" is on, else 0."""

    def block_pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Centre (3,) of a block and its rotation matrix (3, 3), whose columns are the block's axes."""

    def block_size(self, name: str) -> np.ndarray:
        """Full edge lengths (3,) of a block along its own axes, in metres."""

    def get_contacts(self, name: str) -> frozenset[str]:
        """Names of everything that a block touches.

        These are "robot", the names of other blocks, "floor", and links of the table: "base_link" (table top and
        walls), "plank_link" (floor of the cabinet), "drawer_link", "slide_link", "switch_link", "button_link".
        """


class Expert(Protocol):
    """A scripted policy that reads the privileged state of the environment that made it."""

    def reset(self, task: str) -> None:
        """Start on a task from the present state. Raises UserError for an unknown task."""

    def act(self) -> np.ndarray:
        """The next action (7,), float64. The caller passes it to `Env.step`."""


class Env(Protocol):
    """A simulator with CALVIN's protocol: states, observations, success detection, instructions and sequences of tasks.

    The state after a reset and a list of actions must depend on these alone: rollouts are continued after a kill, and
    `step3_defi.rollout.diagnose` returns to a moment by repeating the actions that led to it.
    """

    name: str  # names world and scene in reports, for instance "playtable-D"

    def get_sequences(
        self, count: int, *, tasks: list[str] | None = None, length: int = 5, seed: int = 0
    ) -> list[tuple[dict, list[str]]]:
        """Return `count` pairs of (symbolic initial state for `reset`, `length` names of tasks to be done in a row).

        tasks: the names that may occur, None for all. The pairs depend on the arguments alone, and the first pairs do
        not depend on `count` (playtable: up to 1000), so that a short evaluation is the beginning of a long one. Raises
        UserError for unknown tasks or an impossible length.
        """

    def reset(
        self, state: dict | None = None, *, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None
    ) -> dict:
        """Set a symbolic state of `get_sequences`, or the vectors robot_obs (15,) and scene_obs (24,).

        Returns the observation without images. Rollouts use symbolic states only, and they are opaque to them.
        """

    def step(self, action: np.ndarray, *, render: bool = True) -> tuple[dict, dict]:
        """Execute an action (7,) for one control step of 1 / CONTROL_FREQ s and return (observation, info).

        Values outside [-1, 1] are not clipped here. The observation is that of `get_obs`, without "rgb_obs" if `render`
        is false; the info is that of `get_info`.
        """

    def get_obs(self) -> dict:
        """Render the present observation: a dictionary with robot_obs (15,), scene_obs (24,) and rgb_obs.

        rgb_obs is a dictionary of uint8 RGB images: rgb_static (200, 200, 3), rgb_gripper (84, 84, 3).
        """

    def get_info(self) -> dict[str, Any]:
        """The present info, a copy that later steps do not change. `check_success` compares two of them."""

    def instruction(self, task: str) -> str:
        """The sentence that the policy is given for a task."""

    def check_success(self, task: str, start_info: dict, end_info: dict) -> bool:
        """Whether `task` was carried out between two infos. `start_info` is taken when the task begins."""

    def expert(self, seed: int = 0) -> Expert:
        """A new scripted expert for this environment."""

    def versions(self) -> dict[str, str]:
        """Simulator and renderer with their versions, for result files. Runs with other versions are not mixed."""

    def resolved_options(self) -> dict[str, Any]:
        """Constructor arguments in place of those it chose itself, for instance the renderer for "auto".

        Another environment that is made with them renders the same images.
        """

    def close(self) -> None:
        """Free the simulator and its renderer. A second call does nothing."""
