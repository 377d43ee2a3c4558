"""General Forward Dynamics Model (Sec. 3.1): imagine the next frames. Front door: GFDM."""
from step1_gfdm.model import GFDM

__all__ = ["GFDM"]
