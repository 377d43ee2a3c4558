"""Off-screen pictures on EGL or OSMesa, without shadows, reflections or multi-sampling (DESIGN 7).

A GL context belongs to the thread that made it, so a renderer is made at the first picture.
"""
from __future__ import annotations

import importlib
import logging
import os

import mujoco
import numpy as np

BACKENDS = ("egl", "osmesa")
HELP = "install libegl1 and libgl1-mesa-dri (egl) or libosmesa6 (osmesa), or run without pictures"

log = logging.getLogger(__name__)


class RenderError(RuntimeError):
    """No GL backend could be started."""


def _open(backend: str, edge: int) -> mujoco.gl_context.GLContext:
    context = importlib.import_module(f"mujoco.{backend}").GLContext(edge, edge)
    context.make_current()
    return context


def _context(edge: int) -> tuple[object, str]:
    """(GL context, backend): what MUJOCO_GL names, otherwise EGL, otherwise OSMesa."""
    wish = os.environ.get("MUJOCO_GL", "").lower()
    if wish and wish not in BACKENDS:
        raise RenderError(f"MUJOCO_GL={wish}: pictures are rendered off screen, set it to egl or osmesa")
    reasons = []
    for backend in (wish,) if wish else BACKENDS:
        # PyOpenGL keeps the first platform it was imported with; this is read at that import.
        os.environ.setdefault("PYOPENGL_PLATFORM", backend)
        try:
            context = _open(backend, edge)
        except (ImportError, RuntimeError, AttributeError, OSError) as error:
            reasons.append(f"{backend}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            if os.environ.get("PYOPENGL_PLATFORM") == backend:
                del os.environ["PYOPENGL_PLATFORM"]
            continue
        if backend != BACKENDS[0] and not wish:
            log.warning("EGL does not start here (%s): pictures come from OSMesa, which is slower", reasons[0])
        return context, backend
    raise RenderError(f"no GL for pictures ({'; '.join(reasons)}): {HELP}")


class Renderer:
    """Pictures of a model's fixed cameras, up to `edge` pixels wide and high. Close it in the thread that made it."""

    def __init__(self, model: mujoco.MjModel, edge: int) -> None:
        self._model = model
        self._gl, self.backend = _context(edge)
        self._scene = mujoco.MjvScene(model, maxgeom=200)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION, mujoco.mjtRndFlag.mjRND_HAZE):
            self._scene.flags[flag] = False
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._mjr)

    def picture(self, data: mujoco.MjData, camera: str, size: int) -> np.ndarray:
        """The view of a camera of the model -> (size, size, 3) uint8 RGB, top row first."""
        self._gl.make_current()
        self._camera.fixedcamid = self._model.camera(camera).id
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        window = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(window, self._scene, self._mjr)
        upside_down = np.empty((size, size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(upside_down, None, window, self._mjr)
        return np.ascontiguousarray(upside_down[::-1])

    def close(self) -> None:
        """Free the context; a second call does nothing."""
        if self._gl is not None:
            self._gl.make_current()
            self._mjr.free()
            self._gl.free()
            self._gl = None
