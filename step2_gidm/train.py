"""Pretrain the inverse model, GIDM, and write it to ckpts/gidm/<name> (Sec. 3.2, Alg. 1, Table 10).

A run that was stopped continues where it was when the same command is given again.

Examples:
    python -m step2_gidm.train scale=tiny
    accelerate launch -m step2_gidm.train experiment=gidm/t8_binning name=t8_binning
"""

from __future__ import annotations

import logging

from accelerate.utils import set_seed
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from common import artifact
from common.program import program

log = logging.getLogger(__name__)


@program("step2_gidm")
def main(cfg: DictConfig) -> None:
    set_seed(cfg.seed)
    train_set = instantiate(cfg.data, split="train")
    val_set = instantiate(cfg.data, split="val") if cfg.validate else None
    loop = instantiate(cfg.loop, output_dir=cfg.output_dir, seed=cfg.seed)
    model = loop.fit(instantiate(cfg.gidm), train_set, val_set)
    if loop.accelerator.is_main_process:
        config = OmegaConf.to_container(cfg.gidm, resolve=True)
        artifact.save(model, cfg.output_dir, kind="gidm", config=config, step=loop.step, scale=cfg.scale)
        log.info("GIDM in %s", cfg.output_dir)


if __name__ == "__main__":
    main()
