"""The MuJoCo model of a scene: MJCF text of boxes, cylinders, capsules and spheres, with CALVIN's dimensions.

Bodies have the names of CALVIN's links, so that contacts are reported with the same names.
"""

from __future__ import annotations

from math import cos, pi, radians, sin, tan
from typing import Final

import mujoco
import numpy as np

from envs.playtable import human
from envs.playtable.robot import actuator_xml, robot_xml
from envs.playtable.scene import (
    BUTTON_TRAVEL,
    BUTTON_Y,
    BUTTON_Z,
    CABINET_DEPTH,
    DRAWER_TRAVEL,
    DRAWER_Z,
    RGB,
    SLIDE_Y,
    SLIDE_Z,
    SWITCH_TRAVEL,
    SWITCH_Y,
    SWITCH_Z,
    TABLE_TOP,
    Appearance,
    Scene,
)
from envs.playtable.shapes import BLOCK, STATIC, VISUAL_ONLY, array_to_string, body, box, geom, inertial

TIMESTEP: Final = 1.0 / 480.0
LOOK_FROM: Final = (2.871459009488717, -2.166602199425597, 2.555159848480571)
LOOK_AT: Final = (-0.026242351159453392, -0.0302329882979393, 0.3920000493526459)
LOOK_UP: Final = (0.4041403970338857, 0.22629790978217404, 0.8862616969685161)
STATIC_FOV: Final = 10.0
FIXTURE_JOINTS = ("base__slide", "base__drawer", "base__button", "base__switch")
SLOPE: Final = radians(60)  # of the cabinet's slanted front against the horizontal
ROOF: Final = 0.648  # m, height of the cabinet
CONTACT_MARGIN: Final = 0.001  # m around each geom within which a contact is listed, but exerts no force

GRAVCOMP = 'gravcomp="1"'  # so that fixtures stay in place; with gravity they would creep in spite of friction
LIMIT_SOLVER = 'solreflimit="0.005 1" solimplimit="0.98 0.999 0.001"'
WOOD, INNER, HANDLE, METAL = 'material="wood"', 'material="inner"', 'material="handle"', 'material="lever"'
WOOD_MATERIALS = ("wood", "plank", "drawer", "door", "inner")
BLOCK_RGB: dict[str, RGB] = {
    "block_red": (0.86, 0.08, 0.07),
    "block_blue": (0.06, 0.16, 0.86),
    "block_pink": (0.98, 0.42, 0.86),
}
PLAIN_RGB: dict[str, RGB] = {
    "lever": (0.42, 0.42, 0.44),
    "button": (0.08, 0.08, 0.08),
    "slot": (0.05, 0.05, 0.05),
    "white": (0.93, 0.93, 0.94),
    "joint": (0.78, 0.79, 0.81),
    "finger": (0.25, 0.25, 0.27),
    "pad": (0.62, 0.62, 0.64),
    "dark": (0.2, 0.2, 0.22),
    "stand": (0.85, 0.85, 0.86),
    "lightbulb": (1.0, 1.0, 1.0),
    "led": (1.0, 1.0, 1.0),
}
TEXTURE_SIZE = 256


def _front(height: float) -> float:
    """y of the slanted front at a height z."""
    return CABINET_DEPTH[0] + (height - TABLE_TOP) / tan(SLOPE)


def _slanted_box(
    x: tuple[float, float],
    heights: tuple[float, float],
    depth: tuple[float, float],
    *,
    appearance: str,
    collision: str = STATIC,
) -> str:
    """A box in the slanted front between two heights. `depth` is measured from the front inwards."""
    y, z = (np.mean([_front(height) for height in heights]), np.mean(heights))
    inwards = np.mean(depth)
    centre = (np.mean(x), y + inwards * sin(SLOPE), z - inwards * cos(SLOPE))
    half = (np.ptp(x) / 2, np.ptp(heights) / sin(SLOPE) / 2, np.ptp(depth) / 2)
    return geom("box", centre, half, f'euler="{SLOPE:.10g} 0 0" {appearance}', collision)


