"""Motions of a scripted hand: generators of 7-D relative actions against a privileged state (DESIGN 7).

Positions are metres in the world frame, Euler angles fixed-axis xyz radians. A yaw of pi/2 closes the fingers along x;
`tilt` leans the hand towards -y (for that yaw), so that the fingers point forward into the cabinet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from envs.protocol import MAX_REL_ORN, MAX_REL_POS, PrivilegedState

ActionStream = Iterator[np.ndarray]

YAW_RANGE = (-0.6, 3.05)  # beyond it the real simulator's inverse kinematics flips over
FORWARD = np.pi / 2
MAX_TRACKING_ERROR = 0.035  # m between command and hand that free motion never shows
FRONT_LIMIT_Y = -0.09  # m, beyond this y an upright hand meets the handles of the slanted front
SAFE_HEIGHT = 0.6  # above everything that stands on the table
FINGER_OFFSET, FINGER_HALF_THICKNESS = (
    0.051,
    0.014,
)  # m, an open finger's distance from the hand's middle, and half its thickness
EMPTY_GRIPPER_WIDTH = 0.012  # m, a closed hand that opens less holds nothing
MAX_GRASP_WIDTH = 0.065  # m, the widest edge that fits between the fingers with room to spare
APPROACH_RADIUS = 0.1  # m beside a block from where an open hand above it goes straight to it
ACROSS_TOLERANCE, ALONG_TOLERANCE = (
    0.012,
    0.006,
)  # m off a block's middle, across and along the fingers, at which they come down on it
PASS_HEIGHT = 0.03  # m above a block's middle from where fingers pass over it
YAW_ERROR_ARM = 0.04  # m off at the fingers for every radian of a wrong turn


class MotionBlocked(RuntimeError):
    """The hand does not get where it is commanded to: something is in its way."""


def turn_between(facing: np.ndarray, euler: np.ndarray) -> np.ndarray:
    """Angles (3,) to add to `facing`. Yaw goes the way that stays in front of the robot, not the shortest one."""
    turn = (euler - facing + np.pi) % (2 * np.pi) - np.pi
    turn[2] = euler[2] - ((facing[2] + np.pi / 2) % (2 * np.pi) - np.pi / 2)
    return turn


def safe_tilt(y: float, yaw: float = FORWARD) -> float:
    """Tilt that keeps an open hand over the table off the handles of the slanted front.

    More for a hand that is askew, as long as leaning back still takes it away from the front.
    """
    along, across = max(0.0, np.sin(yaw)), abs(np.cos(yaw))
    return float(along * np.clip((y - FRONT_LIMIT_Y) * 6 + max(0.0, (y + 0.1) * 20) * across * along, 0, 0.8))


def align_yaw(yaw: float, slack: float) -> float:
    """A yaw nearer to FORWARD by up to `slack`: fingers that close askew turn a block the rest of the way."""
    askew = yaw - FORWARD
    return FORWARD + float(np.sign(askew)) * max(0.0, abs(askew) - slack)


def gripper_euler(yaw: float = FORWARD, tilt: float = 0.0) -> np.ndarray:
    """Euler angles (3,) of a hand that points down with a yaw and then leans back about the axis its fingers close
    on."""
    return np.array([np.pi, -tilt, yaw])


def retreat_axis(yaw: float, tilt: float) -> np.ndarray:
    """Unit vector (3,) from the fingertips up through that hand."""
    return np.array([-np.sin(tilt) * np.cos(yaw), -np.sin(tilt) * np.sin(yaw), np.cos(tilt)])


def retreat_axis_of(euler: np.ndarray) -> np.ndarray:
    """`retreat_axis` of the hand that `hand` gives these angles."""
    return retreat_axis(euler[2], -euler[1])


def closing_axis(yaw: float) -> np.ndarray:
    """Unit vector (3,) along which the fingers close."""
    return np.array([np.sin(yaw), -np.cos(yaw), 0.0])


def _hand_frame(off: np.ndarray, euler: np.ndarray) -> tuple[float, float, float]:
    """Metres off a place in that hand's frame: from the fingertips up, the way the fingers close, and square to
    both."""
    back, across = retreat_axis_of(euler), closing_axis(euler[2])
    return float(off @ back), float(off @ across), float(off @ np.cross(back, across))


def nearest_valid_yaw(yaw: float, near: float = FORWARD) -> float:
    """The yaw of the same grasp (period pi) that is nearest to another one and inside YAW_RANGE."""
    turned = [yaw + k * np.pi for k in range(-4, 5)]
    inside = [value for value in turned if YAW_RANGE[0] <= value <= YAW_RANGE[1]]
    return min(inside, key=lambda value: abs(value - near))


class MotionPrimitives:
    """The hand's vocabulary. One object serves one episode: its speed is drawn once."""

    def __init__(self, state: PrivilegedState, rng: np.random.Generator) -> None:
        self.state = state
        self.rng = rng
        self.cruise_speed = float(rng.uniform(0.55, 0.85))
        self.gripper_action = state.gripper_action()
        self.noise_allowed = False  # may the one who executes the action disturb it?
        self._speed = 0.0

    def make_action(self, shift: np.ndarray | None = None, turn: np.ndarray | None = None) -> np.ndarray:
        """The action that moves the commanded pose by metres (3,) and radians (3,), clipped to what one step allows."""
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
        """Straight to a pose with ramps at both ends; `speed` scales the episode's cruising speed.

        A callable says from the commanded position and angles where to go next; it is asked at each step.
        `no_stop` does not brake at the end, `no_noise` keeps the one who executes from adding noise, `push_on` pushes on
        against what resists; otherwise Stuck is raised when the hand stays behind.
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
        """Stand still, perhaps with a new command for the gripper."""
        if gripper_action is not None:
            self.gripper_action = gripper_action
        self.noise_allowed = False
        self._speed = 0.0
        for _ in range(steps):
            yield self.make_action()

    def sync_target(self) -> ActionStream:
        """Pull the commanded pose back to the measured one: pushing leaves it inside of things."""
        tcp, _ = self.state.tcp_pose()
        if np.linalg.norm(tcp - self.state.target_pose()[0]) > 0.02:
            yield from self.move_to(tcp, no_stop=True, no_noise=True, push_on=True, max_steps=20)

    def move_up(self, height: float = SAFE_HEIGHT) -> ActionStream:
        """Straight up where the hand is lower."""
        at, _ = self.state.target_pose()
        if at[2] < height - 0.01:
            yield from self.move_to([at[0], at[1], height], no_stop=True)

    def move_above(
        self, x: float, y: float, euler: np.ndarray, *, height: float = SAFE_HEIGHT, gripper_action: int = 1
    ) -> ActionStream:
        """Up, then across to a place above (x, y), turning the hand and setting the gripper on the way."""
        self.gripper_action = gripper_action
        yield from self.sync_target()
        yield from self.move_up(height)
        yield from self.move_to([x, y, max(height, self.state.target_pose()[0][2] - 0.05)], euler, no_stop=True)

    def grasp_yaws(self, block: str) -> list[float]:
        """Yaws at which the fingers fit around a block however it lies; FORWARD where none does."""
        _, axes = self.state.block_pose(block)
        yaws = [
            float(np.arctan2(axis[1], axis[0]) + np.pi / 2)
            for axis, width in zip(axes.T, self.state.block_size(block))
            if abs(axis[2]) < 0.5 and width < MAX_GRASP_WIDTH
        ]
        return yaws or [FORWARD]

    def best_grasp_yaw(self, block: str) -> float:
        """The yaw nearest to FORWARD at which the fingers fit around a block and, if possible, beside its
        neighbours."""
        yaws = [nearest_valid_yaw(yaw) for yaw in self.grasp_yaws(block)]
        return min(yaws, key=lambda yaw: abs(yaw - FORWARD) + 3.0 * self._finger_collides(block, yaw))

    def _finger_collides(self, block: str, yaw: float) -> bool:
        """Would an open finger come down on another block?"""
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
        """Take a block: open, above it, down (see `move_to` for `no_noise`), close with an `offset` from its centre.

        `yaw` overrules the choice of the nearest comfortable one, `tilt` what keeps the hand off the slanted front.
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
        """Euler angles (3,) of a hand that takes a block; see `grasp`."""
        y = self.state.block_pose(block)[0][1]
        if yaw is None:
            yaw = self.best_grasp_yaw(block)
            if y > FRONT_LIMIT_Y + 0.02:
                yaw = align_yaw(yaw, 0.25)
        return gripper_euler(yaw, safe_tilt(y, yaw) if tilt is None else tilt)

    def is_above_grasp(self, position: np.ndarray, euler: np.ndarray) -> bool:
        """Is the open hand where it goes to a grasp at `position` directly: above it, or around it already?"""
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
        """Where to go next from above a grasp: the farther off its axis, the higher. Fingers that are low and askew go
        up first."""
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
        """Close until the fingers stop. A fixed pause would look the same at its beginning and its end, and a policy
        that
        sees single pictures would learn to stay in it."""
        before = np.inf
        self.gripper_action = -1
        for _ in range(7):
            yield from self.wait(1)
            now = self.state.gripper_opening_width()
            if abs(before - now) < 5e-4:
                return
            before = now

    def release(self) -> ActionStream:
        """Let go of what is in the hand, near whatever lies below, and move off it."""
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
        """Draw open fingers back from a block between them, which would be carried off otherwise; not where they can
        take a wanted one."""
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
        """The block in the closed hand."""
        if self.state.gripper_action() > 0 or self.state.gripper_opening_width() < EMPTY_GRIPPER_WIDTH:
            return None
        near = [name for name in self.state.blocks if "robot" in self.state.get_contacts(name)]
        tcp, _ = self.state.tcp_pose()
        near = [name for name in near if np.linalg.norm(self.state.block_pose(name)[0] - tcp) < 0.06]
        return near[0] if near else None
