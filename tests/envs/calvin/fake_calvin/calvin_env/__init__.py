"""A fake calvin_env: the names that envs.calvin.env uses, without physics."""
