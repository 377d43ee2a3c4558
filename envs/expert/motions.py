"""Motion primitives of the scripted expert: generators of relative actions (7,) that read the privileged state.

Positions are in metres in the world frame, Euler angles are fixed-axis xyz in radians. With a yaw of pi/2 the fingers
close along x. For that yaw, `tilt` inclines the hand towards -y, so that the fingers point forward into the cabinet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from envs.protocol import MAX_REL_ORN, MAX_REL_POS, PrivilegedState

ActionStream = Iterator[np.ndarray]

YAW_RANGE = (-0.6, 3.05)  # rad; outside, the inverse kinematics of the real CALVIN jumps to another solution
FORWARD = np.pi / 2  # rad, the yaw of the neutral pose
MAX_TRACKING_ERROR = 0.035  # m between commanded and measured position; free motion stays below it
FRONT_LIMIT_Y = -0.09  # m; at larger y an upright hand collides with the handles of the slanted front
SAFE_HEIGHT = 0.6  # m, above everything on the table
FINGER_OFFSET = 0.051  # m from the middle of the hand to an open finger
FINGER_HALF_THICKNESS = 0.014  # m
EMPTY_GRIPPER_WIDTH = 0.012  # m; a closed gripper with a smaller opening holds nothing
MAX_GRASP_WIDTH = 0.065  # m, the longest edge that fits between the fingers with some clearance
APPROACH_RADIUS = 0.1  # m in the plane; within it an open gripper above a block approaches it directly
ACROSS_TOLERANCE = 0.012  # m along the closing axis from the middle of a block, at most, for the fingers to move down
ALONG_TOLERANCE = 0.006  # m perpendicular to it; what exceeds it raises the approach path
PASS_HEIGHT = 0.03  # m above the middle of a block; from there the fingers pass over it
YAW_ERROR_ARM = 0.04  # m of error at the fingers for each radian of error in the orientation


class MotionBlocked(RuntimeError):
    """The hand cannot reach the commanded position, because something is in its way. The expert then tries again."""


def turn_between(facing: np.ndarray, euler: np.ndarray) -> np.ndarray:
    """Angles (3,) to add to the Euler angles `facing` to reach `euler`.

    The yaw rotates through the angles in front of the robot, which is not always the shortest way.
    """
    turn = (euler - facing + np.pi) % (2 * np.pi) - np.pi
    turn[2] = euler[2] - ((facing[2] + np.pi / 2) % (2 * np.pi) - np.pi / 2)
    return turn


def safe_tilt(y: float, yaw: float = FORWARD) -> float:
    """Tilt (rad) that keeps an open hand over the table at `y` away from the handles of the slanted front.

    It is larger for a yaw that deviates from FORWARD, as far as tilting then still moves the hand away from the front.
    """
    along, across = max(0.0, np.sin(yaw)), abs(np.cos(yaw))
    return float(along * np.clip((y - FRONT_LIMIT_Y) * 6 + max(0.0, (y + 0.1) * 20) * across * along, 0, 0.8))


def align_yaw(yaw: float, slack: float) -> float:
    """Move a yaw towards FORWARD by at most `slack`. Fingers that close at an angle rotate the block by the rest."""
    deviation = yaw - FORWARD
    return FORWARD + float(np.sign(deviation)) * max(0.0, abs(deviation) - slack)


def gripper_euler(yaw: float = FORWARD, tilt: float = 0.0) -> np.ndarray:
    """Euler angles (3,) of a hand that points down with a yaw and is then tilted about its closing axis."""
    return np.array([np.pi, -tilt, yaw])


def retreat_axis(yaw: float, tilt: float) -> np.ndarray:
    """Unit vector (3,) from the fingertips back through the hand, for the hand of `gripper_euler(yaw, tilt)`."""
    return np.array([-np.sin(tilt) * np.cos(yaw), -np.sin(tilt) * np.sin(yaw), np.cos(tilt)])


def retreat_axis_of(euler: np.ndarray) -> np.ndarray:
    """`retreat_axis` for Euler angles (3,) that `gripper_euler` returned."""
    return retreat_axis(euler[2], -euler[1])


def closing_axis(yaw: float) -> np.ndarray:
    """Unit vector (3,) along which the fingers close, for an upright hand with this yaw."""
    return np.array([np.sin(yaw), -np.cos(yaw), 0.0])


def _hand_frame(off: np.ndarray, euler: np.ndarray) -> tuple[float, float, float]:
    """Components of an offset (3,) in the frame of a hand: from the fingertips back, along the closing axis, and along
    the axis perpendicular to both."""
    back, across = retreat_axis_of(euler), closing_axis(euler[2])
    return float(off @ back), float(off @ across), float(off @ np.cross(back, across))


def nearest_valid_yaw(yaw: float) -> float:
    """The equivalent yaw (grasps repeat with period pi) inside YAW_RANGE that is nearest to FORWARD."""
    turned = [yaw + k * np.pi for k in range(-4, 5)]
    inside = [value for value in turned if YAW_RANGE[0] <= value <= YAW_RANGE[1]]
    return min(inside, key=lambda value: abs(value - FORWARD))


class MotionPrimitives:
    """Motions of the hand as generators of actions, which are to be executed one by one while the generator runs.

    gripper_action: the gripper command that all following actions contain. cruise_speed: the speed of free motion, a
    fraction of the largest action. noise_allowed: whether the last action may be disturbed before it is executed.
    """

    def __init__(self, state: PrivilegedState, rng: np.random.Generator) -> None:
        self.state = state
        self.rng = rng
        self.cruise_speed = float(rng.uniform(0.55, 0.85))
        self.gripper_action = state.gripper_action()
        self.noise_allowed = False
        self._speed = 0.0

    def make_action(self, shift: np.ndarray | None = None, turn: np.ndarray | None = None) -> np.ndarray:
        """The action (7,) that moves the commanded pose by `shift` (3,) m and `turn` (3,) rad, clipped to [-1, 1]."""
        move = np.zeros(6)
        if shift is not None:
            move[:3] = np.asarray(shift) / MAX_REL_POS
        if turn is not None:
            move[3:] = np.asarray(turn) / MAX_REL_ORN
        return np.append(np.clip(move, -1, 1), self.gripper_action).astype(np.float64)

    def move_to(
        self,
        position: np.ndarray | Callable[[np.ndarray, np.ndarray], np.ndarray],
        euler: np.ndarray | None = None,
        *,
        speed: float = 1.0,
        tolerance: float = 0.012,
        no_stop: bool = False,
        no_noise: bool = False,
        push_on: bool = False,
        max_steps: int = 120,
    ) -> ActionStream:
        """Move in a straight line to a pose, accelerating at the start and slowing down at the end.

        position: (3,) in metres, or a function of the commanded position and Euler angles that returns the position to
        move towards and is called in every step. euler: Euler angles (3,), None keeps the present ones. speed: factor
        of the cruise speed. tolerance: largest distance in metres of the measured position at the end. no_stop: do not
        slow down at the end. no_noise: keep `noise_allowed` false. push_on: continue against resistance; otherwise
        MotionBlocked is raised if the hand stays behind the commanded position.
        """
        waited = behind = 0
        for _ in range(max_steps):
            at, facing = self.state.target_pose()
            goal = np.asarray(position(at, facing) if callable(position) else position, float)
            shift = goal - at
            turn = np.zeros(3) if euler is None else turn_between(facing, euler)
            behind = behind + 1 if np.linalg.norm(self.state.tcp_pose()[0] - at) > MAX_TRACKING_ERROR else 0
            if behind > 10 and not push_on:
                raise MotionBlocked
            far = max(np.abs(shift).max() / MAX_REL_POS, np.abs(turn).max() / MAX_REL_ORN)
            limit = self.cruise_speed * speed
            if no_stop and far < limit:
                return
            if far < 1e-3:
                if waited >= 10 or np.linalg.norm(self.state.tcp_pose()[0] - goal) < tolerance:
                    break
                waited += 1
            brake = far if no_stop else 0.12 + 0.35 * far
            self._speed = min(limit, self._speed + 0.2, brake)
            share = min(1.0, self._speed / max(far, 1e-9))
            self.noise_allowed = not no_noise and far > 2.0
            yield self.make_action(shift * share, turn * share)
        self.noise_allowed = False
        self._speed = 0.0

    def wait(self, steps: int, gripper_action: int | None = None) -> ActionStream:
        """Stand still for some steps, with a new gripper command if one is given."""
        if gripper_action is not None:
            self.gripper_action = gripper_action
        self.noise_allowed = False
        self._speed = 0.0
        for _ in range(steps):
            yield self.make_action()

    def sync_target(self) -> ActionStream:
        """Move the commanded position back to the measured one. After a push it may lie inside an object."""
        tcp, _ = self.state.tcp_pose()
        if np.linalg.norm(tcp - self.state.target_pose()[0]) > 0.02:
            yield from self.move_to(tcp, no_stop=True, no_noise=True, push_on=True, max_steps=20)

    def move_up(self, height: float = SAFE_HEIGHT) -> ActionStream:
        """Move straight up to a height, if the hand is lower."""
        at, _ = self.state.target_pose()
        if at[2] < height - 0.01:
            yield from self.move_to([at[0], at[1], height], no_stop=True)

    def move_above(
        self, x: float, y: float, euler: np.ndarray, *, height: float = SAFE_HEIGHT, gripper_action: int = 1
    ) -> ActionStream:
        """Move up, then horizontally to (x, y), with the given orientation and gripper command."""
        self.gripper_action = gripper_action
        yield from self.sync_target()
        yield from self.move_up(height)
        yield from self.move_to([x, y, max(height, self.state.target_pose()[0][2] - 0.05)], euler, no_stop=True)

    def grasp_yaws(self, block: str) -> list[float]:
        """Yaws at which the fingers fit around a block, whatever side it lies on; [FORWARD] if there is none."""
        _, axes = self.state.block_pose(block)
        yaws = [
            float(np.arctan2(axis[1], axis[0]) + np.pi / 2)
            for axis, width in zip(axes.T, self.state.block_size(block))
            if abs(axis[2]) < 0.5 and width < MAX_GRASP_WIDTH
        ]
        return yaws or [FORWARD]

    def best_grasp_yaw(self, block: str) -> float:
        """The yaw nearest to FORWARD at which the fingers fit around a block, if possible between its neighbors."""
        yaws = [nearest_valid_yaw(yaw) for yaw in self.grasp_yaws(block)]
        return min(yaws, key=lambda yaw: abs(yaw - FORWARD) + 3.0 * self._finger_collides(block, yaw))

    def _finger_collides(self, block: str, yaw: float) -> bool:
        """Whether an open finger would touch another block."""
        centre, across = self.state.block_pose(block)[0], closing_axis(yaw)
        for other in set(self.state.blocks) - {block}:
            position, axes = self.state.block_pose(other)
            for finger in (centre + FINGER_OFFSET * across, centre - FINGER_OFFSET * across):
                outside = np.abs((finger - position) @ axes) - self.state.block_size(other) / 2
                if np.linalg.norm(np.maximum(outside, 0.0)) < FINGER_HALF_THICKNESS:
                    return True
        return False

    def grasp(
        self,
        block: str,
        *,
        tilt: float | None = None,
        yaw: float | None = None,
        offset: tuple[float, float, float] = (0.0, 0.0, 0.0),
        height: float = SAFE_HEIGHT,
        no_noise: bool = True,
    ) -> ActionStream:
        """Grasp a block: open the gripper, move above the block, down, and close.

        tilt, yaw: of the hand, instead of those that `grasp_euler` chooses. offset: of the grasp from the centre of the
        block, in metres. height: in which the hand moves above the block. no_noise: see `move_to`, for the way down.
        """
        position, _ = self.state.block_pose(block)
        euler = self.grasp_euler(block, tilt=tilt, yaw=yaw)
        if self.is_above_grasp(position + offset, euler):
            self.gripper_action = 1
        else:
            ready = position + offset + 0.10 * retreat_axis_of(euler)
            yield from self.move_above(ready[0], ready[1], euler, height=height)
            yield from self.move_to(ready, euler, tolerance=0.02)
        position = self.state.block_pose(block)[0] + offset
        yield from self.move_to(
            self.approach_path(position, euler), euler, speed=0.75, tolerance=0.006, no_noise=no_noise
        )
        yield from self.close_gripper()

    def grasp_euler(self, block: str, *, tilt: float | None = None, yaw: float | None = None) -> np.ndarray:
        """Euler angles (3,) of the hand for a grasp. By default the tilt keeps it away from the slanted front."""
        y = self.state.block_pose(block)[0][1]
        if yaw is None:
            yaw = self.best_grasp_yaw(block)
            if y > FRONT_LIMIT_Y + 0.02:
                yaw = align_yaw(yaw, 0.25)
        return gripper_euler(yaw, safe_tilt(y, yaw) if tilt is None else tilt)

    def is_above_grasp(self, position: np.ndarray, euler: np.ndarray) -> bool:
        """Whether the open gripper is near enough to approach a grasp at `position` directly: above it or around it."""
        at, facing = self.state.target_pose()
        height, across, along = _hand_frame(at - position, euler)
        turn = np.abs(turn_between(facing, euler)).max()
        beside = float(np.hypot(across, along))
        return (
            self.state.gripper_action() > 0
            and turn < 0.8
            and beside < APPROACH_RADIUS
            and (height > PASS_HEIGHT or height > -0.01 and abs(across) < ACROSS_TOLERANCE)
        )

    def approach_path(self, position: np.ndarray, euler: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """A function for `move_to` that leads to a grasp at `position` from above.

        It maps the commanded position and angles to the next position. The farther the gripper is from the axis of the
        grasp, the higher it stays. Fingers that are low and beside the axis move up first.
        """
        back = retreat_axis_of(euler)

        def waypoint(at: np.ndarray, facing: np.ndarray) -> np.ndarray:
            height, across, along = _hand_frame(at - position, euler)
            off = abs(across) + YAW_ERROR_ARM * float(np.abs(turn_between(facing, euler)).max())
            if off > ACROSS_TOLERANCE and height < PASS_HEIGHT:
                return at + (PASS_HEIGHT + 0.005 - height) * back
            level = max(0.0, 1.5 * (abs(along) - ALONG_TOLERANCE)) + (
                PASS_HEIGHT + 0.005 + off - ACROSS_TOLERANCE if off > ACROSS_TOLERANCE else 0.0
            )
            return position + min(level, APPROACH_RADIUS) * back

        return waypoint

    def close_gripper(self) -> ActionStream:
        """Close the gripper until the fingers stop.

        It does not wait for a fixed time: images at the beginning and the end of a pause look alike, so a policy that
        sees single images would learn to stay in it.
        """
        before = np.inf
        self.gripper_action = -1
        for _ in range(7):
            yield from self.wait(1)
            now = self.state.gripper_opening_width()
            if abs(before - now) < 5e-4:
                return
            before = now

    def release(self) -> ActionStream:
        """Lower the held block until it touches something, open the gripper and move up."""
        held = self.held_block()
        if held is not None:
            start = self.state.target_pose()[0]
            for _ in range(40):
                if self.state.get_contacts(held) != {"robot"} or start[2] - self.state.target_pose()[0][2] > 0.2:
                    break
                self._speed = min(0.5, self._speed + 0.15)
                yield self.make_action([0, 0, -self._speed * MAX_REL_POS])
        yield from self.sync_target()
        yield from self.wait(5, 1)
        yield from self.move_to(self.state.target_pose()[0] + [0, 0, 0.07], no_stop=True)

    def retreat(self, wanted: str | None = None) -> ActionStream:
        """Move open fingers back from a block between them, which they would otherwise drag along.

        It does nothing if that block is `wanted` and can be grasped directly.
        """
        tcp, _ = self.state.tcp_pose()
        near = [name for name in self.state.blocks if np.linalg.norm(self.state.block_pose(name)[0] - tcp) < 0.05]
        if (
            self.state.gripper_action() < 0
            or not near
            or near == [wanted]
            and self.is_above_grasp(self.state.block_pose(wanted)[0], self.grasp_euler(wanted))
        ):
            return
        at, facing = self.state.target_pose()
        yield from self.move_to(at + 0.09 * retreat_axis_of(facing), no_stop=True, push_on=True, max_steps=20)

    def held_block(self) -> str | None:
        """The block in the closed gripper, or None."""
        if self.state.gripper_action() > 0 or self.state.gripper_opening_width() < EMPTY_GRIPPER_WIDTH:
            return None
        near = [name for name in self.state.blocks if "robot" in self.state.get_contacts(name)]
        tcp, _ = self.state.tcp_pose()
        near = [name for name in near if np.linalg.norm(self.state.block_pose(name)[0] - tcp) < 0.06]
        return near[0] if near else None
