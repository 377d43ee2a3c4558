"""A scripted expert for the 34 tasks that reads `envs.protocol.PrivilegedState` and nothing else.

It starts from any state of the robot, releases a block that its task does not need, and repeats a task until it is
given another one. `act` returns the clean action. The caller may execute `add_action_noise` of it while `noise_allowed`
is true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from envs.expert.motions import (
    FORWARD,
    FRONT_LIMIT_Y,
    MAX_TRACKING_ERROR,
    YAW_RANGE,
    ActionStream,
    MotionBlocked,
    MotionPrimitives,
    align_yaw,
    gripper_euler,
    nearest_valid_yaw,
    retreat_axis,
    safe_tilt,
)
from envs.protocol import MAX_REL_POS, PrivilegedState
from envs.tasks import HELD_BLOCK_TASKS, TABLE_LIFT_TASKS, check_tasks

SETTLE_STEPS = 12  # steps to wait after an attempt before the next one
ROTATE_ANGLE = np.radians(76)  # commanded; the task requires 60 degrees
MIN_HOLD_ANGLE = np.radians(64)  # a grasp that allows this rotation is enough, without grasping again
PUSH_DISTANCE = 0.135  # m; the task requires 0.1
DRAWER_REACH = 0.13  # m in x from the middle of the drawer, within which a block falls into it
HALF_OPEN = 0.066  # m from the middle of the open gripper to the outside of a finger
DOOR_WIDTH = 0.28  # m
UP_FRONT_AXIS = np.array([0.0, 0.5, 0.866])  # direction of the switch, up along the slanted front
OUT_OF_FRONT_AXIS = np.array([0.0, -0.866, 0.5])
CABINET_TILT = 0.45  # rad, with the fingers in front of the slanted front
REACHING_TILT = (0.85, 0.7, 0.95)  # rad, fingers inside the cabinet and hand outside; one for each attempt


def block_of(task: str) -> str:
    """The block in the name of a task: lift_red_block_table -> block_red."""
    return f"block_{task.split('_')[1]}"


def add_action_noise(action: np.ndarray, rng: np.random.Generator, sigma: float, *, noise_allowed: bool) -> np.ndarray:
    """The action (7,) to execute: while noise is allowed, Gaussian noise on the six pose entries, clipped to [-1, 1].

    `sigma` is the standard deviation for the translation; for the rotation it is half of it.
    """
    if sigma == 0 or not noise_allowed:
        return action
    noisy = action.copy()
    noisy[:6] = np.clip(action[:6] + rng.normal(0, sigma, 6) * [1, 1, 1, 0.5, 0.5, 0.5], -1, 1)
    return noisy


class ScriptedExpert(MotionPrimitives):
    """Carries out one task at a time; it implements `envs.protocol.Expert`."""

    def __init__(self, state: PrivilegedState, seed: int = 0) -> None:
        super().__init__(state, np.random.default_rng(seed))
        self._actions: ActionStream = iter(())
        self._task = ""
        self._attempt = 0
        self._last_held: str | None = None

    def reset(self, task: str) -> None:
        """Start on a task. Raises UserError for an unknown one."""
        check_tasks((task,))
        self._task = task
        self.gripper_action = self.state.gripper_action()
        self._speed = 0.0
        self.cruise_speed = float(self.rng.uniform(0.55, 0.85))
        self._last_held = self.held_block()
        self._attempt = 0
        self._actions = self._attempts(task)

    def act(self) -> np.ndarray:
        """The next clean action (7,), float64, with entries in [-1, 1] and the gripper -1 or 1."""
        if not self._task:
            raise RuntimeError("the expert has no task: call reset(task) first")
        return next(self._actions)

    def _attempts(self, task: str) -> Iterator[np.ndarray]:
        """The actions of one attempt after the other, for ever."""
        if task not in HELD_BLOCK_TASKS and self.held_block() is not None:
            yield from self.release()
        yield from self.retreat(block_of(task) if task in TABLE_LIFT_TASKS else None)
        while True:
            try:
                yield from self._skill(task)()
                yield from self.wait(SETTLE_STEPS)
            except MotionBlocked:
                yield from self.sync_target()
                yield from self.move_to(self.state.target_pose()[0] + [0, -0.05, 0.05], push_on=True, max_steps=20)
            self._attempt += 1

    def _skill(self, task: str) -> Callable[[], ActionStream]:
        """The method that carries out a task."""
        words = task.split("_")
        if words[0] == "lift":
            return lambda: self.lift(block_of(task), words[3])
        if words[0] == "rotate":
            return lambda: self.rotate(block_of(task), ROTATE_ANGLE if words[3] == "left" else -ROTATE_ANGLE)
        if words[0] == "push" and words[2] == "block":
            return lambda: self.push(block_of(task), 1 if words[3] == "right" else -1)
        return {
            "move_slider_left": lambda: self.slide(left=True),
            "move_slider_right": lambda: self.slide(left=False),
            "turn_on_led": self.press_button,
            "turn_off_led": self.press_button,
        }.get(task) or getattr(self, task)

    # ---- fixtures

    def open_drawer(self) -> ActionStream:
        """Hook the closed fingers behind the handle and pull the drawer out."""
        bar = -0.212 - self.state.joint_position("base__drawer")
        x, euler = self.state.fixtures.drawer_x + self._jitter(0.05), gripper_euler(tilt=0.2)
        yield from self.move_above(x, bar, euler, height=0.55, gripper_action=-1)
        yield from self.move_to([x, bar, 0.375], euler, speed=0.85, no_noise=True)
        yield from self.move_to(
            [x, -0.212 - self.state.joint_limit("base__drawer") - 0.02, 0.375], euler, speed=0.85, push_on=True
        )

    def close_drawer(self) -> ActionStream:
        """Push the front of the drawer with the closed fingers."""
        front = -0.32 - self.state.joint_position("base__drawer")
        x, euler = self.state.fixtures.drawer_x + self._jitter(0.05), gripper_euler()
        yield from self.move_above(x, front, euler, height=0.55, gripper_action=-1)
        yield from self.move_to([x, front, 0.37], euler, speed=0.85, no_stop=True)
        yield from self.move_to([x, -0.235, 0.37], euler, speed=0.8, push_on=True)

    def slide(self, *, left: bool) -> ActionStream:
        """Push the handle of the sliding door to the end of its range, from the side opposite to the motion."""
        handle_x = self.handle_x()
        end = self.handle_x(self.state.joint_limit("base__slide") if left else 0.0)
        side = 0.052 if left else -0.052
        euler = gripper_euler(tilt=CABINET_TILT)
        yield from self.move_above(handle_x + side, -0.12, euler, gripper_action=-1)
        yield from self.move_to([handle_x + side, -0.09, 0.53], euler, no_stop=True)
        yield from self.move_to([handle_x + side, -0.005, 0.515], euler, speed=0.8, no_noise=True)
        yield from self.move_to([end + side * 0.3, -0.005, 0.515], euler, speed=0.8, push_on=True)

    def handle_x(self, slider: float | None = None) -> float:
        """x of the handle of the sliding door, at the present position of the slider or at a given one."""
        return (
            self.state.fixtures.slide_x0
            + 0.14
            - (self.state.joint_position("base__slide") if slider is None else slider)
        )

    def turn_on_lightbulb(self) -> ActionStream:
        """Push the bar of the switch up from below."""
        bar, euler = self._switch_bar(), gripper_euler(tilt=0.9)
        low = bar - 0.055 * UP_FRONT_AXIS
        yield from self.move_above(bar[0], -0.13, gripper_euler(tilt=0.45), gripper_action=-1)
        yield from self.move_to(low + 0.10 * OUT_OF_FRONT_AXIS, euler, no_stop=True)
        yield from self.move_to(low, euler, speed=0.8, no_noise=True)
        yield from self.move_to(low + 0.12 * UP_FRONT_AXIS, euler, speed=0.8, push_on=True)

    def turn_off_lightbulb(self) -> ActionStream:
        """Push the bar of the switch down from above."""
        bar, euler = self._switch_bar(), gripper_euler(tilt=0.5)
        high = bar + 0.055 * UP_FRONT_AXIS
        yield from self.move_above(bar[0], -0.08, euler, height=0.66, gripper_action=-1)
        yield from self.move_to(high + 0.06 * OUT_OF_FRONT_AXIS + 0.03 * UP_FRONT_AXIS, euler, no_stop=True)
        yield from self.move_to(high, euler, speed=0.8, no_noise=True)
        yield from self.move_to(high - 0.13 * UP_FRONT_AXIS, euler, speed=0.8, push_on=True)

    def press_button(self) -> ActionStream:
        """Press the button, which turns the LED on or off, and move up again."""
        x, y, _ = self.state.fixtures.button
        x, y = x + self._jitter(0.01), y + self._jitter(0.01)
        yield from self.move_above(x, y, gripper_euler(), height=0.56, gripper_action=-1)
        yield from self.move_to([x, y, 0.46], gripper_euler(), speed=0.8, push_on=True, max_steps=25)
        yield from self.move_to([x, y, 0.54], gripper_euler(), no_stop=True)

    def _switch_bar(self) -> np.ndarray:
        """Present position (3,) of the bar of the switch, with a random offset along it."""
        x = self.state.fixtures.switch_x + self._jitter(0.02)
        return np.array([x, 0.023, 0.525]) + UP_FRONT_AXIS * self.state.joint_position("base__switch")

    def _jitter(self, reach: float) -> float:
        """A random offset in metres, uniform in [-reach, reach]."""
        return float(self.rng.uniform(-reach, reach))

    def _free_slider(self) -> ActionStream:
        """Move a door that is half open to its nearer end, so that one side of the cabinet is free."""
        slider, limit = self.state.joint_position("base__slide"), self.state.joint_limit("base__slide")
        if 0.02 < slider < limit - 0.02:
            yield from self.slide(left=slider > limit / 2)

    def _free_drawer(self) -> ActionStream:
        """Open the drawer unless it is open."""
        if self.state.joint_position("base__drawer") < 0.19:
            yield from self.open_drawer()

    # ---- blocks

    def lift(self, block: str, place: str) -> ActionStream:
        """Grasp a block and lift it. `place` is "table", "slider" or "drawer"; a door in the way is moved first."""
        if place == "slider":
            yield from self._free_slider()
        elif place == "drawer":
            yield from self._free_drawer()
        if place == "slider":
            # The wide hand fits best in front of the opening if it points straight into the cabinet.
            yaw = align_yaw(self.best_grasp_yaw(block), 0.3)
            tilt = REACHING_TILT[self._attempt % len(REACHING_TILT)]
            yield from self.grasp(block, tilt=tilt, yaw=yaw, offset=(self._cabinet_shift(block), 0.0, 0.004))
        else:
            free = place == "table"
            height = float(self.rng.uniform(-0.004, 0.008)) if free else 0.0
            yield from self.grasp(
                block, tilt=0.0 if place == "drawer" else None, offset=(0.0, 0.0, height), no_noise=not free
            )
        start = self.state.target_pose()[0]
        if place == "slider":
            yield from self.move_to(start + [0, -0.04, 0.07], speed=0.7, no_stop=True)
            yield from self.move_to(start + [0, -0.16, 0.14], speed=0.8)
        else:
            away = -0.06 if place == "table" and start[1] > FRONT_LIMIT_Y else 0.0
            yield from self.move_to(start + [0, away, 0.14], speed=0.7)

    def _cabinet_shift(self, block: str) -> float:
        """Offset along x of a grasp in the cabinet that keeps the open fingers away from walls and door."""
        x = self.state.block_pose(block)[0][0]
        low, high = self._cabinet_opening()
        return float(np.clip(np.clip(x, low + HALF_OPEN, high - HALF_OPEN) - x, -0.013, 0.013))

    def _cabinet_opening(self) -> tuple[float, float]:
        """The part of the cabinet that the door leaves open: lowest and highest x."""
        left, right = self.state.fixtures.plank_x
        door = self.state.fixtures.slide_x0 - self.state.joint_position("base__slide")
        if self.state.joint_position("base__slide") < self.state.joint_limit("base__slide") / 2:
            return left, min(door, right)
        return max(door + DOOR_WIDTH, left), right

    def rotate(self, block: str, angle: float) -> ActionStream:
        """Rotate a block about the vertical axis, with up to three grasps if the range of the wrist requires it."""
        for _ in range(3):
            yaw, turn = self._best_rotation_grasp(block, angle)
            yield from self.grasp(block, yaw=yaw)
            at = self.state.target_pose()[0]
            # Towards the robot, where the wide hand has room to rotate. The task allows the block to move by 0.1 m.
            at[1] -= np.clip(at[1] - FRONT_LIMIT_Y - 0.02, 0.0, 0.08)
            # Lifted off the table, so that the task succeeds only when the block is released: a block that is still
            # touched could not be lifted next.
            at[2] += 0.01
            yield from self.move_to(self.state.target_pose()[0] + [0, 0, 0.01], no_noise=True)
            yield from self.move_to(at, gripper_euler(yaw + turn), no_noise=True, push_on=True)
            yield from self.wait(3)
            yield from self.wait(6, 1)
            yield from self.move_to(self.state.target_pose()[0] + [0, 0, 0.06], no_stop=True)
            angle -= turn
            if abs(angle) < 0.03:
                return

    def _best_rotation_grasp(self, block: str, angle: float) -> tuple[float, float]:
        """Return (yaw of the grasp, rotation that the wrist can make from there).

        Among the grasps that allow the whole rotation, it is the one nearest to FORWARD at its start and its end; if
        there is none, the one that allows the largest rotation.
        """
        holds = []
        for period in range(-3, 4):
            for yaw in (base + period * np.pi for base in self.grasp_yaws(block)):
                if YAW_RANGE[0] < yaw < YAW_RANGE[1]:
                    holds.append((float(yaw), float(np.clip(yaw + angle, *YAW_RANGE) - yaw)))
        whole = [hold for hold in holds if abs(hold[1]) > min(abs(angle) - 0.03, MIN_HOLD_ANGLE)]
        if whole:
            # Near the front only the start matters, because the block is moved away from it during the rotation.
            near = self.state.block_pose(block)[0][1] > FRONT_LIMIT_Y + 0.02
            return min(whole, key=lambda hold: max(abs(hold[0] - FORWARD), 0.0 if near else abs(sum(hold) - FORWARD)))
        return max(holds, key=lambda hold: abs(hold[1]), default=(FORWARD, angle))

    def _half_extent(self, block: str, axis: int) -> float:
        """Half of the extent of a block along a world axis (0, 1 or 2), in metres."""
        return float(np.abs(self.state.block_pose(block)[1][axis]) @ self.state.block_size(block)) / 2

    def push(self, block: str, sign: int) -> ActionStream:
        """Push a block along x with the closed fingers, to +x for `sign` 1 and to -x for -1."""
        start = self.state.block_pose(block)[0]
        behind = start[0] - sign * (self._half_extent(block, 0) + 0.04)
        euler = gripper_euler(tilt=min(0.8, safe_tilt(start[1]) + 0.2 * self._attempt))
        yield from self.move_above(behind, start[1], euler, height=0.58, gripper_action=-1)
        yield from self.move_to([behind, start[1], 0.464], euler, speed=0.85, no_noise=True)
        tapped = False
        for _ in range(90):
            position, at = self.state.block_pose(block)[0], self.state.target_pose()[0]
            moved = sign * (position[0] - start[0])
            if moved > PUSH_DISTANCE:
                break
            if abs(at[0] - self.state.tcp_pose()[0][0]) > 2 * MAX_TRACKING_ERROR:
                raise MotionBlocked
            self._speed = min(self.cruise_speed, self._speed + 0.1)
            if not tapped and moved > 0.05:
                # Stop before the required distance: the block slides on and is not touched when the task succeeds.
                short = 0.1 - 12 * (self._speed * MAX_REL_POS) ** 2 - moved
                steps = max(1, round(short / (self._speed * MAX_REL_POS)))
                self._speed = min(1.0, short / (steps * MAX_REL_POS))
                for _ in range(steps):
                    yield self._push_step(block, sign, self._speed)
                yield self._push_step(block, sign, max(-1.0, -1.6 * self._speed))
                yield from self.wait(4)
                tapped = True
                continue
            yield self._push_step(block, sign, self._speed)

    def _push_step(self, block: str, sign: int, speed: float) -> np.ndarray:
        """An action along x that stays behind the middle of the block and just above the table.

        `speed` is a fraction of MAX_REL_POS per step; `sign` is 1 for +x and -1 for -x.
        """
        position, at = self.state.block_pose(block)[0], self.state.target_pose()[0]
        aside = np.clip(position[1] - at[1], -0.004, 0.004)
        return self.make_action([sign * speed * MAX_REL_POS, aside, 0.464 - at[2]])

    def push_into_drawer(self) -> ActionStream:
        """Push or drag the block nearest to the drawer over the edge of the table, so that it falls into the drawer."""
        yield from self._free_drawer()
        block = self._nearest_on_table(self.state.fixtures.drawer_x)
        if block is None:
            return
        position = self.state.block_pose(block)[0]
        behind = position[1] + self._half_extent(block, 1) + 0.035
        aside = abs(position[0] - self.state.fixtures.drawer_x) > DRAWER_REACH
        # The hand does not fit between the block and the slanted front, or the drawer is not straight ahead.
        if aside or behind > -0.05 or self._attempt % 2:
            yield from self._drag_into_drawer(block)
            return
        euler = gripper_euler(tilt=safe_tilt(behind))
        yield from self.move_above(position[0], behind, euler, height=0.58, gripper_action=-1)
        yield from self.move_to([position[0], behind, 0.466], euler, speed=0.85, no_noise=True)
        for _ in range(80):
            position, at = self.state.block_pose(block)[0], self.state.target_pose()[0]
            if position[2] < 0.42 or at[1] < -0.24:
                break
            if abs(at[1] - self.state.tcp_pose()[0][1]) > 2 * MAX_TRACKING_ERROR:
                raise MotionBlocked
            self._speed = min(self.cruise_speed * 0.7, self._speed + 0.1)
            yield self.make_action([np.clip(position[0] - at[0], -0.004, 0.004), -self._speed * MAX_REL_POS, 0])
        yield from self.move_to(self.state.target_pose()[0] + [0, 0.04, 0.04], speed=0.85)

    def _drag_into_drawer(self, block: str) -> ActionStream:
        """Grasp a block, drag it over the edge of the table and release it above the drawer."""
        yield from self.grasp(block)
        at, facing = self.state.target_pose()
        x = float(np.clip(at[0], *(self.state.fixtures.drawer_x + np.array([-0.08, 0.08]))))
        if abs(x - at[0]) > 0.01:  # over the blocks in between
            yield from self.move_to(at + [0, 0, 0.07], speed=0.7, no_stop=True)
            yield from self.move_to([x, -0.13, at[2] + 0.07], gripper_euler(facing[2]), no_stop=True)
        yield from self.move_to([x, -0.235, at[2] + 0.004], gripper_euler(facing[2]), speed=0.7, push_on=True)
        yield from self.wait(5, 1)
        yield from self.move_to(self.state.target_pose()[0] + [0, 0.02, 0.06], speed=0.85)

    def _nearest_on_table(self, x: float, exclude: str | None = None) -> str | None:
        """The block on the table that is nearest to a given x, with a penalty for blocks near the slanted front."""
        lying = [
            name
            for name in self.state.blocks
            if name != exclude
            and abs(self.state.block_pose(name)[0][2] - 0.46) < 0.015
            and self.state.block_pose(name)[0][1] < 0.02
        ]

        def effort(name: str) -> float:
            position = self.state.block_pose(name)[0]
            return float(abs(position[0] - x) + 3 * max(0.0, position[1] - FRONT_LIMIT_Y))

        return min(lying, key=effort, default=None)

    def _ensure_grasped(self) -> ActionStream:
        """Make sure that a block is held: if it was lost, it is grasped again where it lies."""
        if (held := self.held_block()) is not None:
            self._last_held = held
            return
        if self._last_held is None:
            tcp = self.state.tcp_pose()[0]
            self._last_held = min(
                self.state.blocks, key=lambda name: np.linalg.norm(self.state.block_pose(name)[0] - tcp)
            )
        _, y, z = self.state.block_pose(self._last_held)[0]
        yield from self.lift(self._last_held, "drawer" if z < 0.42 else "table" if y < 0.02 else "slider")

    def place_in_drawer(self) -> ActionStream:
        """Put the held block into the drawer."""
        yield from self._ensure_grasped()
        y = -0.18 - self.state.joint_position("base__drawer") / 2
        yield from self.place(
            [self.state.fixtures.drawer_x + self._jitter(0.06), y, 0.40], self.state.target_pose()[1][2]
        )

    def place_in_slider(self) -> ActionStream:
        """Put the held block into the open side of the cabinet, where there is most room."""
        yield from self._ensure_grasped()
        low, high = self._cabinet_opening()
        centre = (low + high) / 2
        places = np.linspace(low + 0.06, high - 0.06, 18)
        inside = [self.state.block_pose(name)[0] for name in self.state.blocks if name != self._last_held]
        taken = [position[0] for position in inside if position[1] > 0.01]
        room = [min([abs(x - other) for other in taken] + [0.2]) - 0.15 * abs(x - centre) for x in places]
        x = float(places[int(np.argmax(room))])
        yield from self.place([x, 0.085, 0.47], FORWARD, tilt=CABINET_TILT, ready=0.12)

    def stack_block(self) -> ActionStream:
        """Put the held block on top of the nearest other one."""
        yield from self._ensure_grasped()
        below = self._nearest_on_table(self.state.tcp_pose()[0][0], exclude=self._last_held)
        if below is None:
            return
        position = self.state.block_pose(below)[0]
        offset = self.state.block_pose(self._last_held)[0] - self.state.tcp_pose()[0]
        present = float(self.state.target_pose()[1][2])
        yaw = min((nearest_valid_yaw(y) for y in self.grasp_yaws(below)), key=lambda y: abs(y - present))
        if position[1] > FRONT_LIMIT_Y:
            yaw = FORWARD
            position[1] -= 0.01  # so that the upper block does not touch a handle
        yield from self.place([*position[:2], position[2] + 0.043 - offset[2]], yaw, tilt=0.5 * safe_tilt(position[1]))

    def unstack_block(self) -> ActionStream:
        """Grasp a block that lies on another one and lift it."""
        tops = [
            name
            for name in self.state.blocks
            if self.state.block_pose(name)[0][2] > 0.49 and self.state.get_contacts(name) & set(self.state.blocks)
        ]
        if not tops:
            return
        yield from self.grasp(tops[0], height=0.62)
        yield from self.move_to(self.state.target_pose()[0] + [0, 0, 0.12], speed=0.7)

    def place(self, position: list[float], yaw: float, *, tilt: float = 0.0, ready: float = 0.08) -> ActionStream:
        """Move the held block to a pose of the hand, release it and retreat.

        position: of the tool, in metres. ready: distance in metres along the fingers from which it approaches
        the pose.
        """
        place, euler, back = np.array(position), gripper_euler(yaw, tilt), retreat_axis(yaw, tilt)
        above = place + ready * back
        self.gripper_action = -1
        yield from self.sync_target()
        yield from self.move_up()
        yield from self.move_to([place[0], above[1], self.state.target_pose()[0][2]], euler, no_stop=True)
        yield from self.move_to(above, euler, speed=0.85, no_stop=True)
        yield from self.move_to(place, euler, speed=0.65, no_noise=True)
        yield from self.wait(5, 1)
        yield from self.move_to(place + 0.08 * back, euler, speed=0.8)
