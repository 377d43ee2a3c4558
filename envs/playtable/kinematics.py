"""Rotations, and forward and inverse kinematics of the arm from the link frames that Franka publishes.

Euler angles are fixed-axis xyz (roll, pitch, yaw) in radians: R = Rz(yaw) Ry(pitch) Rx(roll).
"""

from __future__ import annotations

from math import asin, atan2, cos, pi, sin

import numpy as np

# Frame of joint i in frame i - 1: (rotation about x, offset in the parent's frame in metres). A joint turns about z.
LINK_FRAMES: tuple[tuple[float, tuple[float, float, float]], ...] = (
    (0.0, (0.0, 0.0, 0.333)),
    (-pi / 2, (0.0, 0.0, 0.0)),
    (pi / 2, (0.0, -0.316, 0.0)),
    (pi / 2, (0.0825, 0.0, 0.0)),
    (-pi / 2, (-0.0825, 0.384, 0.0)),
    (pi / 2, (0.0, 0.0, 0.0)),
    (pi / 2, (0.088, 0.0, 0.0)),
)
HAND_OFFSET, HAND_YAW = 0.107, -pi / 4  # m along and rad about the z axis of joint 7
TCP_OFFSET = 0.14  # m along the z axis of the hand
JOINT_LOWER = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
JOINT_UPPER = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])


def matrix_from_euler(euler: np.ndarray) -> np.ndarray:
    """(3,) fixed-axis xyz angles -> (3, 3) rotation matrix."""
    (cr, cp, cy), (sr, sp, sy) = (cos(a) for a in euler), (sin(a) for a in euler)
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


def euler_from_matrix(matrix: np.ndarray) -> np.ndarray:
    """(3, 3) -> (3,) fixed-axis xyz angles, roll and yaw in (-pi, pi], pitch in [-pi/2, pi/2]."""
    down = min(1.0, max(-1.0, -float(matrix[2, 0])))
    if abs(down) > 1.0 - 1e-12:  # gimbal lock: roll and yaw rotate about the same axis, so yaw gets all of it
        return np.array([0.0, asin(down), atan2(-float(matrix[0, 1]), float(matrix[1, 1]))])
    return np.array(
        [
            atan2(float(matrix[2, 1]), float(matrix[2, 2])),
            asin(down),
            atan2(float(matrix[1, 0]), float(matrix[0, 0])),
        ]
    )


def quaternion_from_matrix(matrix: np.ndarray) -> np.ndarray:
    """(3, 3) -> (4,) unit quaternion w, x, y, z with w >= 0."""
    m = np.asarray(matrix, dtype=np.float64)
    trace = m.trace()
    if trace > 0:
        s = 2.0 * np.sqrt(1.0 + trace)
        q = np.array([0.25 * s, (m[2, 1] - m[1, 2]) / s, (m[0, 2] - m[2, 0]) / s, (m[1, 0] - m[0, 1]) / s])
    else:
        i = int(np.argmax(np.diagonal(m)))
        j, k = (i + 1) % 3, (i + 2) % 3
        s = 2.0 * np.sqrt(max(1.0 + m[i, i] - m[j, j] - m[k, k], 1e-18))
        q = np.empty(4)
        q[0], q[1 + i] = (m[k, j] - m[j, k]) / s, 0.25 * s
        q[1 + j], q[1 + k] = (m[j, i] + m[i, j]) / s, (m[k, i] + m[i, k]) / s
    q = q / np.linalg.norm(q)
    return q if q[0] >= 0 else -q


def rotvec_from_matrix(matrix: np.ndarray) -> np.ndarray:
    """(3, 3) -> (3,) rotation vector: axis times angle, angle in [0, pi]."""
    quaternion = quaternion_from_matrix(matrix)
    norm = float(np.linalg.norm(quaternion[1:]))
    scale = 2.0 if norm < 1e-9 else 2.0 * atan2(norm, float(quaternion[0])) / norm
    return scale * quaternion[1:]


