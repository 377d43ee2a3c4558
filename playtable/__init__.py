"""An embedded benchmark: a simulated play table with CALVIN's geometry, tasks and protocol (DESIGN 7)."""
from playtable.env import PlayTable

__all__ = ["PlayTable"]