def _cabinet(scene: Scene) -> list[str]:
    """The upper part: back, roof and the two side parts beside the opening of the cabinet."""
    near, far = CABINET_DEPTH
    left, right = scene.plank_x
    parts = [
        box((-0.44, far, 0.40), (0.44, 0.18, ROOF), WOOD),
        box((left, _front(0.628), 0.628), (right, far, ROOF), WOOD),
    ]
    for start, end in ((-0.44, left), (right, 0.44)):
        parts += [
            _slanted_box((start, end), (TABLE_TOP, ROOF), (0.0, 0.044), appearance=WOOD),
            box((start, 0.085, TABLE_TOP), (end, far, 0.53), WOOD),
            box((start, 0.125, 0.53), (end, far, 0.61), WOOD),
            box((start, near, 0.40), (end, far, TABLE_TOP), WOOD),
        ]
    return parts


def _stand(scene: Scene) -> list[str]:
    """The lower part: table top, drawer shaft and legs."""
    low, high = scene.drawer_x - 0.2, scene.drawer_x + 0.2
    parts = [
        box((-0.44, -0.18, 0.40), (0.44, CABINET_DEPTH[0], TABLE_TOP), WOOD),
        box((-0.44, CABINET_DEPTH[0], 0.40), (0.44, 0.18, 0.42), INNER),
        box((-0.44, -0.158, 0.30), (low, -0.14, 0.40), WOOD),
        box((high, -0.158, 0.30), (0.44, -0.14, 0.40), WOOD),
        box((-0.44, -0.14, 0.30), (-0.42, 0.18, 0.40), WOOD),
        box((0.42, -0.14, 0.30), (0.44, 0.18, 0.40), WOOD),
        box((-0.42, 0.16, 0.30), (0.42, 0.18, 0.40), WOOD),
        box((-0.42, -0.158, 0.295), (0.42, 0.16, 0.315), INNER),
    ]
    for x in (-0.42, 0.42):
        for y in (-0.164, 0.164):
            parts.append(box((x - 0.02, y - 0.016, 0.0), (x + 0.02, y + 0.016, 0.40), WOOD))
    return parts


def _slide_joint(name: str, axis: str, travel: float, mass: float, resistance: str) -> list[str]:
    limits = f'range="0 {travel:.10g}" {LIMIT_SOLVER}'
    return [f'<joint name="{name}" type="slide" axis="{axis}" {limits} {resistance}/>', inertial(mass, mass * 0.01)]


def _drawer(scene: Scene) -> str:
    parts = _slide_joint("base__drawer", "0 -1 0", DRAWER_TRAVEL, 4.2, 'frictionloss="4" damping="6"')
    parts += [
        box((-0.2, -0.16, 0.0), (0.2, 0.06, 0.02), INNER),
        box((-0.2, -0.16, 0.02), (-0.18, 0.06, 0.076), INNER),
        box((0.18, -0.16, 0.02), (0.2, 0.06, 0.076), INNER),
        box((-0.18, 0.04, 0.02), (0.18, 0.06, 0.076), INNER),
        box((-0.22, -0.18, -0.02), (0.22, -0.16, 0.079), 'material="drawer"'),
        box((-0.12, -0.26, 0.02), (0.12, -0.24, 0.06), HANDLE),
        box((-0.12, -0.24, 0.02), (-0.10, -0.18, 0.06), HANDLE),
        box((0.10, -0.24, 0.02), (0.12, -0.18, 0.06), HANDLE),
    ]
    return body("drawer_link", (scene.drawer_x, 0, DRAWER_Z), parts, GRAVCOMP)


def _slide(scene: Scene) -> str:
    """The sliding door. Its frame lies in the slanted front: local y points up along it, local z out of it."""
    parts = _slide_joint("base__slide", "-1 0 0", scene.slide_travel, 1.5, 'frictionloss="4" damping="6"')
    parts += [
        box((0.0, -0.11, 0.001), (0.28, 0.11, 0.02), 'material="door"'),
        box((0.12, -0.08, 0.06), (0.16, 0.08, 0.08), HANDLE),
        box((0.12, -0.08, 0.02), (0.16, -0.06, 0.06), HANDLE),
        box((0.12, 0.06, 0.02), (0.16, 0.08, 0.06), HANDLE),
    ]
    frame = f'euler="{SLOPE:.10g} 0 0" {GRAVCOMP}'
    return body("slide_link", (scene.slide_x0, SLIDE_Y, SLIDE_Z), parts, frame)


