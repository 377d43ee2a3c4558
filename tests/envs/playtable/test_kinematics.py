"""The kinematics of the arm agree with CALVIN's neutral pose and with MuJoCo."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

from envs.playtable.kinematics import (
    JOINT_LOWER,
    JOINT_UPPER,
    ArmKinematics,
    euler_from_matrix,
    matrix_from_euler,
    quaternion_from_matrix,
    rotvec_from_matrix,
)
from envs.playtable.mjcf import compile_model
from envs.playtable.scene import ROBOT_BASE, get_scene
from envs.sequences import NEUTRAL_JOINTS

CALVIN_NEUTRAL_TCP = [0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585]


@pytest.fixture
def arm() -> ArmKinematics:
    return ArmKinematics(ROBOT_BASE, NEUTRAL_JOINTS)


def test_neutral_pose_is_calvins(arm):
    position, rotation, _ = arm.forward(np.array(NEUTRAL_JOINTS))
    pose = np.concatenate((position, euler_from_matrix(rotation)))
    np.testing.assert_allclose(pose, CALVIN_NEUTRAL_TCP, atol=5e-6)


def test_forward_agrees_with_the_simulated_arm(arm):
    model = compile_model(get_scene("D"))
    data = mujoco.MjData(model)
    for joints in np.random.default_rng(0).uniform(JOINT_LOWER, JOINT_UPPER, (10, 7)):
        for i, value in enumerate(joints):
            data.joint(f"arm_{i + 1}").qpos = value
        mujoco.mj_kinematics(model, data)
        position, rotation, _ = arm.forward(joints)
        np.testing.assert_allclose(position, data.site("tcp").xpos, atol=1e-9)
        np.testing.assert_allclose(rotation, data.site("tcp").xmat.reshape(3, 3), atol=1e-9)


def test_jacobian_is_the_derivative(arm):
    joints = np.array(NEUTRAL_JOINTS)
    position, rotation, jacobian = arm.forward(joints)
    step = 1e-6
    for i in range(7):
        moved, turned, _ = arm.forward(joints + step * np.eye(7)[i])
        change = np.concatenate((moved - position, rotvec_from_matrix(turned @ rotation.T))) / step
        np.testing.assert_allclose(jacobian[:, i], change, atol=1e-5)


def test_rotations_return_to_themselves():
    for euler in np.random.default_rng(1).uniform([-3.1, -1.5, -3.1], [3.1, 1.5, 3.1], (50, 3)):
        matrix = matrix_from_euler(euler)
        np.testing.assert_allclose(euler_from_matrix(matrix), euler, atol=1e-9)
        w, x, y, z = quaternion_from_matrix(matrix)
        np.testing.assert_allclose(2 * (x * z - w * y), matrix[2, 0], atol=1e-12)
        np.testing.assert_allclose(1 - 2 * (y * y + z * z), matrix[0, 0], atol=1e-12)


@pytest.mark.parametrize("axis", range(3))
def test_half_turns_have_a_rotation_vector(axis):
    euler = np.zeros(3)
    euler[axis] = np.pi
    assert np.abs(rotvec_from_matrix(matrix_from_euler(euler)))[axis] == pytest.approx(np.pi)


def test_gimbal_lock_keeps_the_rotation():
    matrix = matrix_from_euler(np.array([0.7, np.pi / 2, 0.2]))
    np.testing.assert_allclose(matrix_from_euler(euler_from_matrix(matrix)), matrix, atol=1e-9)


def test_inverse_follows_a_path_within_the_limits(arm):
    rng = np.random.default_rng(2)
    for _ in range(6):
        position, euler = np.array(CALVIN_NEUTRAL_TCP[:3]), np.array(CALVIN_NEUTRAL_TCP[3:])
        goal = rng.uniform([-0.25, -0.35, 0.4], [0.3, 0.05, 0.65])
        yaw = rng.uniform(-0.5, 3.0)
        joints = np.array(NEUTRAL_JOINTS)
        for _ in range(70):
            position = position + np.clip(goal - position, -0.02, 0.02)
            euler = euler + np.clip([np.pi - euler[0], -euler[1], yaw - euler[2]], -0.05, 0.05)
            joints = arm.inverse(position, matrix_from_euler(euler), joints)
            assert (joints >= JOINT_LOWER).all() and (joints <= JOINT_UPPER).all()
        reached, rotation, _ = arm.forward(joints)
        assert np.abs(reached - goal).max() < 1e-3
        assert np.abs(rotvec_from_matrix(matrix_from_euler(euler) @ rotation.T)).max() < 5e-3


def test_out_of_reach_gives_the_nearest_pose_without_leaving_the_limits(arm):
    joints = np.array(NEUTRAL_JOINTS)
    for _ in range(60):
        joints = arm.inverse(np.array([2.0, 0.0, 0.5]), np.diag([1.0, -1.0, -1.0]), joints)
        assert np.isfinite(joints).all() and (joints >= JOINT_LOWER).all() and (joints <= JOINT_UPPER).all()
    assert arm.forward(joints)[0][0] > 0.3


def test_null_space_draws_towards_the_rest_pose(arm):
    position, rotation, jacobian = arm.forward(np.array(NEUTRAL_JOINTS))
    swing = np.linalg.svd(jacobian)[2][-1]
    joints = np.array(NEUTRAL_JOINTS) + 0.3 * swing
    position, rotation, _ = arm.forward(joints)
    away = np.linalg.norm(joints - NEUTRAL_JOINTS)
    for _ in range(60):
        joints = arm.inverse(position, rotation, joints)
    assert np.linalg.norm(joints - NEUTRAL_JOINTS) < 0.5 * away
    assert np.abs(arm.forward(joints)[0] - position).max() < 1e-3
