"""Off-screen rendering with EGL or OSMesa, without shadows, reflections and multi-sampling.

A GL context belongs to the thread that created it, so an environment creates its renderer for the first image.
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

from common.errors import UserError

BACKENDS = ("egl", "osmesa")
INSTALL_HINT = "install libegl1 with libgl1-mesa-dri (egl) or libosmesa6 (osmesa), or run without images"
MAX_GEOMS = 200

log = logging.getLogger(__name__)


class RenderError(UserError):
    """No off-screen GL backend can be started on this machine."""


class _Context(Protocol):
    def make_current(self) -> None: ...

    def free(self) -> None: ...


def _egl_works() -> bool:
    """Whether EGL has a device to render on. PyOpenGL is not asked: it stays bound to the first backend it loads."""
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
    """The backend that MUJOCO_GL names; if it is not set, EGL if it has a device and OSMesa otherwise."""
    requested = os.environ.get("MUJOCO_GL", "").lower()
    if requested:
        if requested not in BACKENDS:
            raise RenderError(f"MUJOCO_GL={requested}: images are rendered off screen, set it to egl or osmesa")
        return requested
    if _egl_works():
        return "egl"
    log.warning("there is no EGL device, so OSMesa renders the images (set MUJOCO_GL to choose another backend)")
    return "osmesa"


def _create_context(offscreen_size: int) -> tuple[_Context, str]:
    backend = _select_backend()
    try:
        context = importlib.import_module(f"mujoco.{backend}").GLContext(offscreen_size, offscreen_size)
        context.make_current()
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise RenderError(f"images cannot be rendered, {backend} does not start ({error}): {INSTALL_HINT}") from error
    return context, backend


def _free_context(gl: _Context, mjr: mujoco.MjrContext) -> None:
    gl.make_current()
    mjr.free()
    gl.free()


class Renderer:
    """Renders images of a model's fixed cameras, up to `offscreen_size` pixels wide and high.

    It has to be used and closed in the thread that created it. Raises RenderError if no off-screen GL starts.
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
        # At exit the context has to be freed before the GL module closes its display, which it registered with atexit
        # when it was imported. atexit calls in reverse order, so this call, registered later, comes first. All
        # weakref finalizers together run at the place of the first one in the program, which may be too late.
        self._finalizer = weakref.finalize(self, _free_context, self._gl, self._mjr)
        self._finalizer.atexit = False
        atexit.register(self._finalizer)

    def render(self, data: mujoco.MjData, camera: str, size: int) -> np.ndarray:
        """Image of a camera of the model, (size, size, 3) uint8 RGB, top row first."""
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
        """Free the context. A second call does nothing."""
        self._finalizer()
