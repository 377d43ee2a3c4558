"""Program: pretrain the forward model (Sec. 3.1, Table 10).   python -m step1_gfdm.train scale=tiny|small|full
[experiment=gfdm/<row>] name=<name>"""

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
    set_seed(cfg.seed)  # a UNet that starts untrained is the same in every process and run
    train_set = instantiate(cfg.data, split="train")
    val_set = instantiate(cfg.data, split="val") if cfg.validate else None
    model = instantiate(cfg.gfdm)
    loop = instantiate(cfg.loop, output_dir=cfg.output_dir, seed=cfg.seed)
    model = loop.fit(model, train_set, val_set)
    if loop.accelerator.is_main_process:
        # where a model is built from an SVD folder, the artifact is itself one
        config = {
            key: artifact.HERE if key == "svd" else value
            for key, value in OmegaConf.to_container(cfg.gfdm, resolve=True).items()
        }
        clips = {name: options["clip"] for name, options in OmegaConf.to_container(cfg.data.sets, resolve=True).items()}
        artifact.save(
            model, cfg.output_dir, kind="gfdm", config=config, step=loop.step, scale=cfg.scale, stats={"clips": clips}
        )
        log.info("GFDM in %s", cfg.output_dir)


if __name__ == "__main__":
    main()
