"""General Forward Dynamics Model (Sec. 3.1): imagine the next frames. Front door: GFDM, and DinoFuture of Table 6."""

from common import artifact
from step1_gfdm.dino_future import DinoFuture
from step1_gfdm.model import GFDM

__all__ = ["GFDM", "DinoFuture"]

artifact.register_kind("gfdm", made_by="scripts/step1_train_svd.sh")
