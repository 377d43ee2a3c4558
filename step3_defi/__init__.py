"""Step 3: forward and inverse dynamics coupled with an action adapter (Sec. 3.3-3.4)."""

from __future__ import annotations

from typing import Any

__all__ = ["DeFI"]


def __getattr__(name: str) -> Any:
    """Import DeFI when it is asked for: simulator processes import this package, and need no torch or diffusers."""
    if name == "DeFI":
        from step3_defi.model import DeFI

        return DeFI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
