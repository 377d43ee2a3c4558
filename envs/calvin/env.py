"""The real CALVIN: `calvin_env` with the interface of `envs.protocol` (Sec. 4.2).

Physics, images, infos and success detection are those of calvin_env. Sentences, sequences and initial states come from
`envs.tasks` and `envs.sequences`, which repeat CALVIN's; tests compare them. Rendering takes 95 % of a step, so images
are rendered only by `get_obs`. A process can hold one CalvinEnv at a time, because calvin_env always addresses the
first simulator of the process.
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

MAX_LOADS_PER_CONNECTION = 50  # pybullet keeps up to 11 MB of each loaded scene until it is disconnected
REFERENCE_STATE = sequences.INITIAL_STATES[0]


class CalvinEnv:
    """CALVIN's scene "A", "B", "C" or "D"; see `envs.protocol.Env` for its methods.

    seed: of the block poses that `reset` draws when it is called without arguments. static_size, gripper_size: edges of
    the images in pixels. renderer: "egl", "cpu" (TinyRenderer, whose images differ from those of the dataset) or
    "auto", which is EGL if there is a GPU. Raises CalvinError if calvin_env is not installed or does not start.
    """

    embodiment = "robot"  # what the images show

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
        # calvin_env renders all cameras it has in each step, so they are taken away from it.
        self._cameras, self._sim.cameras = self._sim.cameras, []
        self._loads = 1
        self._setup_references()

    def _setup_references(self) -> None:
        """Look up bodies by uid and links by number, as contacts refer to them, and moving parts by name."""
        scene = self._sim.scene
        self._table = scene.fixed_objects[0]
        self._links = {number: name for name, number in self._table.info_dict["links"].items()}
        self._uids = {block.name: block.uid for block in scene.movable_objects}
        self._bodies = {**{uid: name for name, uid in self._uids.items()}, self._sim.robot.robot_uid: "robot"}
        self._parts = {part.name: part for part in (*scene.doors, *scene.buttons, *scene.switches)}
        if tuple(self._uids) != self.scene.block_names:
            raise simulator.CalvinError(
                f"scene {self.scene.name} of calvin_env lists the blocks {', '.join(self._uids)}, not "
                f"{', '.join(self.scene.block_names)}: it is not the published scene; {simulator.INSTALL_HINT}"
            )

    def _render_reference_hash(self) -> str:
        """Hash of the two images of one fixed state. It is equal if renderer, assets and cameras are equal."""
        self.reset(dict(REFERENCE_STATE))
        images = self.get_obs()["rgb_obs"]
        return hashlib.sha256(b"".join(image.tobytes() for image in images.values())).hexdigest()[:16]

    # ---- measurements, see `envs.protocol.PrivilegedState`

    @property
    def gripper_action(self) -> int:
        """The last gripper command: -1 closes, 1 opens."""
        return int(self._sim.robot.gripper_action)

    @property
    def lights(self) -> dict[str, int]:
        """Name of each light -> 1 if it is on, else 0."""
        return {light.name: int(light.get_state()) for light in self._sim.scene.lights}

    def tcp_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Measured position (3,) and Euler angles (3,) of the tool."""
        robot = self._sim.robot
        position, quaternion = self._bullet.getLinkState(robot.robot_uid, robot.tcp_link_id)[:2]
        return np.array(position), np.array(self._bullet.getEulerFromQuaternion(quaternion))

    def target_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Commanded position (3,) and Euler angles (3,) of the tool, to which actions are added."""
        return self._sim.robot.target_pos.copy(), self._sim.robot.target_orn.copy()

    def gripper_opening_width(self) -> float:
        """Distance between the fingers, 0 to 0.08 m."""
        robot = self._sim.robot
        return float(sum(self._bullet.getJointState(robot.robot_uid, number)[0] for number in robot.gripper_joint_ids))

    def joint_position(self, name: str) -> float:
        """Position of the joint of a fixture in metres."""
        return float(self._parts[name].get_state())

    def block_pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Centre (3,) and rotation matrix (3, 3) of a block."""
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
        """Set a symbolic state, or robot_obs (15,) and scene_obs (24,). Returns the observation without images.

        The scene is loaded again, because Bullet keeps contacts over a reset. So what follows depends on the state
        alone, and a run that was interrupted equals one that was not. The last gripper command, which calvin_env keeps
        over a reset, is set from robot_obs[14] for the same reason. By default the robot is in its neutral pose and
        calvin_env draws the poses of the blocks. Raises ValueError for vectors of a wrong shape or with NaN.
        """
        if state is not None:
            if robot_obs is not None or scene_obs is not None:
                raise ValueError("reset takes a symbolic state or vectors, not both")
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
        """Execute an action (7,) for one control step of 1/30 s and return (observation, info).

        Raises ValueError for an action of another shape or with NaN.
        """
        # as_vector copies: some versions of calvin_env scale the caller's array in place.
        action = as_vector("action", action, 7)
        action[6] = 1.0 if action[6] > 0 else -1.0
        observation, _, _, info = self._sim.step(action)
        return (self.get_obs() if render else _state_obs(observation)), info

    def get_obs(self) -> dict:
        """The present observation, with the uint8 RGB images `rgb_static` and `rgb_gripper` in `rgb_obs`."""
        images = {
            f"rgb_{camera.name}": np.ascontiguousarray(camera.render()[0], dtype=np.uint8) for camera in self._cameras
        }
        return {"rgb_obs": images, **self._sim.get_state_obs()}

    def get_info(self) -> dict[str, Any]:
        """CALVIN's info, of which `check_success` compares two."""
        return self._sim.get_info()

    # ---- evaluation

    def get_sequences(
        self, count: int, *, tasks: list[str] | None = None, length: int = 5, seed: int = 0
    ) -> list[tuple[dict, list[str]]]:
        """`count` pairs of (symbolic initial state, tasks in a row), see `envs.sequences.get_sequences`.

        Raises UserError if the default ones differ from CALVIN's published list.
        """
        pairs = sequences.get_sequences(count, tasks=tasks, length=length, seed=seed)
        if tuple(tasks or TASKS) == TASKS and length == 5 and seed == 0:
            sequences.check_published_sequences(pairs)
        return pairs

    def instruction(self, task: str) -> str:
        """The sentence that the policy is given for a task."""
        return tasks.INSTRUCTIONS[tasks.check_tasks([task])[0]]

    def check_success(self, task: str, start_info: dict, end_info: dict) -> bool:
        """Whether `task` was carried out between two infos, by CALVIN's own code."""
        tasks.check_tasks([task])
        return bool(self._task_oracle.get_task_info_for_set(start_info, end_info, {task}))

    def expert(self, seed: int = 0) -> expert.ScriptedExpert:
        """A new scripted expert that reads the state of this environment."""
        return expert.ScriptedExpert(PlayTableState(self), seed)

    def versions(self) -> dict[str, str]:
        """Versions of simulator, renderer and Python, and a hash of the images of one fixed state."""
        return {
            "simulator": self._version,
            "renderer": self._renderer.name,
            "reference_frame": self._reference_hash,
            "python": platform.python_version(),
        }

    def resolved_options(self) -> dict[str, str]:
        """The renderer that was chosen for "auto"."""
        return {"renderer": "egl" if self._renderer.egl else "cpu"}

    def close(self) -> None:
        """Free the simulator. A second call does nothing."""
        if self._sim is not None:
            simulator.close_simulator(self._sim)
            self._sim = None


TabletopEnv = PlayTableEnv | CalvinEnv  # the environments with CALVIN's table, in which demonstrations are recorded


def _state_obs(observation: dict) -> dict:
    return {key: observation[key] for key in ("robot_obs", "scene_obs")}
