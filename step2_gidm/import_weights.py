"""Program: UniVLA's or the release's inverse model -> our artifact.   python -m step2_gidm.import_weights path=lam_idm.ckpt name=<name>

The checkpoint's copies of DINOv2 and T5 are left out: ours names them (gidm.vision.path, gidm.text.path) and never copies them.
"""
from __future__ import annotations

import logging
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from common import artifact
from common.checkpoint import CheckpointError, check_import, misfit, read_tensors
from common.files import sha256
from common.program import program
from step2_gidm.univla import FROZEN, from_univla

log = logging.getLogger(__name__)


def fill(model: nn.Module, path: str | Path, *, skip_foreign: bool = False) -> dict[str, int]:
    """Put a published checkpoint's weights into a GIDM, keys strict; returns how many tensors were taken and how many are frozen parts of others."""
    tensors = read_tensors(path, skip_foreign=skip_foreign)
    try:
        state = from_univla(tensors)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if wrong := misfit(model, state):
        raise CheckpointError(f"{path} does not fit the configured model (gidm=...; names are ours): {wrong}")
    model.load_state_dict(state)
    return {"taken": len(state), "frozen": sum(name.removeprefix("lam.").startswith(FROZEN) for name in tensors)}


@program("step2_import")
def main(cfg: DictConfig) -> None:
    check_import(cfg.path, cfg.output_dir, cfg.foreign, expected="UniVLA's lam-stage-1 or the release's lam_idm checkpoint")
    model = instantiate(cfg.gidm)
    counts = fill(model, cfg.path, skip_foreign=cfg.foreign == "skip")
    config = OmegaConf.to_container(cfg.gidm, resolve=True)
    artifact.save(model, cfg.output_dir, kind="gidm", config=config, parents={Path(cfg.path).name: sha256(Path(cfg.path))})
    log.info("%d tensors taken, %d of DINOv2 and T5 left out; GIDM in %s", counts["taken"], counts["frozen"], cfg.output_dir)


if __name__ == "__main__":
    main()
