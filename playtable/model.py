"""The MuJoCo model of a scene, written as MJCF from boxes, cylinders, capsules and spheres (DESIGN 7).

Collision groups: table and fixtures meet robot and blocks, the robot meets both, blocks meet everything; robot parts
never meet each other and fixtures never meet the table that carries them.
"""
from __future__ import annotations

from math import cos, pi, radians, sin, tan
from typing import Final

import mujoco
import numpy as np

from playtable import kinematics
from playtable.scene import (
    BUTTON_TRAVEL,
    BUTTON_Y,
    BUTTON_Z,
    CABINET_DEPTH,
    DRAWER_TRAVEL,
    DRAWER_Z,
    ROBOT_BASE,
    SLIDE_Y,
    SLIDE_Z,
    SWITCH_TRAVEL,
    SWITCH_Y,
    SWITCH_Z,
    TABLE_TOP,
    Colour,
    Look,
    Scene,
)

TIMESTEP: Final = 1.0 / 480.0
STATIC_CAMERA = {
    "look_from": (2.871459009488717, -2.166602199425597, 2.555159848480571),
    "look_at": (-0.026242351159453392, -0.0302329882979393, 0.3920000493526459),
    "up": (0.4041403970338857, 0.22629790978217404, 0.8862616969685161),
    "fov": 10.0,
}
GRIPPER_CAMERA = {"offset": (-0.1, 0.0, 0.0), "pitch": 1.3, "turn": -1.57, "fov": 75.0}
JOINTS = ("base__slide", "base__drawer", "base__button", "base__switch")
BLOCK_COLOURS: dict[str, Colour] = {
    "block_red": (0.86, 0.08, 0.07),
    "block_blue": (0.06, 0.16, 0.86),
    "block_pink": (0.98, 0.42, 0.86),
}
SLOPE = radians(60)
TEXTURE_SIZE = 256

FIXED = 'contype="1" conaffinity="0"'
ROBOT = 'contype="2" conaffinity="1"'
BLOCK = 'contype="4" conaffinity="7"'
SEEN = 'contype="0" conaffinity="0"'
WEIGHTLESS = 'gravcomp="1"'  # fixtures stay where they are left, dry friction alone would let them creep


def _numbers(values: object) -> str:
    return " ".join(f"{float(v):.9g}" for v in np.ravel(np.asarray(values)))


def _geom(kind: str, pos: object, size: object, look: str, extra: str = FIXED) -> str:
    return f'<geom type="{kind}" pos="{_numbers(pos)}" size="{_numbers(size)}" {look} {extra}/>'


def _box(low: tuple[float, float, float], high: tuple[float, float, float], look: str, extra: str = FIXED) -> str:
    """A box given by two opposite corners."""
    low_, high_ = np.array(low), np.array(high)
    return _geom("box", (low_ + high_) / 2, (high_ - low_) / 2, look, extra)


def _capsule(start: tuple[float, ...], end: tuple[float, ...], radius: float, look: str, extra: str = SEEN) -> str:
    return f'<geom type="capsule" fromto="{_numbers(start + end)}" size="{radius}" {look} {extra}/>'


def _rgb(colour: Colour, factor: float = 1.0) -> str:
    return f'rgba="{_numbers(np.clip(np.array(colour) * factor, 0, 1))} 1"'


def _front(z: float) -> float:
    """y of the slanted front at height z."""
    return CABINET_DEPTH[0] + (z - TABLE_TOP) / tan(SLOPE)


def _body(name: str, pos: object, content: list[str], frame: str = "") -> str:
    return f'<body name="{name}" pos="{_numbers(pos)}" {frame}>' + "\n".join(content) + "</body>"


def _sliding(name: str, axis: str, travel: float, mass: float, extra: str) -> list[str]:
    inertia = _numbers([mass * 0.01] * 3)
    return [
        f'<joint name="{name}" type="slide" axis="{axis}" range="0 {travel:.9g}" '
        f'solreflimit="0.005 1" solimplimit="0.98 0.999 0.001" {extra}/>',
        f'<inertial pos="0 0 0" mass="{mass}" diaginertia="{inertia}"/>',
    ]


