"""MJCF of an arm with a parallel gripper: link frames of Franka's Panda, with simple shapes instead of its meshes.

The upper arm is visual only; wrist, hand and fingers collide. Gravity is switched off for it, as a controller would
compensate it. With `human_arm`, bodies, joints and colliding geoms stay the same but are invisible, and a person's arm
is drawn in their place.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from envs.playtable import human, kinematics
from envs.playtable.scene import MAX_GRIPPER_WIDTH, ROBOT_BASE
from envs.playtable.shapes import (
    COLLISION_ONLY,
    ROBOT,
    VISUAL_ONLY,
    Point,
    array_to_string,
    body,
    box,
    fromto_geom,
    geom,
    inertial,
)

ARM_KP, ARM_KV, ARM_MAX_TORQUE = 4000.0, 160.0, 200.0  # N m/rad, N m s/rad, N m; 40 ms delay, as in CALVIN
GRIPPER_KP, GRIPPER_KV = 8000.0, 320.0  # N/m, N s/m; at most 1 m/s, and any block saturates the force
FINGER_BASE: Final = 0.0584  # m along the z axis of the hand
CAMERA_OFFSET: Final = (-0.1, 0.0, 0.0)  # m in the hand's frame
CAMERA_EULER: Final = (1.3, 0.0, -1.57)
CAMERA_FOV: Final = 75.0

MASSES = (2.7, 2.73, 2.04, 2.08, 3.0, 1.3, 0.2)
WHITE, GREY = 'material="white"', 'material="joint"'
# Geoms of links 1 to 7: (type, two ends in m, radius in m, material, whether it collides)
LINK_GEOMS: tuple[tuple[tuple[str, tuple[Point, Point], float, str, bool], ...], ...] = (
    (
        ("capsule", ((0, 0, -0.17), (0, 0, -0.03)), 0.062, WHITE, False),
        ("cylinder", ((0, -0.066, 0), (0, 0.066, 0)), 0.058, GREY, False),
    ),
    (
        ("capsule", ((0, 0, -0.02), (0, 0, 0.06)), 0.062, WHITE, False),
        ("capsule", ((0, -0.03, 0), (0, -0.15, 0)), 0.060, WHITE, False),
    ),
    (
        ("capsule", ((0, 0, -0.09), (0, 0, -0.03)), 0.060, WHITE, False),
        ("capsule", ((0, 0, 0), (0.0825, 0.03, 0)), 0.058, WHITE, False),
        ("cylinder", ((0.0825, -0.066, 0), (0.0825, 0.066, 0)), 0.052, GREY, False),
    ),
    (
        ("capsule", ((0, 0, -0.01), (0, 0, 0.05)), 0.060, WHITE, False),
        ("capsule", ((0, 0, 0), (-0.0825, 0.075, 0)), 0.058, WHITE, False),
    ),
    (
        ("capsule", ((0, 0, -0.23), (0, 0.03, -0.13)), 0.058, WHITE, False),
        ("capsule", ((0, 0.06, -0.09), (0, 0.07, -0.01)), 0.050, WHITE, True),
        ("cylinder", ((0, -0.06, 0), (0, 0.066, 0)), 0.050, GREY, True),
    ),
    (
        ("capsule", ((0, 0, -0.02), (0, 0.02, 0.03)), 0.052, WHITE, True),
        ("capsule", ((0.03, 0, 0), (0.088, 0, 0)), 0.050, WHITE, True),
    ),
    (("capsule", ((0, 0, 0.055), (0, 0, 0.095)), 0.046, WHITE, True),),
)


def _finger(name: str, side: int, *, human_arm: bool) -> str:
    """A finger that opens along the hand's y axis, to +y for `side` 1 and to -y for -1. Closed, its pad is at y = 0."""
    # The pad has priority over the block's contact parameters and is stiff: with softer contacts, a block slowly slips
    # out of the gripper during fast motion.
    solid = COLLISION_ONLY if human_arm else ROBOT
    pad = f'friction="1 0.02 0.001" solref="0.0042 1" solimp="0.99 0.999 0.0005" priority="1" {solid}'

    def across(low: float, high: float) -> tuple[float, float]:
        return (low, high) if side > 0 else (-high, -low)

    stem, tip = across(0.005, 0.022), across(0.0, 0.008)
    travel = f'range="0 {MAX_GRIPPER_WIDTH / 2}" armature="0.05" damping="2"'
    content = [
        f'<joint name="{name}" type="slide" axis="0 {side} 0" {travel}/>',
        inertial(0.1, 0.0005, (0.0, 0.0, 0.05)),
        box((-0.0105, stem[0], 0.0), (0.0105, stem[1], 0.0964), 'material="finger"', solid),
        box((-0.0095, tip[0], 0.068), (0.0095, tip[1], 0.0964), 'material="pad"', pad),
        *(human.finger(name) if human_arm else []),
    ]
    return body(name, (0, 0, FINGER_BASE), content, 'gravcomp="1"')


