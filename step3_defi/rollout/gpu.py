"""Which GPU a process's simulators render on: its own GPU, where several processes share a machine (Sec. 4.2).

By default EGL renders everything on its first device, whichever GPU torch uses. playtable's MuJoCo reads the variable
MUJOCO_EGL_DEVICE_ID; calvin_env's pybullet reads EGL_VISIBLE_DEVICES, which is a place in EGL's list of devices.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Mapping, Sequence
from functools import cache

CUDA_DEVICE = 0x323A  # EGL_CUDA_DEVICE_NV of EGL_NV_device_cuda
MAX_DEVICES = 64  # EGL lists so many devices at most


def egl_environment(environment: Mapping[str, str], numbers: Sequence[int | None]) -> dict[str, str]:
    """The variables that make EGL render on the GPU of LOCAL_RANK, for addition to `environment`.

    `numbers` holds the CUDA number of each of EGL's devices. Variables that are set already are kept. The result is
    empty where EGL does not list the GPU, for instance on a machine without one, and where CUDA_VISIBLE_DEVICES names
    GPUs otherwise than by numbers.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    listed = sorted(number for number in numbers if number is not None)
    names = listed if visible is None else [name.strip() for name in visible.split(",")]
    if not all(str(name).isdecimal() for name in names):
        return {}
    gpus, rank = [int(name) for name in names], int(environment.get("LOCAL_RANK", 0))
    # Some drivers number the visible GPUs only.
    counted = gpus if set(gpus) <= set(listed) else range(len(gpus))
    if rank >= len(gpus) or counted[rank] not in listed:
        return {}
    added = {} if "EGL_VISIBLE_DEVICES" in environment else {"EGL_VISIBLE_DEVICES": str(numbers.index(counted[rank]))}
    if "MUJOCO_EGL_DEVICE_ID" not in environment:
        # MuJoCo 4 numbers the GPUs of CUDA_VISIBLE_DEVICES and MuJoCo 3 all GPUs. With one visible GPU they agree.
        added |= {"MUJOCO_EGL_DEVICE_ID": str(gpus[rank])} | (
            {} if visible is None else {"CUDA_VISIBLE_DEVICES": str(gpus[rank])}
        )
    return added


@cache
def egl_cuda_indices() -> tuple[int | None, ...]:
    """The CUDA number of each device that EGL lists, None for a device that CUDA does not know; empty without EGL."""
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