def _cabinet(scene: Scene) -> list[str]:
    """The upper part: plank, back, roof and the two slanted cheeks beside the cabinet's opening."""
    wood = 'material="wood"'
    left, right = scene.plank_x
    near, far = CABINET_DEPTH
    roof = 0.648
    run = (roof - TABLE_TOP) / sin(SLOPE)
    thick = 0.044
    middle = np.array([(_front(TABLE_TOP) + _front(roof)) / 2, (TABLE_TOP + roof) / 2])
    middle = middle + thick / 2 * np.array([sin(SLOPE), -cos(SLOPE)])
    parts = [
        _box((-0.44, far, 0.40), (0.44, 0.18, roof), wood),
        _box((left, _front(0.628), 0.628), (right, far, roof), wood),
    ]
    for start, end in ((-0.44, left), (right, 0.44)):
        x, half = (start + end) / 2, (end - start) / 2
        parts += [
            f'<geom type="box" pos="{_numbers((x, *middle))}" size="{_numbers((half, run / 2, thick / 2))}" '
            f'euler="{SLOPE:.9g} 0 0" {wood} {FIXED}/>',
            _box((start, 0.085, TABLE_TOP), (end, far, 0.53), wood),
            _box((start, 0.125, 0.53), (end, far, 0.61), wood),
            _box((start, near, 0.40), (end, far, TABLE_TOP), wood),
        ]
    return parts


def _stand(scene: Scene) -> list[str]:
    """The lower part: table top, drawer shaft and legs."""
    wood, inner = 'material="wood"', 'material="inner"'
    low, high = scene.drawer_x - 0.2, scene.drawer_x + 0.2
    parts = [
        _box((-0.44, -0.18, 0.40), (0.44, CABINET_DEPTH[0], TABLE_TOP), wood),
        _box((-0.44, CABINET_DEPTH[0], 0.38), (0.44, 0.18, 0.42), inner),
        _box((-0.44, -0.158, 0.30), (low, -0.14, 0.40), wood),
        _box((high, -0.158, 0.30), (0.44, -0.14, 0.40), wood),
        _box((-0.44, -0.14, 0.30), (-0.42, 0.18, 0.40), wood),
        _box((0.42, -0.14, 0.30), (0.44, 0.18, 0.40), wood),
        _box((-0.42, 0.16, 0.30), (0.42, 0.18, 0.40), wood),
        _box((-0.42, -0.158, 0.295), (0.42, 0.16, 0.315), inner),
    ]
    for x in (-0.42, 0.42):
        for y in (-0.164, 0.164):
            parts.append(_box((x - 0.02, y - 0.016, 0.0), (x + 0.02, y + 0.016, 0.40), wood))
    return parts


def _drawer(scene: Scene) -> str:
    panel, inner, handle = 'material="drawer"', 'material="inner"', 'material="handle"'
    parts = _sliding("base__drawer", "0 -1 0", DRAWER_TRAVEL, 4.2, 'frictionloss="4" damping="6"')
    parts += [
        _box((-0.2, -0.16, 0.0), (0.2, 0.06, 0.02), inner),
        _box((-0.2, -0.16, 0.02), (-0.18, 0.06, 0.076), inner),
        _box((0.18, -0.16, 0.02), (0.2, 0.06, 0.076), inner),
        _box((-0.18, 0.04, 0.02), (0.18, 0.06, 0.076), inner),
        _box((-0.22, -0.18, -0.02), (0.22, -0.16, 0.079), panel),
        _box((-0.12, -0.26, 0.02), (0.12, -0.24, 0.06), handle),
        _box((-0.12, -0.24, 0.02), (-0.10, -0.18, 0.06), handle),
        _box((0.10, -0.24, 0.02), (0.12, -0.18, 0.06), handle),
    ]
    return _body("drawer_link", (scene.drawer_x, 0, DRAWER_Z), parts, WEIGHTLESS)


