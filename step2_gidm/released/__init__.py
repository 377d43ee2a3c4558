"""Checkpoints that others published, UniVLA and the release, as models of this step."""
