"""Pretrain the forward model on latents of video sets (Sec. 3.1, Table 10), or resume a training that was stopped.

The artifact is written to ckpts/gfdm/<name>. `scale` chooses the size of the model, its data and its training together,
and `experiment` a row of the paper's tables. GPUs and nodes are used through scripts/step1_train_svd.sh, which starts
this program with accelerate.

Examples:
    python -m step1_gfdm.train scale=tiny
    scripts/step1_train_svd.sh scale=full experiment=gfdm/t5_no_human name=t5_no_human
"""

from __future__ import annotations

import logging

from accelerate.utils import set_seed
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from common import artifact
from common.program import program

log = logging.getLogger(__name__)


@program("step1_gfdm")
def main(cfg: DictConfig) -> None:
    """Train and write the artifact."""
    set_seed(cfg.seed)  # an untrained UNet is then the same in every process and every run
    train_set = instantiate(cfg.data, split="train")
    val_set = instantiate(cfg.data, split="val") if cfg.validate else None
    model = instantiate(cfg.gfdm)
    loop = instantiate(cfg.loop, output_dir=cfg.output_dir, seed=cfg.seed)
    model = loop.fit(model, train_set, val_set)
    if loop.accelerator.is_main_process:
        config = OmegaConf.to_container(cfg.gfdm, resolve=True)
        if "svd" in config:  # the artifact of a GFDM is an SVD pipeline folder itself
            config["svd"] = artifact.HERE
        clips = {name: options["clip"] for name, options in OmegaConf.to_container(cfg.data.sets, resolve=True).items()}
        artifact.save(
            model, cfg.output_dir, kind="gfdm", config=config, step=loop.step, scale=cfg.scale, stats={"clips": clips}
        )
        log.info("GFDM in %s", cfg.output_dir)


if __name__ == "__main__":
    main()