def _slide(scene: Scene) -> str:
    """The sliding door; its frame lies in the slanted front, local y runs up it and local z out of it."""
    door, handle = 'material="door"', 'material="handle"'
    parts = _sliding("base__slide", "-1 0 0", scene.slide_travel, 1.5, 'frictionloss="4" damping="6" ')
    parts += [
        _box((0.0, -0.11, 0.001), (0.28, 0.11, 0.02), door),
        _box((0.12, -0.08, 0.06), (0.16, 0.08, 0.08), handle),
        _box((0.12, -0.08, 0.02), (0.16, -0.06, 0.06), handle),
        _box((0.12, 0.06, 0.02), (0.16, 0.08, 0.06), handle),
    ]
    return _body("slide_link", (scene.slide_x0, SLIDE_Y, SLIDE_Z), parts, f'euler="{SLOPE:.9g} 0 0" {WEIGHTLESS}')


def _switch(scene: Scene) -> str:
    """The lever: two rods that run in slots of the slanted front and carry a bar; local y points out, local z down."""
    parts = _sliding("base__switch", "0 0 -1", SWITCH_TRAVEL, 0.24, 'frictionloss="3" damping="4"')
    metal = 'material="lever"'
    parts += [_box((x - 0.007, 0.0, -0.016), (x + 0.007, 0.05, 0.0), metal) for x in (-0.05, 0.05)]
    parts.append(_box((-0.06, 0.044, -0.024), (0.06, 0.064, 0.008), metal))
    return _body("switch_link", (scene.switch_x, SWITCH_Y, SWITCH_Z), parts, f'euler="{SLOPE + pi / 2:.9g} 0 0" {WEIGHTLESS}')


def _slots(scene: Scene) -> list[str]:
    low, high = np.array([_front(0.49), 0.49]), np.array([_front(0.594), 0.594])
    y, z = (low + high) / 2 + 0.0004 * np.array([-sin(SLOPE), cos(SLOPE)])
    half = float(np.linalg.norm(high - low)) / 2
    return [
        f'<geom type="box" pos="{_numbers((scene.switch_x + dx, y, z))}" size="0.009 {half:.9g} 0.0005" '
        f'euler="{SLOPE:.9g} 0 0" rgba="0.05 0.05 0.05 1" {SEEN}/>'
        for dx in (-0.05, 0.05)
    ]


def _button(scene: Scene) -> list[str]:
    spring = 'stiffness="200" springref="0" damping="6"'
    parts = _sliding("base__button", "0 0 -1", BUTTON_TRAVEL, 0.15, spring)
    parts.append(_geom("cylinder", (0, 0, 0.012), (0.032, 0.012), 'rgba="0.08 0.08 0.08 1"'))
    ring = _geom("cylinder", (scene.button_x, BUTTON_Y, 0.449), (0.04, 0.009), 'material="lever"')
    return [ring, _body("button_link", (scene.button_x, BUTTON_Y, BUTTON_Z), parts, WEIGHTLESS)]


def _lights(scene: Scene) -> list[str]:
    led = _box((-0.08, -0.02, 0.0), (0.08, 0.02, 0.016), 'name="led" material="led"')
    bulb = [
        _geom("cylinder", (0, 0, 0.008), (0.014, 0.008), 'material="lever"'),
        _geom("sphere", (0, 0, 0.034), (0.026,), 'name="lightbulb" material="lightbulb"'),
    ]
    return [_body("led_link", (scene.button_x, 0.16, 0.648), [led]), _body("light_link", (scene.switch_x, 0.16, 0.648), bulb)]


def _table(scene: Scene) -> str:
    left, right = scene.plank_x
    plank = _box((left, CABINET_DEPTH[0], 0.42), (right, CABINET_DEPTH[1], TABLE_TOP), 'material="plank"')
    content = _stand(scene) + _cabinet(scene) + _slots(scene) + _button(scene)
    content += [_body("plank_link", (0, 0, 0), [plank]), _drawer(scene), _slide(scene), _switch(scene), *_lights(scene)]
    return _body("base_link", (0, 0, 0), content)


