"""Stands in for calvin_env: the names that playtable.calvin uses, without physics."""
