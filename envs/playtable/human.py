"""A person's bare arm in place of the robot's, to be seen only: a second source that does the same tasks (Sec. 3.1,
A.2).

The arm hangs on the robot's links and the fingers on its two fingers, so that the joints, what collides and the
scripted
expert are the robot's own. What the paper takes from human video is that another body does the same, filmed without
motions.
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
# Per link of the arm: ends (m, in the link's frame), radius (m) and look of its capsules
ARM: Final[dict[str, tuple[tuple[tuple[Point, Point], float, str], ...]]] = {
    "link2": ((((0, 0, 0), (0, -0.316, 0)), 0.058, SLEEVE),),
    "link4": ((((-0.0825, 0.0, 0), (0, 0, 0)), 0.052, SLEEVE), (((-0.0825, 0, 0), (-0.0825, 0.10, 0)), 0.050, SLEEVE)),
    "link5": ((((0, 0, -0.28), (0, 0, -0.14)), 0.042, SKIN), (((0, 0, -0.18), (0, 0, -0.03)), 0.034, SKIN)),
    "link6": ((((0, 0, 0), (0.088, -0.107, 0)), 0.030, SKIN),),  # from the wrist to the back of the hand, past joint 7
}
# x in the hand's frame of the fingers that oppose the thumb, and how far each reaches beyond its knuckle
FINGERS: Final[tuple[tuple[float, float], ...]] = ((0.013, 0.092), (-0.010, 0.096), (-0.032, 0.080), (-0.052, 0.060))


def palm() -> list[str]:
    """The palm and the ball of the thumb, in the hand's frame, whose z points to the fingertips and whose y the fingers
    open along."""
    return [
        geom("ellipsoid", (-0.016, -0.012, 0.022), (0.050, 0.034, 0.062), SKIN, VISUAL_ONLY),
        fromto_geom("capsule", ((-0.006, 0.006, -0.012), (0.002, 0.036, 0.042)), 0.021, SKIN, VISUAL_ONLY),
    ]


def finger(name: str) -> list[str]:
    """What moves with one of the robot's fingers, in its frame: the thumb on the left one, the others on the right one.

    The tips reach the middle plane y = 0 when shut, as the pads do that hold the block.
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