def _blocks(scene: Scene) -> str:
    out = []
    for name, edges in scene.sizes.items():
        look = f'material="{name}"'
        shape = _geom("box", (0, 0, 0), np.array(edges) / 2, look, f'mass="1" friction="0.7 0.01 0.0005" {BLOCK}')
        out.append(_body(name, (0, 0, -1), [f'<freejoint name="{name}"/>', shape]))
    return "\n".join(out)


def _fingers() -> list[str]:
    pad = f'friction="1 0.02 0.001" solref="0.0042 1" solimp="0.99 0.999 0.0005" priority="1" {ROBOT}'
    out = []
    for side, name in ((1, "left"), (-1, "right")):
        def across(low: float, high: float, side: int = side) -> tuple[float, float]:
            return (low, high) if side > 0 else (-high, -low)

        stem, tip = across(0.005, 0.022), across(0.0, 0.008)
        content = [
            f'<joint name="finger_{name}" type="slide" axis="0 {side} 0" range="0 0.04" armature="0.05" damping="2"/>',
            '<inertial pos="0 0 0.05" mass="0.1" diaginertia="0.0005 0.0005 0.0005"/>',
            _box((-0.0105, stem[0], 0.0), (0.0105, stem[1], 0.0964), 'material="finger"', ROBOT),
            _box((-0.0095, tip[0], 0.068), (0.0095, tip[1], 0.0964), 'material="pad"', pad),
        ]
        out.append(_body(f"finger_{name}", (0, 0, 0.0584), content, 'gravcomp="1"'))
    return out


def _hand() -> str:
    pitch, turn = GRIPPER_CAMERA["pitch"], GRIPPER_CAMERA["turn"]
    rotation = kinematics.matrix_from_euler(np.array([pitch, 0.0, turn]))
    right, up = -rotation[:, 0], -rotation[:, 2]
    offset = GRIPPER_CAMERA["offset"]
    content = [
        '<inertial pos="0 0 0.04" mass="0.81" diaginertia="0.004 0.004 0.004"/>',
        _box((-0.03, -0.1, -0.015), (0.03, 0.1, 0.064), 'material="white"', ROBOT),
        _box((-0.105, -0.04, -0.0125), (-0.03, 0.04, 0.0125), 'material="dark"', SEEN),
        f'<camera name="gripper" pos="{_numbers(offset)}" xyaxes="{_numbers((*right, *up))}" '
        f'fovy="{GRIPPER_CAMERA["fov"]}"/>',
        f'<site name="tcp" pos="0 0 {kinematics.TCP_OFFSET}" size="0.005" rgba="0 0 0 0"/>',
        *_fingers(),
    ]
    frame = f'euler="0 0 {kinematics.HAND_TURN:.9g}" gravcomp="1"'
    return _body("hand", (0, 0, kinematics.HAND_OFFSET), content, frame)


ARM_MASSES = (2.7, 2.73, 2.04, 2.08, 3.0, 1.3, 0.2)
ARM_SHAPES: tuple[tuple[tuple[tuple[float, ...], tuple[float, ...], float, bool], ...], ...] = (
    (((0, 0, -0.17), (0, 0, -0.03), 0.062, False), ((0, -0.05, 0), (0, 0.005, 0), 0.064, False)),
    (((0, 0, -0.02), (0, 0, 0.06), 0.062, False), ((0, -0.03, 0.0), (0, -0.15, 0), 0.060, False)),
    (((0, 0, -0.09), (0, 0, -0.03), 0.060, False), ((0.0, 0, 0.0), (0.0825, 0.03, 0), 0.058, False)),
    (((0, 0, -0.01), (0, 0, 0.05), 0.060, False), ((0, 0.0, 0.0), (-0.0825, 0.075, 0), 0.058, False)),
    (((0, 0, -0.23), (0, 0.03, -0.13), 0.058, False), ((0, 0.06, -0.09), (0, 0.07, -0.01), 0.050, True)),
    (((0, 0, -0.02), (0, 0.02, 0.03), 0.052, True), ((0.03, 0.0, 0), (0.088, 0.0, 0), 0.050, True)),
    (((0, 0, 0.055), (0, 0, 0.095), 0.046, True),),
)


