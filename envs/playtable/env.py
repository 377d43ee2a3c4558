"""The play table as an environment with CALVIN's observations, actions, infos and protocol (Sec. 4.2).

`envs.protocol` describes the vectors robot_obs (15,), scene_obs (24,) and action (7,).
"""

from __future__ import annotations

import platform
from typing import Any, NamedTuple

import mujoco
import numpy as np

from common.errors import UserError
from envs import sequences, tasks
from envs.expert import expert
from envs.playtable import mjcf
from envs.playtable.kinematics import ArmKinematics, euler_from_matrix, matrix_from_euler, quaternion_from_matrix
from envs.playtable.render import Renderer
from envs.playtable.scene import MAX_GRIPPER_WIDTH, ROBOT_BASE, get_scene
from envs.protocol import CONTROL_FREQ, MAX_REL_ORN, MAX_REL_POS, Fixtures
from envs.sequences import NEUTRAL_JOINTS

SUBSTEPS = round(1 / (CONTROL_FREQ * mjcf.TIMESTEP))
CLOSING_FORCE, OPENING_FORCE = 160.0, 4.0  # N on both fingers; a weak opening force does not push away nearby blocks
DOORS, BUTTON, SWITCH = ("base__slide", "base__drawer"), "base__button", "base__switch"
LIGHT_ON_RGB = {"lightbulb": (1.0, 0.95, 0.1), "led": (0.05, 0.95, 0.15)}
LIGHT_OFF_RGB = (0.93, 0.93, 0.9)
MAX_PLACEMENT_TRIES = 1000
ENV_NAMES = {"robot": "playtable", "hand": "playtable_hand"}  # what the images show -> name of the environment
NEUTRAL_ROBOT_OBS = np.array(sequences.NEUTRAL_ROBOT_OBS)


class Contact(NamedTuple):
    """One contact of a body with another one, in the order of pybullet's getContactPoints."""

    flag: int
    body: int
    other: int
    link: int
    other_link: int


