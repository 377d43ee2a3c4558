"""An embedded benchmark: a simulated play table with CALVIN's geometry, tasks and protocol (DESIGN 7)."""
from __future__ import annotations

import os

try:
    import mujoco  # noqa: F401  its import already loads the GL library that MUJOCO_GL names
except (AttributeError, ImportError, RuntimeError) as error:
    wish = os.environ.get("MUJOCO_GL")
    if not wish:
        raise ImportError(f"playtable needs mujoco ({error}): pip install mujoco") from error
    raise ImportError(f"MUJOCO_GL={wish} does not work here ({error}): unset it, or install its library (libegl1, libosmesa6)") from error

from playtable.env import PlayTable

__all__ = ["PlayTable"]