def _arm() -> str:
    """Seven links, each inside the one before; the wrist collides, the upper arm is only seen."""
    content = _hand()
    for i in reversed(range(7)):
        turn, offset = kinematics.LINKS[i]
        low, high = kinematics.LOWER[i], kinematics.UPPER[i]
        parts = [
            f'<joint name="arm_{i + 1}" type="hinge" axis="0 0 1" range="{low} {high}" armature="0.3" damping="2"/>',
            f'<inertial pos="0 0 0" mass="{ARM_MASSES[i]}" diaginertia="0.02 0.02 0.02"/>',
        ]
        for start, end, radius, solid in ARM_SHAPES[i]:
            parts.append(_capsule(start, end, radius, 'material="white"', ROBOT if solid else SEEN))
        if i < 6:
            bend = kinematics.LINKS[i + 1][0]
            if bend:
                parts.append(
                    f'<geom type="cylinder" pos="{_numbers(kinematics.LINKS[i + 1][1])}" euler="{bend:.9g} 0 0" '
                    f'size="0.05 0.064" material="joint" {SEEN}/>'
                    if i in (0, 2, 4)
                    else ""
                )
        content = _body(f"link{i + 1}", offset, [*parts, content], f'euler="{turn:.9g} 0 0" gravcomp="1"')
    foot = [
        _geom("cylinder", (-0.03, 0, 0.03), (0.10, 0.03), 'material="white"', SEEN),
        _capsule((0, 0, 0.08), (0, 0, 0.14), 0.066, 'material="white"'),
        _geom("cylinder", (-0.05, 0, -ROBOT_BASE[2] / 2), (0.13, ROBOT_BASE[2] / 2), 'material="stand"', SEEN),
        content,
    ]
    return _body("link0", ROBOT_BASE, foot)


def _assets(look: Look) -> str:
    def material(name: str, colour: Colour, shine: float = 0.1, extra: str = "") -> str:
        return f'<material name="{name}" {_rgb(colour)} specular="{shine}" shininess="0.3" {extra}/>'

    size = f'width="{TEXTURE_SIZE}" height="{TEXTURE_SIZE}" builtin="flat" type="2d"'
    grain = 'texuniform="true" texrepeat="2.2 2.2"'
    drawer = look.door if look.door != look.wood else tuple(0.86 * c for c in look.wood)
    wooden = {"wood": look.wood, "plank": tuple(0.92 * c for c in look.wood), "drawer": drawer, "door": look.door}
    wooden["inner"] = tuple(0.7 * c for c in look.wood)
    grey: dict[str, tuple[Colour, float]] = {
        "handle": (look.handle, 0.4), "lever": ((0.42, 0.42, 0.44), 0.4), "white": ((0.93, 0.93, 0.94), 0.25),
        "joint": ((0.78, 0.79, 0.81), 0.2), "finger": ((0.25, 0.25, 0.27), 0.2), "pad": ((0.62, 0.62, 0.64), 0.0),
        "dark": ((0.2, 0.2, 0.22), 0.1), "stand": ((0.85, 0.85, 0.86), 0.1),
    }
    parts = [
        '<texture type="skybox" builtin="flat" rgb1="0.85 0.87 0.9" width="8" height="8"/>',
        *(f'<texture name="{name}" {size} rgb1="{_numbers(colour)}"/>' for name, colour in wooden.items()),
        f'<texture name="floor" {size} rgb1="{_numbers(look.floor)}"/>',
        *(f'<material name="{name}" texture="{name}" {grain} specular="0.05" shininess="0.1"/>' for name in wooden),
        '<material name="floor" texture="floor" texuniform="true" texrepeat="1 1" specular="0"/>',
        *(material(name, colour, shine) for name, (colour, shine) in grey.items()),
        *(material(name, colour, 0.15) for name, colour in BLOCK_COLOURS.items()),
        material("lightbulb", (1, 1, 1), 0.2),
        material("led", (1, 1, 1), 0.2),
    ]
    return "\n".join(parts)


