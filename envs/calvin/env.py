"""The real CALVIN in playtable's clothes: `calvin_env` behind the same interface and the same privileged state (Sec.
4.2; DESIGN 6, 7).

Physics, pictures, infos and the oracle are calvin_env's own; sentences, sequences and initial states are CALVIN's
numbers, which
playtable repeats (tests compare them). Vectors are those of `envs.playtable.env`. Pictures cost 95 % of a step and are drawn
when
`get_obs` asks for them. One world in a process: calvin_env addresses the first one only.
"""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import numpy as np

from envs import sequences, tasks
from envs.calvin import simulator
from envs.expert import expert
from envs.playtable.env import NEUTRAL_ROBOT_OBS, PlayTableEnv, PlayTableState, as_vector
from envs.playtable.scene import get_scene
from envs.tasks import TASKS

MAX_LOADS_PER_CONNECTION = 50  # pybullet keeps up to 11 MB of a world it has loaded until it is disconnected
REFERENCE_STATE = sequences.INITIAL_STATES[0]


class CalvinEnv:
    """CALVIN's scene "A" to "D". `seed` drives the poses that a reset without arguments draws.

    `renderer` is "egl", "cpu" (TinyRenderer, whose look differs from the dataset's) or "auto": EGL where there is a
    GPU.
    Raises simulator.CalvinError, which names the README's steps, where calvin_env is not installed.
    """

    def __init__(
        self, scene: str = "D", seed: int = 0, *, static_size: int = 200, gripper_size: int = 84, renderer: str = "auto"
    ) -> None:
        self.scene = get_scene(scene)
        self.name = f"calvin-{scene}"
        self._bullet, package = simulator.import_calvin_env()
        self._version = simulator.version(package)
        self._renderer = simulator.choose_renderer(renderer)
        folder = simulator.checkout_root(package)
        self._config = simulator.make_config(
            folder, scene, static_size=static_size, gripper_size=gripper_size, egl=self._renderer.egl
        )
        self._task_oracle = simulator.make_task_oracle(folder)
        self._rng = np.random.default_rng(seed)
        self._sim: Any = None
        self._connect()
        self._reference_hash = self._render_reference_hash()

    def _connect(self) -> None:
        if self._sim is not None:
            simulator.close_simulator(self._sim)
        self._sim = simulator.create_simulator(self._config, int(self._rng.integers(2**31)))
        # calvin_env draws in each step what cameras it has: it gets none
        self._cameras, self._sim.cameras = self._sim.cameras, []
        self._loads = 1
        self._setup_references()

    def _setup_references(self) -> None:
        """Bodies by uid and links by number, as contacts name them, and the moving parts by name."""
        scene = self._sim.scene
        self._table = scene.fixed_objects[0]
        self._links = {number: name for name, number in self._table.info_dict["links"].items()}
        self._uids = {block.name: block.uid for block in scene.movable_objects}
        self._bodies = {**{uid: name for name, uid in self._uids.items()}, self._sim.robot.robot_uid: "robot"}
        self._parts = {part.name: part for part in (*scene.doors, *scene.buttons, *scene.switches)}
        if tuple(self._uids) != self.scene.block_names:
            raise simulator.CalvinError(
                f"calvin_env's scene {self.scene.name} lists the blocks {', '.join(self._uids)}, not "
                f"{', '.join(self.scene.block_names)}: it is not the published one; {simulator.INSTALL_HINT}"
            )

    def _render_reference_hash(self) -> str:
        """Hash of one pair of pictures: the same where renderer, assets and cameras are."""
        self.reset(dict(REFERENCE_STATE))
        images = self.get_obs()["rgb_obs"]
        return hashlib.sha256(b"".join(picture.tobytes() for picture in images.values())).hexdigest()[:16]

    # ---- readings, see `envs.protocol`

    @property
    def gripper_action(self) -> int:
        """-1 closes and 1 opens."""
        return int(self._sim.robot.gripper_action)

    @property
    def lights(self) -> dict[str, int]:
        """1 for a light that is on."""
        return {light.name: int(light.get_state()) for light in self._sim.scene.lights}

    def tcp_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Measured tool position (3,) and Euler angles (3,)."""
        robot = self._sim.robot
        position, quaternion = self._bullet.getLinkState(robot.robot_uid, robot.tcp_link_id)[:2]
        return np.array(position), np.array(self._bullet.getEulerFromQuaternion(quaternion))

    def target_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Commanded tool position (3,) and Euler angles (3,), which actions are added to."""
        return self._sim.robot.target_pos.copy(), self._sim.robot.target_orn.copy()

    def gripper_opening_width(self) -> float:
        """Sum of both fingers' travel, 0 to 0.08 m."""
        robot = self._sim.robot
        return float(sum(self._bullet.getJointState(robot.robot_uid, number)[0] for number in robot.gripper_joint_ids))

    def joint_position(self, name: str) -> float:
        """Position of a fixture's joint in metres."""
        return float(self._parts[name].get_state())

    def block_pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A block's centre (3,) and rotation matrix (3, 3)."""
        position, quaternion = self._bullet.getBasePositionAndOrientation(self._uids[name])
        return np.array(position), np.array(self._bullet.getMatrixFromQuaternion(quaternion)).reshape(3, 3)

    def get_contacts(self, name: str) -> frozenset[str]:
        """Names of what a block touches: "robot", "floor", other blocks or links of the table."""
        contacts = self._bullet.getContactPoints(bodyA=self._uids[name])
        return frozenset(
            self._links[c[4]] if c[2] == self._table.uid else self._bodies.get(c[2], "floor") for c in contacts
        )

    # ---- the environment

    def reset(
        self, state: dict | None = None, *, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None
    ) -> dict:
        """Put the world into a symbolic state or into raw vectors; returns the observation without pictures.

        The world is loaded anew, since Bullet keeps contacts over a reset: what follows depends on the state alone, and
        a run that goes
        on equals an unbroken one. So does the gripper's last command (robot_obs[14]), which calvin_env keeps. Without
        arguments the robot
        takes its neutral pose and calvin_env draws the blocks. Raises ValueError for vectors of a wrong shape or with
        NaN.
        """
        if state is not None:
            if robot_obs is not None or scene_obs is not None:
                raise ValueError("reset takes a symbolic state or raw vectors, not both")
            robot_obs, scene_obs = sequences.get_env_state_for_initial_condition(state, self.scene)
        robot_obs = as_vector("robot_obs", NEUTRAL_ROBOT_OBS if robot_obs is None else robot_obs, 15)
        scene_obs = None if scene_obs is None else as_vector("scene_obs", scene_obs, 24)
        self._load()
        self._sim.robot.gripper_action = 1 if robot_obs[14] > 0 else -1
        return _state_obs(self._sim.reset(robot_obs=robot_obs, scene_obs=scene_obs))

    def _load(self) -> None:
        if self._loads == MAX_LOADS_PER_CONNECTION:
            self._connect()
            return
        self._sim.load()
        self._loads += 1
        self._setup_references()

    def step(self, action: np.ndarray, *, render: bool = True) -> tuple[dict, dict]:
        """One control step of 1/30 s -> (observation, info).

        `action` (7,): shift and turn in world axes in units of 0.02 m and 0.05 rad, added to the commanded pose; then
        the gripper, open where positive and closed otherwise. Raises ValueError for another shape or NaN.
        """
        # a copy, for some versions of calvin_env scale the caller's array in place
        action = as_vector("action", action, 7)
        action[6] = 1.0 if action[6] > 0 else -1.0
        observation, _, _, info = self._sim.step(action)
        return (self.get_obs() if render else _state_obs(observation)), info

    def get_obs(self) -> dict:
        """The present observation with pictures: uint8 RGB `rgb_static` and `rgb_gripper` under `rgb_obs`."""
        images = {
            f"rgb_{camera.name}": np.ascontiguousarray(camera.render()[0], dtype=np.uint8) for camera in self._cameras
        }
        return {"rgb_obs": images, **self._sim.get_state_obs()}

    def get_info(self) -> dict[str, Any]:
        """CALVIN's privileged info, which the oracle compares between two moments."""
        return self._sim.get_info()

    # ---- the benchmark

    def get_sequences(
        self, count: int, *, tasks: list[str] | None = None, length: int = 5, seed: int = 0
    ) -> list[tuple[dict, list[str]]]:
        """`count` pairs of (symbolic initial state, tasks in a row). Raises RuntimeError where the default ones are not
        CALVIN's."""
        pairs = sequences.get_sequences(count, tasks=tasks, length=length, seed=seed)
        if tuple(tasks or TASKS) == TASKS and length == 5 and seed == 0:
            sequences.check_published_sequences(pairs)
        return pairs

    def instruction(self, task: str) -> str:
        """The sentence that stands for a task in an evaluation."""
        return tasks.INSTRUCTIONS[tasks.check_tasks([task])[0]]

    def check_success(self, task: str, start_info: dict, end_info: dict) -> bool:
        """CALVIN's own oracle: was `task` carried out between two infos?"""
        tasks.check_tasks([task])
        return bool(self._task_oracle.get_task_info_for_set(start_info, end_info, {task}))

    def expert(self, seed: int = 0) -> expert.ScriptedExpert:
        """A scripted expert that reads this environment's state."""
        return expert.ScriptedExpert(PlayTableState(self), seed)

    def versions(self) -> dict[str, str]:
        """Simulator and renderer, and what the renderer makes of one fixed state."""
        return {
            "simulator": self._version,
            "renderer": self._renderer.name,
            "reference_frame": self._reference_hash,
            "python": platform.python_version(),
        }

    def resolved_options(self) -> dict[str, str]:
        """What "auto" came to, for others that are to draw alike."""
        return {"renderer": "egl" if self._renderer.egl else "cpu"}

    def close(self) -> None:
        """End the simulator; a second call does nothing."""
        if self._sim is not None:
            simulator.close_simulator(self._sim)
            self._sim = None


TabletopEnv = PlayTableEnv | CalvinEnv  # what demonstrations are recorded in


def _state_obs(observation: dict) -> dict:
    return {key: observation[key] for key in ("robot_obs", "scene_obs")}