def _switch(scene: Scene) -> str:
    """The switch: a bar on two rods in slots of the front. Local y points out of the front, local z down along it."""
    parts = _slide_joint("base__switch", "0 0 -1", SWITCH_TRAVEL, 0.24, 'frictionloss="3" damping="4"')
    parts += [box((x - 0.007, 0.0, -0.016), (x + 0.007, 0.05, 0.0), METAL) for x in (-0.05, 0.05)]
    parts.append(box((-0.06, 0.044, -0.024), (0.06, 0.064, 0.008), METAL))
    frame = f'euler="{SLOPE + pi / 2:.10g} 0 0" {GRAVCOMP}'
    return body("switch_link", (scene.switch_x, SWITCH_Y, SWITCH_Z), parts, frame)


def _slots(scene: Scene) -> list[str]:
    spans = [(scene.switch_x + x - 0.009, scene.switch_x + x + 0.009) for x in (-0.05, 0.05)]
    return [
        _slanted_box(span, (0.49, 0.594), (-0.001, 0.0), appearance='material="slot"', collision=VISUAL_ONLY)
        for span in spans
    ]


def _button(scene: Scene) -> list[str]:
    parts = _slide_joint("base__button", "0 0 -1", BUTTON_TRAVEL, 0.15, 'stiffness="200" springref="0" damping="6"')
    parts.append(geom("cylinder", (0, 0, 0.012), (0.032, 0.012), 'material="button"'))
    ring = geom("cylinder", (scene.button_x, BUTTON_Y, 0.449), (0.04, 0.009), METAL)
    return [ring, body("button_link", (scene.button_x, BUTTON_Y, BUTTON_Z), parts, GRAVCOMP)]


def _lights(scene: Scene) -> list[str]:
    led = box((-0.08, -0.02, 0.0), (0.08, 0.02, 0.016), 'material="led"')
    socket = geom("cylinder", (0, 0, 0.008), (0.014, 0.008), METAL)
    bulb = geom("sphere", (0, 0, 0.034), (0.026,), 'material="lightbulb"')
    return [
        body("led_link", (scene.button_x, 0.16, ROOF), [led]),
        body("light_link", (scene.switch_x, 0.16, ROOF), [socket, bulb]),
    ]


def _table(scene: Scene) -> str:
    left, right = scene.plank_x
    plank = box((left, CABINET_DEPTH[0], 0.42), (right, CABINET_DEPTH[1], TABLE_TOP), 'material="plank"')
    content = _stand(scene) + _cabinet(scene) + _slots(scene) + _button(scene)
    content += [body("plank_link", (0, 0, 0), [plank]), _drawer(scene), _slide(scene), _switch(scene), *_lights(scene)]
    return body("base_link", (0, 0, 0), content)


def _blocks(scene: Scene) -> str:
    out = []
    for name, edges in scene.sizes.items():
        appearance = f'material="{name}" mass="1" friction="0.7 0.01 0.0005"'
        content = [f'<freejoint name="{name}"/>', geom("box", (0, 0, 0), np.array(edges) / 2, appearance, BLOCK)]
        out.append(body(name, (0, 0, 1), content))
    return "\n".join(out)


def _assets(appearance: Appearance, more: dict[str, RGB]) -> str:
    def tinted(color: RGB, factor: float) -> RGB:
        return tuple(factor * value for value in color)

    size = f'width="{TEXTURE_SIZE}" height="{TEXTURE_SIZE}" builtin="flat" type="2d"'
    panel = appearance.door if appearance.door != appearance.wood else tinted(appearance.wood, 0.86)
    colors = (appearance.wood, tinted(appearance.wood, 0.92), panel, appearance.door, tinted(appearance.wood, 0.7))
    plain = {**PLAIN_RGB, **BLOCK_RGB, "handle": appearance.handle, "floor": appearance.floor, **more}
    return "\n".join(
        [
            '<texture type="skybox" builtin="flat" rgb1="0.85 0.87 0.9" width="8" height="8"/>',
            *(
                f'<texture name="{name}" {size} rgb1="{array_to_string(c)}"/>'
                for name, c in zip(WOOD_MATERIALS, colors)
            ),
            *(
                f'<material name="{name}" texture="{name}" texuniform="true" texrepeat="2.2 2.2" specular="0.05"/>'
                for name in WOOD_MATERIALS
            ),
            *(f'<material name="{name}" rgba="{array_to_string(c)} 1" specular="0.2"/>' for name, c in plain.items()),
        ]
    )


