"""Simulated environments with CALVIN's observations, actions, tasks and evaluation protocol (Sec. 4.2).

`envs.protocol` says what an environment has to offer and how to add one. `envs.playtable` is a MuJoCo table that runs
anywhere, `envs.calvin` wraps the published simulator of CALVIN, `envs.expert` holds the scripted expert, and
`envs.recording` chains its demonstrations and writes them to files. Nothing in this folder knows about models.
"""

from envs.tasks import resolve_tasks

__all__ = ["resolve_tasks"]
