"""The four scenes A to D: positions, sizes and colors of everything on the table, with CALVIN's numbers.

World frame in metres: x to the right as seen from the robot, y towards the cabinet, z upwards; the table top is at
0.44.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import UserError
from envs.protocol import Fixtures

ROBOT_BASE = (-0.34, -0.46, 0.24)
TABLE_TOP = 0.44
MAX_GRIPPER_WIDTH = 0.08

SLIDE_Y, SLIDE_Z = 0.075, 0.535264  # middle of the sliding door on the slanted front
SWITCH_Y, SWITCH_Z = 0.060928, 0.494890  # joint frame of the switch at position 0
DRAWER_Z = 0.32  # lower face of the drawer's bottom
BUTTON_Y, BUTTON_Z = -0.12, 0.46
CABINET_DEPTH = (0.02, 0.16)

DRAWER_TRAVEL, BUTTON_TRAVEL, SWITCH_TRAVEL = 0.22, 0.02, 0.088
BLOCK_SIZES = {"big": (0.08, 0.04, 0.04), "middle": (0.056, 0.04, 0.04), "small": (0.04, 0.04, 0.04)}

Bounds = tuple[tuple[float, float, float], tuple[float, float, float]]
RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Appearance:
    """Colors of a scene, RGB in [0, 1]. `wood` and `door` get a wood texture."""

    wood: RGB
    door: RGB
    handle: RGB
    floor: RGB


@dataclass(frozen=True)
class Scene:
    """One scene; it has the members of `envs.protocol.SceneLayout`.

    blocks: name -> size class, in the order of scene_obs. surfaces: name of a surface -> lowest and highest corner of
    the box of positions that a block on it may have.
    """

    name: str
    blocks: dict[str, str]
    button_x: float
    switch_x: float
    slide_x0: float
    slide_travel: float
    drawer_x: float
    plank_x: tuple[float, float]
    surfaces: dict[str, Bounds]
    appearance: Appearance

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(self.blocks)

    @property
    def sizes(self) -> dict[str, tuple[float, float, float]]:
        """Full edge lengths of each block along its own axes, in metres."""
        return {name: BLOCK_SIZES[size] for name, size in self.blocks.items()}

    @property
    def limits(self) -> dict[str, float]:
        """Upper limits of the fixtures' joints in metres. All lower limits are 0."""
        return {
            "base__slide": self.slide_travel,
            "base__drawer": DRAWER_TRAVEL,
            "base__button": BUTTON_TRAVEL,
            "base__switch": SWITCH_TRAVEL,
        }

    @property
    def fixtures(self) -> Fixtures:
        return Fixtures(
            slide_x0=self.slide_x0,
            drawer_x=self.drawer_x,
            switch_x=self.switch_x,
            button=(self.button_x, BUTTON_Y, BUTTON_Z),
            plank_x=self.plank_x,
        )


def _surfaces(table: tuple[float, float], left: tuple[float, float], right: tuple[float, float]) -> dict[str, Bounds]:
    return {
        "table": ((table[0], -0.15, 0.46), (table[1], -0.03, 0.46)),
        "slider_left": ((left[0], 0.05, 0.46), (left[1], 0.12, 0.46)),
        "slider_right": ((right[0], 0.05, 0.46), (right[1], 0.12, 0.46)),
    }


SCENES: dict[str, Scene] = {
    "A": Scene(
        name="A",
        blocks={"block_pink": "small", "block_blue": "big", "block_red": "middle"},
        button_x=-0.28,
        switch_x=0.30,
        slide_x0=-0.10,
        slide_travel=0.28,
        drawer_x=0.10,
        plank_x=(-0.36, 0.16),
        surfaces=_surfaces((-0.2, 0.35), (-0.32, -0.16), (-0.05, 0.13)),
        appearance=Appearance((0.36, 0.24, 0.16), (0.36, 0.24, 0.16), (0.08, 0.08, 0.09), (0.72, 0.74, 0.77)),
    ),
    "B": Scene(
        name="B",
        blocks={"block_red": "small", "block_blue": "big", "block_pink": "middle"},
        button_x=0.28,
        switch_x=-0.32,
        slide_x0=0.088,
        slide_travel=0.304,
        drawer_x=0.18,
        plank_x=(-0.18, 0.34),
        surfaces=_surfaces((-0.35, 0.15), (-0.12, 0.06), (0.15, 0.33)),
        appearance=Appearance((0.86, 0.76, 0.60), (0.86, 0.76, 0.60), (0.10, 0.10, 0.11), (0.62, 0.66, 0.70)),
    ),
    "C": Scene(
        name="C",
        blocks={"block_blue": "small", "block_red": "big", "block_pink": "middle"},
        button_x=-0.12,
        switch_x=-0.32,
        slide_x0=0.06,
        slide_travel=0.24,
        drawer_x=0.10,
        plank_x=(-0.18, 0.34),
        surfaces=_surfaces((0.0, 0.35), (-0.12, 0.06), (0.15, 0.30)),
        appearance=Appearance((0.69, 0.50, 0.33), (0.33, 0.22, 0.15), (0.62, 0.62, 0.63), (0.78, 0.75, 0.70)),
    ),
    "D": Scene(
        name="D",
        blocks={"block_red": "middle", "block_blue": "small", "block_pink": "big"},
        button_x=-0.12,
        switch_x=0.30,
        slide_x0=-0.10,
        slide_travel=0.28,
        drawer_x=0.18,
        plank_x=(-0.36, 0.16),
        surfaces=_surfaces((0.0, 0.35), (-0.32, -0.16), (-0.05, 0.13)),
        appearance=Appearance((0.73, 0.55, 0.37), (0.73, 0.55, 0.37), (0.55, 0.55, 0.56), (0.66, 0.69, 0.66)),
    ),
}


def get_scene(name: str) -> Scene:
    """The scene "A", "B", "C" or "D". Raises UserError for any other name."""
    if name not in SCENES:
        raise UserError(f"playtable has no scene {name!r}: choose one of {', '.join(SCENES)}")
    return SCENES[name]