def _static_camera() -> str:
    back = np.subtract(LOOK_FROM, LOOK_AT)
    right = np.cross(LOOK_UP, back)
    axes = array_to_string((right, np.cross(back, right)))
    return f'<camera name="static" pos="{array_to_string(LOOK_FROM)}" xyaxes="{axes}" fovy="{STATIC_FOV}"/>'


def _contact_margin() -> str:
    """Attributes that list a contact before it exerts force. MuJoCo 3.9 and later lists within margin + gap,
    earlier versions within margin."""
    version = tuple(int(part) for part in mujoco.__version__.split(".")[:2])
    return f'margin="{0.0 if version >= (3, 9) else CONTACT_MARGIN}" gap="{CONTACT_MARGIN}"'


def scene_xml(scene: Scene, offscreen_size: int = 256, *, human_arm: bool = False) -> str:
    """The MJCF text of a scene. `offscreen_size` is the largest image edge in pixels that can be rendered; `human_arm`
    shows a person's arm in place of the robot's."""
    return f"""<mujoco model="playtable_{scene.name}">
<compiler angle="radian" eulerseq="xyz" autolimits="true"/>
<option timestep="{TIMESTEP:.12g}" integrator="implicitfast" cone="elliptic" impratio="3"
 solver="Newton" iterations="30" tolerance="1e-8"/>
<size memory="4M"/>
<visual>
<global offwidth="{offscreen_size}" offheight="{offscreen_size}"/>
<quality offsamples="0" shadowsize="0" numslices="10" numstacks="5" numquads="1"/>
<headlight ambient="0.35 0.35 0.35" diffuse="0.25 0.25 0.25" specular="0 0 0"/>
<map znear="0.01" zfar="12"/>
</visual>
<statistic extent="1" center="0 0 0.4" meansize="0.05"/>
<default>
<geom condim="4" solref="0.008 1" solimp="0.95 0.99 0.001" friction="0.7 0.005 0.0002" {_contact_margin()}/>
</default>
<asset>{_assets(scene.appearance, human.MATERIAL_RGB if human_arm else {})}</asset>
<worldbody>
<light directional="true" pos="0.6 -1.2 3" dir="-0.25 0.55 -1" diffuse="0.5 0.5 0.5" specular="0.2 0.2 0.2"
 castshadow="false"/>
<geom name="floor" type="plane" size="6 6 0.1" material="floor" {STATIC}/>
{_static_camera()}
{_table(scene)}
{robot_xml(human_arm=human_arm)}
{_blocks(scene)}
</worldbody>
{actuator_xml()}
</mujoco>"""


def _wood_texture(color: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Base color (3,) -> (S, S, 3) uint8 texture of wood with wavy grain."""
    rows, columns = np.mgrid[0:TEXTURE_SIZE, 0:TEXTURE_SIZE] / TEXTURE_SIZE
    waves = sum(
        share * np.sin(2 * pi * (rings * rows + 0.15 * np.sin(2 * pi * (columns + phase)) + phase))
        for share, rings, phase in zip((0.5, 0.35, 0.3), (6, 17, 41), rng.uniform(0, 1, 3))
    )
    fibres = np.repeat(rng.normal(0, 0.35, (TEXTURE_SIZE, 16)), TEXTURE_SIZE // 16, axis=1)
    shade = 1.0 + 0.07 * waves + 0.05 * fibres
    return np.clip(color * shade[..., None], 0, 255).astype(np.uint8)


def compile_model(scene: Scene, offscreen_size: int = 256, *, human_arm: bool = False) -> mujoco.MjModel:
    """Compile the model of a scene and set its wood textures, which depend on the scene alone."""
    model = mujoco.MjModel.from_xml_string(scene_xml(scene, offscreen_size, human_arm=human_arm))
    rng = np.random.default_rng(ord(scene.name))
    for name in WOOD_MATERIALS:
        texture = model.texture(name).id
        start = int(model.tex_adr[texture])
        pixels = model.tex_data[start : start + 3 * TEXTURE_SIZE**2]
        pixels[:] = _wood_texture(pixels[:3].astype(np.float64), rng).ravel()
    return model
