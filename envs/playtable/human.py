"""A person's bare arm that the images show in place of the robot's: a second source of video (Sec. 3.1, A.2).

The visible arm is attached to the links of the robot, and its fingers to the robot's two fingers. Joints, collisions
and the scripted expert are therefore those of the robot. It stands for the paper's human video: another embodiment does
the same tasks, filmed without actions.
"""

from __future__ import annotations

from typing import Final

from envs.playtable.scene import RGB
from envs.playtable.shapes import VISUAL_ONLY, Point, fromto_geom, geom

MATERIAL_RGB: Final[dict[str, RGB]] = {
    "skin": (0.80, 0.56, 0.43),
    "crease": (0.69, 0.45, 0.34),
    "nail": (0.90, 0.72, 0.64),
    "sleeve": (0.16, 0.36, 0.34),
}
SKIN, CREASE, NAIL, SLEEVE = (f'material="{name}"' for name in MATERIAL_RGB)
# Link of the arm -> its capsules: (two ends in the link's frame in m, radius in m, material)
ARM: Final[dict[str, tuple[tuple[tuple[Point, Point], float, str], ...]]] = {
    "link2": ((((0, 0, 0), (0, -0.316, 0)), 0.058, SLEEVE),),
    "link4": ((((-0.0825, 0.0, 0), (0, 0, 0)), 0.052, SLEEVE), (((-0.0825, 0, 0), (-0.0825, 0.10, 0)), 0.050, SLEEVE)),
    "link5": ((((0, 0, -0.28), (0, 0, -0.14)), 0.042, SKIN), (((0, 0, -0.18), (0, 0, -0.03)), 0.034, SKIN)),
    "link6": ((((0, 0, 0), (0.088, -0.107, 0)), 0.030, SKIN),),  # from the wrist past joint 7 to the back of the hand
}
# Fingers opposite the thumb: (x in the hand's frame in m, length beyond the knuckle in m)
FINGERS: Final[tuple[tuple[float, float], ...]] = ((0.013, 0.092), (-0.010, 0.096), (-0.032, 0.080), (-0.052, 0.060))


def palm() -> list[str]:
    """The palm and the ball of the thumb, in the hand's frame: z points to the fingertips, the fingers open along y."""
    return [
        geom("ellipsoid", (-0.016, -0.012, 0.022), (0.050, 0.034, 0.062), SKIN, VISUAL_ONLY),
        fromto_geom("capsule", ((-0.006, 0.006, -0.012), (0.002, 0.036, 0.042)), 0.021, SKIN, VISUAL_ONLY),
    ]


def finger(name: str) -> list[str]:
    """The fingers that move with one of the robot's fingers: the thumb with the left one, the others with the right
    one.

    In the frame of the robot's finger. When the gripper is closed, the tips reach the plane y = 0, as the pads do that
    hold a block.
    """
    if name == "finger_left":
        joint, tip = (0.004, 0.030, 0.042), (0.002, 0.0115, 0.088)
        return [
            fromto_geom("capsule", ((0.002, 0.012, -0.016), joint), 0.0135, SKIN, VISUAL_ONLY),
            fromto_geom("capsule", (joint, tip), 0.0115, SKIN, VISUAL_ONLY),
            geom("ellipsoid", (0.002, 0.022, 0.086), (0.006, 0.003, 0.009), NAIL, VISUAL_ONLY),
        ]
    parts = []
    for x, reach in FINGERS:
        joint, tip = (x, -0.030, 0.5 * reach), (x, -0.010, reach - 0.006)
        parts += [
            fromto_geom("capsule", ((x, -0.010, -0.020), joint), 0.0108, SKIN, VISUAL_ONLY),
            geom("sphere", joint, (0.0112,), CREASE, VISUAL_ONLY),
            fromto_geom("capsule", (joint, tip), 0.0098, SKIN, VISUAL_ONLY),
        ]
    return parts
