"""An embedded benchmark: a simulated play table with CALVIN's geometry, tasks and protocol (DESIGN 7)."""

from __future__ import annotations

import os

try:
    import mujoco  # noqa: F401  its import already loads the GL library that MUJOCO_GL names
except (AttributeError, ImportError, RuntimeError) as error:
    wish = os.environ.get("MUJOCO_GL")
    advice = f"MUJOCO_GL={wish}: unset it, or install libegl1 or libosmesa6" if wish else "pip install mujoco"
    raise ImportError(f"playtable cannot load mujoco ({error}): {advice}") from error

from envs.playtable.env import PlayTableEnv

__all__ = ["PlayTableEnv"]