class ArmKinematics:
    """Kinematics of the 7-joint arm. `base_position` (3,) is in the world frame; the base is not rotated.

    rest: the joint angles (7,) that `inverse` prefers among those with the same tool pose.
    """

    def __init__(self, base_position: tuple[float, float, float], rest: tuple[float, ...]) -> None:
        self.base_position = np.array(base_position, dtype=np.float64)
        self.rest = np.array(rest, dtype=np.float64)
        self._fixed = np.zeros((7, 4, 4))
        for frame, (angle, offset) in zip(self._fixed, LINK_FRAMES):
            frame[0, 0] = frame[3, 3] = 1.0
            frame[1:3, 1:3] = [[cos(angle), -sin(angle)], [sin(angle), cos(angle)]]
            frame[:3, 3] = offset
        self._fixed[0, :3, 3] += self.base_position
        c, s = cos(HAND_YAW), sin(HAND_YAW)
        self._tool = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, HAND_OFFSET + TCP_OFFSET], [0, 0, 0, 1]])

    def forward(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Joint angles (7,) -> tool position (3,), rotation (3, 3) and geometric Jacobian (6, 7), linear rows first."""
        turn = np.zeros((7, 4, 4))
        turn[:, 0, 0] = turn[:, 1, 1] = np.cos(joints)
        turn[:, 1, 0] = np.sin(joints)
        turn[:, 0, 1] = -turn[:, 1, 0]
        turn[:, 2, 2] = turn[:, 3, 3] = 1.0
        steps = self._fixed @ turn
        frames = [steps[0]]
        for step in steps[1:]:
            frames.append(frames[-1] @ step)
        tool = frames[-1] @ self._tool
        chain = np.array(frames)
        axes = chain[:, :3, 2].T
        arms = tool[:3, 3, None] - chain[:, :3, 3].T
        jacobian = np.empty((6, 7))
        for i, (j, k) in enumerate(((1, 2), (2, 0), (0, 1))):
            jacobian[i] = axes[j] * arms[k] - axes[k] * arms[j]
        jacobian[3:] = axes
        return tool[:3, 3], tool[:3, :3], jacobian

    def inverse(
        self,
        position: np.ndarray,
        rotation: np.ndarray,
        start: np.ndarray,
        *,
        iterations: int = 10,
        damping: float = 0.01,
        nullspace_gain: float = 0.05,
        tolerance: float = 1e-4,
    ) -> np.ndarray:
        """Joint angles (7,) within the limits whose tool pose is nearest to the given one, by damped least squares.

        start: joint angles (7,) where the search begins. nullspace_gain: the fraction of the way to the rest pose that
        each iteration moves inside the null space. The search ends early when the errors of position (m) and rotation
        (rad) are below `tolerance`. For a pose out of reach, the nearest one found is returned.
        """
        q = np.clip(start, JOINT_LOWER, JOINT_UPPER)
        for step in range(iterations):
            here, turned, jacobian = self.forward(q)
            error = np.concatenate((position - here, rotvec_from_matrix(rotation @ turned.T)))
            size = float(np.abs(error).max())
            if size < tolerance and step > 0:
                break
            error *= min(1.0, 0.3 / max(size, 1e-12))
            q = self._ik_step(q, jacobian, error, damping, nullspace_gain)
        return q

    def _ik_step(
        self, q: np.ndarray, jacobian: np.ndarray, error: np.ndarray, damping: float, nullspace_gain: float
    ) -> np.ndarray:
        """One damped least-squares step. Joints that would leave their range are fixed, and the others compensate."""
        free = np.ones(7)
        for _ in range(3):
            used = jacobian * free
            inverse = np.linalg.solve(used @ used.T + damping**2 * np.eye(6), used).T
            home = nullspace_gain * (self.rest - q) * free
            move = inverse @ error + home - inverse @ (used @ home)
            wanted = q + move
            outside = ((wanted < JOINT_LOWER) | (wanted > JOINT_UPPER)) & (free > 0)
            if not outside.any():
                return wanted
            free = np.where(outside, 0.0, free)
        return np.clip(wanted, JOINT_LOWER, JOINT_UPPER)
