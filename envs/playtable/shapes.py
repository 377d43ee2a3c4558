"""MJCF text for bodies and geoms, and who may touch whom (DESIGN 7).

Table and fixtures meet robot and blocks, the robot meets both, blocks meet everything; robot parts never meet each
other and fixtures never meet the table that carries them.
"""

from __future__ import annotations

from typing import Final

import numpy as np

STATIC: Final = 'contype="1" conaffinity="0"'
ROBOT: Final = 'contype="2" conaffinity="1"'
BLOCK: Final = 'contype="4" conaffinity="7"'
VISUAL_ONLY: Final = 'contype="0" conaffinity="0"'  # a picture of something, nothing collides with it
COLLISION_ONLY: Final = (
    f'{ROBOT} group="3"'  # collides like the robot; MuJoCo draws groups 0 to 2 unless told otherwise
)

Point = tuple[float, float, float]


def array_to_string(values: object) -> str:
    """Numbers of any nesting as an MJCF attribute."""
    return " ".join(f"{float(value):.10g}" for value in np.ravel(np.asarray(values)))


def geom(kind: str, position: object, size: object, appearance: str, collision: str = STATIC) -> str:
    """A geom; `appearance` and `group` are attribute text, sizes are MuJoCo's half lengths."""
    return f'<geom type="{kind}" pos="{array_to_string(position)}" size="{array_to_string(size)}" {appearance} {collision}/>'


def box(low: Point, high: Point, appearance: str, collision: str = STATIC) -> str:
    """A box between two opposite corners."""
    return geom("box", np.add(low, high) / 2, np.subtract(high, low) / 2, appearance, collision)


def fromto_geom(kind: str, ends: tuple[Point, Point], radius: float, appearance: str, collision: str = STATIC) -> str:
    """A capsule or cylinder between two points."""
    return f'<geom type="{kind}" fromto="{array_to_string(ends)}" size="{radius}" {appearance} {collision}/>'


def body(name: str, position: object, content: list[str], frame: str = "") -> str:
    """A body; `frame` is attribute text such as euler or gravcomp."""
    inside = "\n".join(content)
    return f'<body name="{name}" pos="{array_to_string(position)}" {frame}>\n{inside}\n</body>'


def inertial(mass: float, inertia: float, position: Point = (0.0, 0.0, 0.0)) -> str:
    """Mass in kg and the same moment of inertia in kg m^2 about every axis."""
    return f'<inertial pos="{array_to_string(position)}" mass="{mass}" diaginertia="{array_to_string([inertia] * 3)}"/>'
