"""The real CALVIN: `calvin_env` behind the interface of `envs.protocol` (Sec. 4.2)."""
