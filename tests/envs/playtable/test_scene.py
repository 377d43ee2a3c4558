"""Positions, sizes and ranges of the four scenes are CALVIN's, in `SCENES` and in the compiled model."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

from envs.playtable.mjcf import compile_model
from envs.playtable.scene import SCENES, get_scene

FACTS = {
    # x of button, switch and door, travel of the door, x of the drawer, ends of the plank, blocks in order
    "A": (-0.28, 0.30, -0.10, 0.28, 0.10, (-0.36, 0.16), {"pink": 0.04, "blue": 0.08, "red": 0.056}),
    "B": (0.28, -0.32, 0.088, 0.304, 0.18, (-0.18, 0.34), {"red": 0.04, "blue": 0.08, "pink": 0.056}),
    "C": (-0.12, -0.32, 0.06, 0.24, 0.10, (-0.18, 0.34), {"blue": 0.04, "red": 0.08, "pink": 0.056}),
    "D": (-0.12, 0.30, -0.10, 0.28, 0.18, (-0.36, 0.16), {"red": 0.056, "blue": 0.04, "pink": 0.08}),
}


@pytest.fixture(scope="module", params=sorted(FACTS))
def built(request):
    scene = get_scene(request.param)
    model = compile_model(scene)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return scene, model, data


def test_fixtures_stand_where_calvin_has_them(built):
    scene, model, data = built
    button, switch, door, travel, drawer, plank, blocks = FACTS[scene.name]
    assert data.body("button_link").xpos[:2] == pytest.approx([button, -0.12])
    assert data.body("led_link").xpos[0] == pytest.approx(button)
    assert data.body("switch_link").xpos[0] == pytest.approx(switch)
    assert data.body("light_link").xpos[0] == pytest.approx(switch)
    assert data.body("slide_link").xpos[0] == pytest.approx(door)
    assert data.body("drawer_link").xpos[0] == pytest.approx(drawer)
    wanted = {"base__slide": travel, "base__drawer": 0.22, "base__button": 0.02, "base__switch": 0.088}
    assert scene.limits == wanted
    for joint, limit in wanted.items():
        assert tuple(model.joint(joint).range) == pytest.approx((0.0, limit))
    assert scene.fixtures.plank_x == plank


def test_blocks_have_calvins_order_size_and_mass(built):
    scene, model, _ = built
    blocks = FACTS[scene.name][-1]
    assert scene.block_names == tuple(f"block_{color}" for color in blocks)
    for color, longest in blocks.items():
        geom = int(model.body(f"block_{color}").geomadr[0])
        assert tuple(2 * model.geom_size[geom]) == pytest.approx((longest, 0.04, 0.04))
        assert scene.sizes[f"block_{color}"] == (longest, 0.04, 0.04)
        assert model.body(f"block_{color}").mass[0] == pytest.approx(1.0)
        assert model.geom_friction[geom, 0] == pytest.approx(0.7)


def test_fixtures_move_the_way_the_readings_say(built):
    """The drawer moves to -y, the door to -x, the button down, the switch up along the 60 degree front."""
    _, model, data = built
    ways = {
        "base__drawer": ("drawer_link", (0, -1, 0)),
        "base__slide": ("slide_link", (-1, 0, 0)),
        "base__button": ("button_link", (0, 0, -1)),
        "base__switch": ("switch_link", (0, 0.5, 3**0.5 / 2)),
    }
    for joint, (body, way) in ways.items():
        before = data.body(body).xpos.copy()
        data.joint(joint).qpos = 0.01
        mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(data.body(body).xpos - before, 0.01 * np.array(way), atol=1e-6)


def test_cabinet_places_lie_on_the_plank_and_beside_the_door():
    for scene in SCENES.values():
        for side in ("slider_left", "slider_right"):
            (low, *_), (high, *_) = scene.surfaces[side]
            assert scene.plank_x[0] < low < high < scene.plank_x[1]


def test_no_geom_is_a_mesh_and_there_are_few(built):
    _, model, _ = built
    assert model.nmesh == 0
    assert model.ngeom < 100


def test_scenes_look_different():
    means = [compile_model(scene).tex_data.reshape(-1)[:200_000].mean() for scene in SCENES.values()]
    assert len({round(float(mean), 1) for mean in means}) == 4


def test_unknown_scene_names_the_choice():
    with pytest.raises(ValueError, match="'E'.*A, B, C, D"):
        get_scene("E")
