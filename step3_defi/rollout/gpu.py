"""The GPU that a process's simulators draw on: its own, where several processes share a machine (Sec. 4.2, DESIGN 6).

Left alone, EGL draws everything on its first device. playtable's MuJoCo reads MUJOCO_EGL_DEVICE_ID, calvin_env's
pybullet
EGL_VISIBLE_DEVICES, a place in EGL's list; neither follows torch.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Mapping, Sequence
from functools import cache

CUDA_DEVICE = 0x323A  # EGL_CUDA_DEVICE_NV of EGL_NV_device_cuda
MAX_DEVICES = 64  # devices that are asked for


def egl_environment(environment: Mapping[str, str], numbers: Sequence[int | None]) -> dict[str, str]:
    """The variables to add to an environment for EGL to draw on the GPU of its LOCAL_RANK; what is set there already
    stays.

    `numbers`: the CUDA number of each of EGL's devices. Nothing is added where EGL does not list that GPU, as without a
    GPU, or where
    CUDA_VISIBLE_DEVICES names GPUs by other than numbers.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    listed = sorted(number for number in numbers if number is not None)
    names = listed if visible is None else [name.strip() for name in visible.split(",")]
    if not all(str(name).isdecimal() for name in names):
        return {}
    gpus, rank = [int(name) for name in names], int(environment.get("LOCAL_RANK", 0))
    counted = gpus if set(gpus) <= set(listed) else range(len(gpus))  # a driver may count among the visible ones only
    if rank >= len(gpus) or counted[rank] not in listed:
        return {}
    added = {} if "EGL_VISIBLE_DEVICES" in environment else {"EGL_VISIBLE_DEVICES": str(numbers.index(counted[rank]))}
    if "MUJOCO_EGL_DEVICE_ID" not in environment:
        # MuJoCo 4 counts among CUDA_VISIBLE_DEVICES, MuJoCo 3 among all: with one that is visible they agree
        added |= {"MUJOCO_EGL_DEVICE_ID": str(gpus[rank])} | (
            {} if visible is None else {"CUDA_VISIBLE_DEVICES": str(gpus[rank])}
        )
    return added


@cache
def egl_cuda_indices() -> tuple[int | None, ...]:
    """The CUDA number of each device that EGL lists, None of one that is no GPU of CUDA's; empty without EGL."""
    library = ctypes.util.find_library("EGL")
    if library is None:
        return ()
    look_up = ctypes.CDLL(library).eglGetProcAddress
    look_up.restype, look_up.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    addresses = [look_up(name) for name in (b"eglQueryDevicesEXT", b"eglQueryDeviceAttribEXT")]
    if not all(addresses):
        return ()
    query = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int)
    )(addresses[0])
    attribute = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_ssize_t))(
        addresses[1]
    )
    devices, count, value = (ctypes.c_void_p * MAX_DEVICES)(), ctypes.c_int(0), ctypes.c_ssize_t(0)
    if not query(MAX_DEVICES, devices, ctypes.byref(count)):
        return ()
    return tuple(
        value.value if attribute(device, CUDA_DEVICE, ctypes.byref(value)) else None
        for device in devices[: count.value]
    )