class PlayTableEnv:
    """A simulated table of scene "A", "B", "C" or "D"; see `envs.protocol.Env` for its methods.

    seed: of the block poses that `reset` draws when it is called without arguments. static_size, gripper_size: edges of
    the images in pixels. embodiment: what the images show, a "robot" or a person's "hand"; the physics are the same.
    Raises UserError for an unknown scene or embodiment and for a size outside 8 to 2048.
    """

    def __init__(
        self,
        scene: str = "D",
        seed: int = 0,
        *,
        static_size: int = 200,
        gripper_size: int = 84,
        embodiment: str = "robot",
    ) -> None:
        if embodiment not in ENV_NAMES:
            raise UserError(f"embodiment={embodiment!r}: choose one of {', '.join(ENV_NAMES)}")
        for name, size in (("static_size", static_size), ("gripper_size", gripper_size)):
            if not 8 <= size <= 2048:
                raise UserError(f"{name}={size}: choose an image edge of 8 to 2048 pixels")
        self.scene = get_scene(scene)
        self.embodiment = embodiment
        self.name = f"{ENV_NAMES[embodiment]}-{scene}"
        self.static_size, self.gripper_size = static_size, gripper_size
        self.lights = dict.fromkeys(LIGHT_ON_RGB, 0)
        self.gripper_action = 1
        self._model = mjcf.compile_model(self.scene, max(static_size, gripper_size), human_arm=embodiment == "hand")
        self._data = mujoco.MjData(self._model)
        self._kinematics = ArmKinematics(ROBOT_BASE, NEUTRAL_JOINTS)
        self._rng = np.random.default_rng(seed)
        self._renderer: Renderer | None = None
        self._target_pose = (np.zeros(3), np.zeros(3))
        self._target_joints = np.array(NEUTRAL_JOINTS)
        self._switch_on = self._button_down = False
        self._setup_references()
        self.reset()

    def _setup_references(self) -> None:
        """Look up addresses in MuJoCo's arrays, and the body and link that each geom belongs to."""
        m = self._model
        names = [
            *(f"arm_{i}" for i in range(1, 8)),
            "finger_left",
            "finger_right",
            *mjcf.FIXTURE_JOINTS,
            *self.scene.blocks,
        ]
        self._qpos = {name: int(m.joint(name).qposadr[0]) for name in names}
        self._qvel = {name: int(m.joint(name).dofadr[0]) for name in names}
        self._arm_qpos = np.array([self._qpos[f"arm_{i}"] for i in range(1, 8)])
        self._tcp_site = m.site("tcp").id
        self._gripper_actuator = m.actuator("grip").id
        self.uids = {"robot": 0, "table": 1, **{name: 2 + i for i, name in enumerate(self.scene.blocks)}, "floor": 9}
        self.links: dict[str, int] = {"base_link": -1}
        self._geom_owner: list[tuple[int, int]] = []
        table, robot = m.body("base_link").id, m.body("link0").id
        chains = [self._ancestors(int(body)) for body in m.geom_bodyid]
        for body, chain in zip(m.geom_bodyid, chains):
            name = m.body(int(body)).name
            if table in chain:
                self._geom_owner.append((self.uids["table"], self.links.setdefault(name, len(self.links) - 1)))
            elif robot in chain:
                self._geom_owner.append((self.uids["robot"], int(body) - robot - 1))
            else:
                self._geom_owner.append((self.uids.get(name, self.uids["floor"]), -1))

    def _ancestors(self, body: int) -> set[int]:
        chain = {body}
        while body:
            body = int(self._model.body_parentid[body])
            chain.add(body)
        return chain

    # ---- measurements, see `envs.protocol.PrivilegedState`

    def tcp_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Measured position (3,) and Euler angles (3,) of the tool."""
        rotation = self._data.site_xmat[self._tcp_site].reshape(3, 3)
        return self._data.site_xpos[self._tcp_site].copy(), euler_from_matrix(rotation)

    def target_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Commanded position (3,) and Euler angles (3,) of the tool, to which actions are added."""
        return self._target_pose[0].copy(), self._target_pose[1].copy()

    def gripper_opening_width(self) -> float:
        """Distance between the fingers, 0 to 0.08 m."""
        return self.joint_position("finger_left") + self.joint_position("finger_right")

    def joint_position(self, name: str) -> float:
        """Position of the joint of a fixture or a finger in metres."""
        return float(self._data.qpos[self._qpos[name]])

    def block_pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Centre (3,) and rotation matrix (3, 3) of a block."""
        body = self._data.body(name)
        return body.xpos.copy(), body.xmat.reshape(3, 3).copy()

    def get_contacts(self, name: str) -> frozenset[str]:
        """Names of what a block touches: "robot", "floor", other blocks or links of the table."""
        links = {number: link for link, number in self.links.items()}
        bodies = {number: body for body, number in self.uids.items()}
        touched = self._contacts()[self.uids[name]]
        return frozenset(links[c.other_link] if c.other == self.uids["table"] else bodies[c.other] for c in touched)

    def _contacts(self) -> dict[int, list[Contact]]:
        """Uid of each body -> its contacts. As in pybullet, bodies up to 2 mm apart are in contact."""
        found: dict[int, set[Contact]] = {uid: set() for uid in self.uids.values()}
        for first, second in self._data.contact.geom:
            one, two = self._geom_owner[first], self._geom_owner[second]
            found[one[0]].add(Contact(0, one[0], two[0], one[1], two[1]))
            found[two[0]].add(Contact(0, two[0], one[0], two[1], one[1]))
        return {uid: sorted(contacts) for uid, contacts in found.items()}

    # ---- the environment

    def reset(
        self,
        state: dict | None = None,
        *,
        robot_obs: np.ndarray | None = None,
        scene_obs: np.ndarray | None = None,
    ) -> dict:
        """Set a symbolic state, or robot_obs (15,) and scene_obs (24,). Returns the observation without images.

        By default the robot is in its neutral pose, the doors are closed, the lights are off, and the blocks lie at
        random poses on the surfaces of the scene. Raises ValueError for vectors of a wrong shape or with NaN.
        """
        if state is not None:
            if robot_obs is not None or scene_obs is not None:
                raise ValueError("reset takes a symbolic state or vectors, not both")
            robot_obs, scene_obs = sequences.get_env_state_for_initial_condition(state, self.scene)
        robot_obs = as_vector("robot_obs", NEUTRAL_ROBOT_OBS if robot_obs is None else robot_obs, 15)
        scene_obs = self._sample_scene() if scene_obs is None else as_vector("scene_obs", scene_obs, 24)
        mujoco.mj_resetData(self._model, self._data)
        self._set_state(robot_obs, scene_obs)
        mujoco.mj_forward(self._model, self._data)
        self._target_pose = self.tcp_pose()
        self._button_down = self._pressed(BUTTON)
        self._switch_on = False
        return self._state_obs()

    def _set_state(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> None:
        qpos = self._data.qpos
        self._target_joints = robot_obs[7:14].copy()
        qpos[self._arm_qpos] = self._target_joints
        qpos[[self._qpos["finger_left"], self._qpos["finger_right"]]] = robot_obs[6] / 2
        self.gripper_action = 1 if robot_obs[14] > 0 else -1
        self._set_control()
        for name, value in zip(mjcf.FIXTURE_JOINTS, scene_obs[:4]):
            qpos[self._qpos[name]] = value
        self.lights = {name: int(value > 0.5) for name, value in zip(LIGHT_ON_RGB, scene_obs[4:6])}
        for name, pose in zip(self.scene.blocks, scene_obs[6:].reshape(3, 6)):
            start = self._qpos[name]
            qpos[start : start + 3] = pose[:3]
            qpos[start + 3 : start + 7] = quaternion_from_matrix(matrix_from_euler(pose[3:]))

    def _sample_scene(self) -> np.ndarray:
        """Draw scene_obs (24,): closed doors, lights off, blocks at random poses with distance to each other."""
        for _ in range(MAX_PLACEMENT_TRIES):
            poses = np.zeros((3, 6))
            for pose in poses:
                low, high = self.scene.surfaces[self._rng.choice(sorted(self.scene.surfaces))]
                pose[:3] = self._rng.uniform(low, high)
                pose[5] = self._rng.uniform(-np.pi, np.pi)
            gaps = [np.linalg.norm(poses[i, :2] - poses[j, :2]) for i, j in ((0, 1), (0, 2), (1, 2))]
            if min(gaps) > 0.095:
                return np.concatenate((np.zeros(6), poses.ravel()))
        raise RuntimeError(f"could not place three blocks on the surfaces of scene {self.scene.name}")

    def step(self, action: np.ndarray, *, render: bool = True) -> tuple[dict, dict]:
        """Execute an action (7,) for one control step of 1/30 s and return (observation, info).

        Raises ValueError for an action of another shape or with NaN, before anything moves.
        """
        action = as_vector("action", action, 7)
        self._target_pose[0][:] += MAX_REL_POS * action[:3]
        self._target_pose[1][:] += MAX_REL_ORN * action[3:6]
        self.gripper_action = 1 if action[6] > 0 else -1
        self._target_joints = self._kinematics.inverse(
            self._target_pose[0], matrix_from_euler(self._target_pose[1]), self._target_joints
        )
        self._set_control()
        mujoco.mj_step(self._model, self._data, nstep=SUBSTEPS)
        mujoco.mj_fwdPosition(self._model, self._data)
        self._update_lights()
        return (self.get_obs() if render else self._state_obs()), self.get_info()

    def _set_control(self) -> None:
        """Pass the commanded joint angles and the gripper command to the actuators."""
        self._data.ctrl[:7] = self._target_joints
        opening = self.gripper_action > 0
        self._data.ctrl[self._gripper_actuator] = MAX_GRIPPER_WIDTH / 2 if opening else 0.0
        force = OPENING_FORCE if opening else CLOSING_FORCE
        self._model.actuator_forcerange[self._gripper_actuator] = (-force, force)

    def _pressed(self, joint: str) -> bool:
        return self.joint_position(joint) > self.scene.limits[joint] / 2

    def _update_lights(self) -> None:
        """The button toggles the LED when it goes down; the switch sets the bulb when it crosses the middle."""
        down = self._pressed(BUTTON)
        if down and not self._button_down:
            self.lights["led"] = 1 - self.lights["led"]
        self._button_down = down
        on = self._pressed(SWITCH)
        if on != self._switch_on:
            self.lights["lightbulb"] = int(on)
        self._switch_on = on

    def _robot_obs(self) -> np.ndarray:
        position, euler = self.tcp_pose()
        joints = self._data.qpos[self._arm_qpos]
        return np.concatenate((position, euler, [self.gripper_opening_width()], joints, [self.gripper_action]))

    def _scene_obs(self) -> np.ndarray:
        blocks = []
        for name in self.scene.blocks:
            position, rotation = self.block_pose(name)
            blocks += [position, euler_from_matrix(rotation)]
        fixtures = [*(self.joint_position(name) for name in mjcf.FIXTURE_JOINTS), *self.lights.values()]
        return np.concatenate((fixtures, *blocks))

    def _state_obs(self) -> dict:
        return {"robot_obs": self._robot_obs(), "scene_obs": self._scene_obs()}

    def get_obs(self) -> dict:
        """The present observation, with the uint8 RGB images `rgb_static` and `rgb_gripper` in `rgb_obs`."""
        if self._renderer is None:
            self._renderer = Renderer(self._model, max(self.static_size, self.gripper_size))
        for name, lit in LIGHT_ON_RGB.items():
            on = self.lights[name]
            material = self._model.material(name).id
            self._model.mat_rgba[material, :3] = lit if on else LIGHT_OFF_RGB
            self._model.mat_emission[material] = 0.7 if on else 0.0
        images = {
            "rgb_static": self._renderer.render(self._data, "static", self.static_size),
            "rgb_gripper": self._renderer.render(self._data, "gripper", self.gripper_size),
        }
        return {"rgb_obs": images, **self._state_obs()}

    def get_info(self) -> dict[str, Any]:
        """CALVIN's info. Contacts are `Contact` tuples; quaternions are (x, y, z, w)."""
        contacts = self._contacts()
        robot = self._robot_obs()
        joints = {name: self.joint_position(name) for name in mjcf.FIXTURE_JOINTS}
        lever = {"joint_state": joints[SWITCH], "logical_state": int(self._pressed(SWITCH))}
        return {
            "robot_info": {
                "tcp_pos": robot[:3],
                "tcp_orn": robot[3:6],
                "gripper_opening_width": float(robot[6]),
                "arm_joint_states": robot[7:14],
                "gripper_action": self.gripper_action,
                "uid": self.uids["robot"],
                "contacts": contacts[self.uids["robot"]],
            },
            "scene_info": {
                "fixed_objects": {
                    "table": {
                        "uid": self.uids["table"],
                        "links": dict(self.links),
                        "contacts": contacts[self.uids["table"]],
                    }
                },
                "movable_objects": {name: self._block_info(name, contacts) for name in self.scene.blocks},
                "doors": {name: {"current_state": joints[name]} for name in DOORS},
                "buttons": {BUTTON: {"joint_state": joints[BUTTON], "logical_state": self.lights["led"]}},
                "switches": {SWITCH: lever},
                "lights": {name: {"logical_state": on} for name, on in self.lights.items()},
            },
        }

    def _block_info(self, name: str, contacts: dict[int, list[Contact]]) -> dict[str, Any]:
        position, rotation = self.block_pose(name)
        start = self._qvel[name]
        velocity = self._data.qvel[start : start + 6]
        quaternion = self._data.qpos[self._qpos[name] + 3 : self._qpos[name] + 7]
        return {
            "current_pos": position,
            "current_orn": quaternion[[1, 2, 3, 0]],
            "current_lin_vel": velocity[:3].copy(),
            "current_ang_vel": rotation @ velocity[3:],
            "contacts": contacts[self.uids[name]],
            "uid": self.uids[name],
        }

    # ---- evaluation

    def get_sequences(
        self, count: int, *, tasks: list[str] | None = None, length: int = 5, seed: int = 0
    ) -> list[tuple[dict, list[str]]]:
        """`count` pairs of (symbolic initial state, tasks in a row), see `envs.sequences.get_sequences`."""
        return sequences.get_sequences(count, tasks=tasks, length=length, seed=seed)

    def instruction(self, task: str) -> str:
        """The sentence that the policy is given for a task."""
        return tasks.INSTRUCTIONS[tasks.check_tasks([task])[0]]

    def check_success(self, task: str, start_info: dict, end_info: dict) -> bool:
        """Whether `task` was carried out between two infos."""
        return tasks.check_success(task, start_info, end_info)

    def expert(self, seed: int = 0) -> expert.ScriptedExpert:
        """A new scripted expert that reads the state of this environment."""
        return expert.ScriptedExpert(PlayTableState(self), seed)

    def versions(self) -> dict[str, str]:
        """Versions of simulator, renderer and Python. The renderer is "none" until the first image is rendered."""
        renderer = self._renderer.backend if self._renderer else "none"
        return {"simulator": f"mujoco {mujoco.__version__}", "renderer": renderer, "python": platform.python_version()}

    def resolved_options(self) -> dict[str, Any]:
        """An empty dictionary: the renderer depends only on the machine and on MUJOCO_GL."""
        return {}

    def close(self) -> None:
        """Free the GL context. A second call does nothing."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


class PlayTableState:
    """`PrivilegedState` of a PlayTableEnv, or of another environment with the same measurements, such as CalvinEnv."""

    def __init__(self, env: PlayTableEnv) -> None:
        self._env = env

    @property
    def blocks(self) -> tuple[str, ...]:
        return self._env.scene.block_names

    @property
    def fixtures(self) -> Fixtures:
        return self._env.scene.fixtures

    def tcp_pose(self) -> tuple[np.ndarray, np.ndarray]:
        return self._env.tcp_pose()

    def target_pose(self) -> tuple[np.ndarray, np.ndarray]:
        return self._env.target_pose()

    def gripper_action(self) -> int:
        return self._env.gripper_action

    def gripper_opening_width(self) -> float:
        return self._env.gripper_opening_width()

    def joint_position(self, name: str) -> float:
        return self._env.joint_position(name)

    def joint_limit(self, name: str) -> float:
        return self._env.scene.limits[name]

    def light_state(self, name: str) -> int:
        return self._env.lights[name]

    def block_pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self._env.block_pose(name)

    def block_size(self, name: str) -> np.ndarray:
        return np.array(self._env.scene.sizes[name])

    def get_contacts(self, name: str) -> frozenset[str]:
        return self._env.get_contacts(name)


def as_vector(name: str, values: object, length: int) -> np.ndarray:
    """Copy `values` to a float64 vector (length,). Raises ValueError for another shape or non-finite values."""
    vector = np.array(values, dtype=np.float64)
    if vector.shape != (length,):
        raise ValueError(f"{name} has shape {vector.shape}: expected ({length},)")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} holds NaN or infinity at {np.flatnonzero(~np.isfinite(vector)).tolist()}")
    return vector