def _hand(*, human_arm: bool) -> str:
    camera = kinematics.matrix_from_euler(np.array(CAMERA_EULER))
    axes = array_to_string((-camera[:, 0], -camera[:, 2]))  # it looks along its own y axis, and its z axis points down
    content = [
        inertial(0.81, 0.004, (0.0, 0.0, 0.04)),
        box((-0.03, -0.1, -0.015), (0.03, 0.1, 0.064), WHITE, COLLISION_ONLY if human_arm else ROBOT),
        *(
            human.palm()
            if human_arm
            else [box((-0.105, -0.04, -0.0125), (-0.03, 0.04, 0.0125), 'material="dark"', VISUAL_ONLY)]
        ),
        f'<camera name="gripper" pos="{array_to_string(CAMERA_OFFSET)}" xyaxes="{axes}" fovy="{CAMERA_FOV}"/>',
        f'<site name="tcp" pos="0 0 {kinematics.TCP_OFFSET}" size="0.005" rgba="0 0 0 0"/>',
        _finger("finger_left", 1, human_arm=human_arm),
        _finger("finger_right", -1, human_arm=human_arm),
    ]
    frame = f'euler="0 0 {kinematics.HAND_YAW:.10g}" gravcomp="1"'
    return body("hand", (0, 0, kinematics.HAND_OFFSET), content, frame)


def _link_geoms(link: int, *, human_arm: bool) -> list[str]:
    """The geoms of one of the arm's links, 1 to 7."""
    shapes = LINK_GEOMS[link - 1]
    if not human_arm:
        return [
            fromto_geom(kind, ends, size, appearance, ROBOT if solid else VISUAL_ONLY)
            for kind, ends, size, appearance, solid in shapes
        ]
    seen = [
        fromto_geom("capsule", ends, size, appearance, VISUAL_ONLY)
        for ends, size, appearance in human.ARM.get(f"link{link}", ())
    ]
    return seen + [
        fromto_geom(kind, ends, size, appearance, COLLISION_ONLY)
        for kind, ends, size, appearance, solid in shapes
        if solid
    ]


def robot_xml(*, human_arm: bool = False) -> str:
    """The bodies of the robot, each link inside the previous one. `human_arm` shows a person's arm instead."""
    inside = _hand(human_arm=human_arm)
    for i in reversed(range(7)):
        turn, offset = kinematics.LINK_FRAMES[i]
        limits = f'range="{kinematics.JOINT_LOWER[i]} {kinematics.JOINT_UPPER[i]}"'
        parts = [
            f'<joint name="arm_{i + 1}" type="hinge" axis="0 0 1" {limits} armature="0.3" damping="2"/>',
            inertial(MASSES[i], 0.02),
            *_link_geoms(i + 1, human_arm=human_arm),
        ]
        inside = body(f"link{i + 1}", offset, [*parts, inside], f'euler="{turn:.10g} 0 0" gravcomp="1"')
    height = ROBOT_BASE[2]
    foot = (
        []
        if human_arm
        else [
            geom("cylinder", (-0.03, 0, 0.03), (0.10, 0.03), WHITE, VISUAL_ONLY),
            fromto_geom("capsule", ((0, 0, 0.08), (0, 0, 0.14)), 0.066, WHITE, VISUAL_ONLY),
            geom("cylinder", (-0.05, 0, -height / 2), (0.13, height / 2), 'material="stand"', VISUAL_ONLY),
        ]
    )
    return body("link0", ROBOT_BASE, [*foot, inside])


def actuator_xml() -> str:
    """Position control of the arm's joints and of the left finger, which the right finger follows."""

    def position(name: str, joint: str, stiffness: float, damping: float, limit: float) -> str:
        return (
            f'<general name="{name}" joint="{joint}" gainprm="{stiffness}" biastype="affine" '
            f'biasprm="0 -{stiffness} -{damping}" forcerange="-{limit} {limit}"/>'
        )

    arm = [position(f"arm_{i}", f"arm_{i}", ARM_KP, ARM_KV, ARM_MAX_TORQUE) for i in range(1, 8)]
    grip = position("grip", "finger_left", GRIPPER_KP, GRIPPER_KV, 1.0)  # the environment sets its force range
    follow = 'polycoef="0 1 0 0 0" solref="0.004 1" solimp="0.99 0.999 0.001"'
    return (
        f'<equality><joint joint1="finger_right" joint2="finger_left" {follow}/></equality>\n'
        f"<actuator>{''.join(arm)}{grip}</actuator>"
    )
