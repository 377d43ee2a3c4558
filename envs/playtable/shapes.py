"""MJCF text of bodies and geoms, and the collision classes.

Blocks collide with everything. Table and fixtures (STATIC) collide with robot and blocks, but not with each other.
Parts of the robot do not collide with each other.
"""

from __future__ import annotations

from typing import Final

import numpy as np

STATIC: Final = 'contype="1" conaffinity="0"'
ROBOT: Final = 'contype="2" conaffinity="1"'
BLOCK: Final = 'contype="4" conaffinity="7"'
VISUAL_ONLY: Final = 'contype="0" conaffinity="0"'  # seen, but collides with nothing
COLLISION_ONLY: Final = f'{ROBOT} group="3"'  # collides as the robot does; MuJoCo renders groups 0 to 2 only

Point = tuple[float, float, float]


def array_to_string(values: object) -> str:
    """Numbers, also nested ones, as the value of an MJCF attribute."""
    return " ".join(f"{float(value):.10g}" for value in np.ravel(np.asarray(values)))


def geom(kind: str, position: object, size: object, appearance: str, collision: str = STATIC) -> str:
    """A geom; `appearance` and `group` are attribute text, sizes are MuJoCo's half lengths."""
    place = f'pos="{array_to_string(position)}" size="{array_to_string(size)}"'
    return f'<geom type="{kind}" {place} {appearance} {collision}/>'


def box(low: Point, high: Point, appearance: str, collision: str = STATIC) -> str:
    """A box between two opposite corners."""
    return geom("box", np.add(low, high) / 2, np.subtract(high, low) / 2, appearance, collision)


def fromto_geom(kind: str, ends: tuple[Point, Point], radius: float, appearance: str, collision: str = STATIC) -> str:
    """A capsule or cylinder between two points."""
    return f'<geom type="{kind}" fromto="{array_to_string(ends)}" size="{radius}" {appearance} {collision}/>'


def body(name: str, position: object, content: list[str], frame: str = "") -> str:
    """A body. `frame` is text of further attributes, such as euler or gravcomp."""
    inside = "\n".join(content)
    return f'<body name="{name}" pos="{array_to_string(position)}" {frame}>\n{inside}\n</body>'


def inertial(mass: float, inertia: float, position: Point = (0.0, 0.0, 0.0)) -> str:
    """Mass in kg and the same moment of inertia in kg m^2 about every axis."""
    return f'<inertial pos="{array_to_string(position)}" mass="{mass}" diaginertia="{array_to_string([inertia] * 3)}"/>'
