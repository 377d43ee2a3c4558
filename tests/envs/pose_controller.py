"""Simple motions for the tests of the simulator, independent of the scripted expert."""

from __future__ import annotations

import numpy as np

from envs.playtable import PlayTableEnv
from envs.playtable.kinematics import euler_from_matrix, matrix_from_euler

UP_FRONT = np.array([0.0, 0.5, 3**0.5 / 2])  # along the cabinet's slanted front
OUT_OF_FRONT = np.array([0.0, -(3**0.5) / 2, 0.5])


def downward_euler(tilt: float = 0.0, yaw: float = np.pi / 2) -> np.ndarray:
    """Euler angles (3,) of a hand that points down and is then tilted, so that the fingers point forward."""
    tilted = matrix_from_euler(np.array([tilt, 0.0, 0.0])) @ matrix_from_euler(np.array([np.pi, 0.0, yaw]))
    euler = euler_from_matrix(tilted)
    euler[0] %= 2 * np.pi
    return euler


class PoseController:
    """Moves the commanded pose of an environment in straight lines, with gripper command -1 or 1."""

    def __init__(self, env: PlayTableEnv) -> None:
        self.env = env
        self.gripper_action = 1.0
        self.info = env.get_info()

    def wait(self, steps: int, gripper_action: float | None = None) -> None:
        self.gripper_action = self.gripper_action if gripper_action is None else gripper_action
        for _ in range(steps):
            _, self.info = self.env.step(np.array([0, 0, 0, 0, 0, 0, self.gripper_action]), render=False)

    def move_to(self, position: object, euler: np.ndarray | None = None, speed: float = 0.6) -> None:
        goal = np.asarray(position, dtype=float)
        for _ in range(200):
            at, turned = self.env.target_pose()
            move = np.concatenate(((goal - at) / 0.02, (np.zeros(3) if euler is None else euler - turned) / 0.05))
            largest = np.abs(move).max()
            if largest < 1e-6:
                break
            action = np.append(move * min(1.0, speed / largest), self.gripper_action)
            _, self.info = self.env.step(action, render=False)
        self.wait(8)
