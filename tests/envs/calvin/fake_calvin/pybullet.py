"""A fake pybullet: measurements come from the one simulator that is open; EGL behaves as FAKE_EGL says."""

import math
import os
import signal

DIRECT = 2
open_worlds: dict = {}  # client -> simulator


def connect(mode, **_):
    return 0


def disconnect(physicsClientId):
    del open_worlds[physicsClientId]


def loadPlugin(*_):
    wish = os.environ.get("FAKE_EGL", "")
    if wish == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if not wish:
        return -1
    print(f"GL_VENDOR=somebody\nGL_RENDERER={wish}\nGL_VERSION=4.5")  # noqa: T201
    return 0


def getCameraImage(*_, **__):
    pass


def getLinkState(uid, link):
    robot = open_worlds[0].robot
    assert (uid, link) == (robot.robot_uid, robot.tcp_link_id)
    return tuple(robot.tcp), (0.0, 0.0, 0.0, 1.0)


def getJointState(uid, joint):
    return (open_worlds[0].robot.finger, 0.0)


def getBasePositionAndOrientation(uid):
    block = next(block for block in open_worlds[0].scene.movable_objects if block.uid == uid)
    return tuple(block.pose[:3]), (0.0, 0.0, math.sin(block.pose[5] / 2), math.cos(block.pose[5] / 2))


def getMatrixFromQuaternion(quaternion):
    _, _, z, w = quaternion
    cosine, sine = w * w - z * z, 2 * w * z
    return (cosine, -sine, 0.0, sine, cosine, 0.0, 0.0, 0.0, 1.0)


def getEulerFromQuaternion(quaternion):
    return (0.0, 0.0, 2 * math.atan2(quaternion[2], quaternion[3]))


def getContactPoints(bodyA):
    return open_worlds[0].contacts(bodyA)
