"""Simulated environments with CALVIN's observations, actions, tasks and long-horizon protocol (Sec. 4.2).

`playtable` is a MuJoCo table that runs anywhere, `calvin` wraps the published simulator, `expert` holds the scripted
demonstrator and `recording` what writes its demonstrations. Nothing here knows of models.
"""
