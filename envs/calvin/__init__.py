"""The real CALVIN: `calvin_env` with the interface of `envs.protocol` (Sec. 4.2)."""
