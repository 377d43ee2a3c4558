"""A simulated play table with CALVIN's geometry, tasks and protocol, on MuJoCo alone (Sec. 4.2).

It stands in for CALVIN where `calvin_env` cannot be installed. All shapes are boxes, cylinders, capsules and spheres.
"""

from __future__ import annotations

import os

try:
    import mujoco  # noqa: F401  (this import already loads the GL library that MUJOCO_GL names)
except (AttributeError, ImportError, RuntimeError) as error:
    backend = os.environ.get("MUJOCO_GL")
    advice = f"MUJOCO_GL={backend}: unset it, or install libegl1 or libosmesa6" if backend else "pip install mujoco"
    raise ImportError(f"playtable cannot load mujoco ({error}): {advice}") from error

from envs.playtable.env import PlayTableEnv

__all__ = ["PlayTableEnv"]