def _camera() -> str:
    eye, target = np.array(STATIC_CAMERA["look_from"]), np.array(STATIC_CAMERA["look_at"])
    back = (eye - target) / np.linalg.norm(eye - target)
    right = np.cross(np.array(STATIC_CAMERA["up"]), back)
    up = np.cross(back, right)
    return f'<camera name="static" pos="{_numbers(eye)}" xyaxes="{_numbers((*right, *up))}" fovy="{STATIC_CAMERA["fov"]}"/>'


def _actuators() -> str:
    arm = [
        f'<general joint="arm_{i}" gainprm="4000" biastype="affine" biasprm="0 -4000 -160" forcerange="-200 200"/>'
        for i in range(1, 8)
    ]
    grip = '<general name="grip" joint="finger_left" gainprm="8000" biastype="affine" biasprm="0 -8000 -320" forcerange="-160 160"/>'
    return "\n".join([*arm, grip])


def write_mjcf(scene: Scene, offscreen: int = 256) -> str:
    """The MJCF text of a scene; `offscreen` is the largest picture edge in pixels that will be asked for."""
    return f"""<mujoco model="playtable_{scene.name}">
<compiler angle="radian" eulerseq="xyz" autolimits="true"/>
<option timestep="{TIMESTEP:.12g}" integrator="implicitfast" cone="elliptic" impratio="3"
 solver="Newton" iterations="30" tolerance="1e-8"/>
<size memory="4M"/>
<visual>
 <global offwidth="{offscreen}" offheight="{offscreen}"/>
 <quality offsamples="0" shadowsize="0" numslices="18" numstacks="9" numquads="1"/>
 <headlight ambient="0.35 0.35 0.35" diffuse="0.25 0.25 0.25" specular="0 0 0"/>
 <map znear="0.01" zfar="12"/>
</visual>
<statistic extent="1" center="0 0 0.4" meansize="0.05"/>
<default><geom condim="4" solref="0.008 1" solimp="0.95 0.99 0.001" friction="0.7 0.005 0.0002" margin="0" gap="0.001"/></default>
<asset>{_assets(scene.look)}</asset>
<worldbody>
<light directional="true" pos="0.6 -1.2 3" dir="-0.25 0.55 -1" diffuse="0.5 0.5 0.5" specular="0.2 0.2 0.2" castshadow="false"/>
<geom name="floor" type="plane" size="6 6 0.1" material="floor" {FIXED}/>
{_camera()}
{_table(scene)}
{_arm()}
{_blocks(scene)}
</worldbody>
<equality><joint joint1="finger_right" joint2="finger_left" polycoef="0 1 0 0 0" solref="0.004 1" solimp="0.99 0.999 0.001"/></equality>
<actuator>{_actuators()}</actuator>
</mujoco>"""


def _grain(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(3,) base colour -> (S, S, 3) uint8 planks with wavy fibres."""
    size = TEXTURE_SIZE
    rows, columns = np.mgrid[0:size, 0:size] / size
    waves = sum(
        a * np.sin(2 * pi * (f * rows + 0.15 * np.sin(2 * pi * (columns + p)) + p))
        for a, f, p in zip((0.5, 0.35, 0.3), (6, 17, 41), rng.uniform(0, 1, 3))
    )
    fibres = np.repeat(rng.normal(0, 0.35, (size, 16)), size // 16, axis=1)
    shade = 1.0 + 0.07 * waves + 0.05 * fibres
    return np.clip(colour * shade[..., None], 0, 255).astype(np.uint8)


def _paint(model: mujoco.MjModel, scene: Scene) -> None:
    """Replace flat wooden textures by grain; the picture depends on the scene's name only."""
    rng = np.random.default_rng(ord(scene.name))
    for name in ("wood", "plank", "drawer", "door", "inner"):
        texture = model.texture(name).id
        start, count = model.tex_adr[texture], 3 * TEXTURE_SIZE**2
        colour = model.tex_data[start : start + 3].astype(np.float64)
        model.tex_data[start : start + count] = _grain(colour, rng).ravel()


def build(scene: Scene, offscreen: int = 256) -> mujoco.MjModel:
    """Compile a scene's model."""
    model = mujoco.MjModel.from_xml_string(write_mjcf(scene, offscreen))
    _paint(model, scene)
    return model
