"""A fake simulator in which the tool is always exactly at its commanded position.

It has the side effects of the real one: it writes to stdout, renders its cameras in every step, scales the caller's
action in place, keeps the gripper command and traces of the past over a reset, and its destructor disconnects.
"""

import gym.utils.seeding  # noqa: F401
import numpy as np
import pybullet

BLOCK_UIDS, TABLE, ROBOT, FLOOR = (2, 3, 4), 5, 0, 6
LINKS = {"button_link": 0, "drawer_link": 1, "plank_link": 2, "base_link": -1}


class Part:
    def __init__(self, name):
        self.name, self.value = name, 0.0

    def get_state(self):
        return self.value


class Block:
    def __init__(self, name, uid):
        self.name, self.uid, self.pose = name, uid, np.zeros(6)


class Table:
    uid, info_dict = TABLE, {"uid": TABLE, "links": LINKS}


class Robot:
    robot_uid, tcp_link_id, gripper_joint_ids, gripper_action = ROBOT, 15, (9, 11), 1

    def place(self, at):
        self.tcp, self.target_pos, self.target_orn, self.finger = np.array(at), np.array(at), np.zeros(3), 0.04


class Scene:
    def __init__(self, blocks):
        self.fixed_objects = [Table()]
        self.movable_objects = [Block(name, uid) for name, uid in zip(blocks, BLOCK_UIDS)]
        self.doors, self.buttons, self.switches = (
            [Part("base__slide"), Part("base__drawer")],
            [Part("base__button")],
            [Part("base__switch")],
        )
        self.lights = [Part("lightbulb"), Part("led")]

    def vector(self):
        parts = [part.value for part in (*self.doors, *self.buttons, *self.switches, *self.lights)]
        return np.concatenate([parts, *(block.pose for block in self.movable_objects)])


class Camera:
    drawn = 0

    def __init__(self, world, name, size):
        self.world, self.name, self.size = world, name, size

    def render(self):
        Camera.drawn += 1
        picture = np.full((self.size, self.size, 4), 9, np.uint8)
        picture[0, 0, 0] = int(1000 * abs(self.world.robot.tcp[0])) % 256
        return picture[:, :, :3], None


class PlayTableSimEnv:
    def __init__(
        self,
        robot_cfg,
        seed,
        use_vr,
        bullet_time_step,
        cameras,
        show_gui,
        scene_cfg,
        use_scene_info,
        use_egl,
        control_freq,
    ):
        print("hello from the simulator")  # noqa: T201
        assert (
            use_scene_info and not use_vr and not show_gui and robot_cfg.tcp_link_id == 15 and bullet_time_step == 240.0
        )
        self.p, self.cid = pybullet, len(pybullet.open_worlds)
        pybullet.open_worlds[self.cid] = self
        self.use_egl, self.blocks, self.rng = (
            use_egl,
            list(scene_cfg.objects.movable_objects),
            np.random.default_rng(seed),
        )
        self.robot, self.loads = Robot(), 0
        self.cameras = [Camera(self, name, cameras[name].width) for name in cameras]
        self.load()

    def __del__(self):
        self.close()

    def close(self):
        print("disconnecting")  # noqa: T201
        self.p.disconnect(physicsClientId=0)

    def load(self):
        self.loads, self.residue, self.scene = self.loads + 1, 0.0, Scene(self.blocks)
        self.robot.place([0.0, 0.0, 0.5])

    def reset(self, robot_obs=None, scene_obs=None):
        self.robot.place(robot_obs[:3] + self.residue)
        if scene_obs is None:
            scene_obs = np.concatenate([np.zeros(6), self.rng.uniform(0, 0.1, 18)])
        parts = (*self.scene.doors, *self.scene.buttons, *self.scene.switches, *self.scene.lights)
        for part, value in zip(parts, scene_obs):
            part.value = value
        for block, pose in zip(self.scene.movable_objects, scene_obs[6:].reshape(3, 6)):
            block.pose = np.array(pose)
        return self.get_obs()

    def step(self, action):
        assert action.shape == (7,) and action[6] in (-1, 1)
        action[:3] *= 0.02
        self.robot.gripper_action = action[6]
        self.robot.tcp = self.robot.target_pos = self.robot.target_pos + action[:3]
        self.residue += 1e-9
        self.scene.doors[1].value += max(0.0, action[0])
        return self.get_obs(), 0, False, self.get_info()

    def contacts(self, uid):
        """Block 2 is in the hand and touches block 3; block 3 lies on the plank; block 4 on the floor."""
        touched = {2: [(ROBOT, 9), (3, -1)], 3: [(TABLE, 2), (2, -1)], 4: [(FLOOR, -1)]}[uid]
        return [(0, uid, other, -1, link) for other, link in touched]

    def get_state_obs(self):
        robot = self.robot
        robot_obs = np.concatenate([robot.tcp, np.zeros(3), [2 * robot.finger], np.zeros(7), [robot.gripper_action]])
        return {"robot_obs": robot_obs, "scene_obs": self.scene.vector()}

    def get_obs(self):
        pictures = {f"rgb_{camera.name}": camera.render()[0] for camera in self.cameras}
        return {"rgb_obs": pictures, "depth_obs": {}, **self.get_state_obs()}

    def get_info(self):
        return {"drawer": self.scene.doors[1].value}
