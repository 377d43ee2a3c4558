"""Off-screen pictures on EGL or OSMesa, without shadows, reflections or multi-sampling (DESIGN 7).

A GL context belongs to the thread that made it, so a renderer is made at the first picture.
"""

from __future__ import annotations

import atexit
import ctypes
import ctypes.util
import importlib
import logging
import os
import weakref
from typing import Protocol

import mujoco
import numpy as np

BACKENDS = ("egl", "osmesa")
INSTALL_HINT = "install libegl1 with libgl1-mesa-dri (egl) or libosmesa6 (osmesa), or run without pictures"
MAX_GEOMS = 200

log = logging.getLogger(__name__)


class RenderError(RuntimeError):
    """No GL backend could be started."""


class _Context(Protocol):
    def make_current(self) -> None: ...

    def free(self) -> None: ...


def _egl_works() -> bool:
    """Is there a device that EGL can render on? Asked without PyOpenGL, which stays with the first backend it met."""
    name = ctypes.util.find_library("EGL")
    if name is None:
        return False
    try:
        look_up = ctypes.CDLL(name).eglGetProcAddress
    except (OSError, AttributeError):
        return False
    look_up.restype, look_up.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    address = look_up(b"eglQueryDevicesEXT")
    if not address:
        return False
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))(address)
    count = ctypes.c_int(0)
    return bool(query(0, None, ctypes.byref(count))) and count.value > 0


def _select_backend() -> str:
    """What MUJOCO_GL names; otherwise EGL where it works, and OSMesa elsewhere."""
    requested = os.environ.get("MUJOCO_GL", "").lower()
    if requested:
        if requested not in BACKENDS:
            raise RenderError(f"MUJOCO_GL={requested}: pictures are rendered off screen, set it to egl or osmesa")
        return requested
    if _egl_works():
        return "egl"
    log.warning("no EGL device here: pictures come from OSMesa (set MUJOCO_GL to choose)")
    return "osmesa"


def _create_context(offscreen_size: int) -> tuple[_Context, str]:
    backend = _select_backend()
    try:
        context = importlib.import_module(f"mujoco.{backend}").GLContext(offscreen_size, offscreen_size)
        context.make_current()
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise RenderError(f"no pictures, {backend} does not start ({error}): {INSTALL_HINT}") from error
    return context, backend


def _free_context(gl: _Context, mjr: mujoco.MjrContext) -> None:
    gl.make_current()
    mjr.free()
    gl.free()


class Renderer:
    """Pictures of a model's fixed cameras, up to `edge` pixels wide and high.

    Raises RenderError where no off-screen GL starts. Use and close it in the thread that made it.
    """

    def __init__(self, model: mujoco.MjModel, offscreen_size: int) -> None:
        self._model = model
        self._gl, self.backend = _create_context(offscreen_size)
        self._scene = mujoco.MjvScene(model, maxgeom=MAX_GEOMS)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION, mujoco.mjtRndFlag.mjRND_HAZE):
            self._scene.flags[flag] = False
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._mjr)
        # Runs at exit too, and there before what the import of the GL module registered: finalizers would all wait for
        # their turn,
        # which is that of the first one in the program, and a display that is gone cannot free its contexts.
        self._finalizer = weakref.finalize(self, _free_context, self._gl, self._mjr)
        self._finalizer.atexit = False
        atexit.register(self._finalizer)

    def render(self, data: mujoco.MjData, camera: str, size: int) -> np.ndarray:
        """The view of a camera of the model -> (size, size, 3) uint8 RGB, top row first."""
        self._gl.make_current()
        self._camera.fixedcamid = self._model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, everything, self._scene)
        window = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(window, self._scene, self._mjr)
        upside_down = np.empty((size, size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(upside_down, None, window, self._mjr)
        return np.ascontiguousarray(upside_down[::-1])

    def close(self) -> None:
        """Free the context; a second call does nothing."""
        self._finalizer()
