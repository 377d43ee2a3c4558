"""Program: pack the frames that training would read, once (Sec. 4.2; store.py has the form).

    python -m step3_defi.pack [scale=full] [data=calvin_abc|calvin_d|calvin_debug|playtable] [data.root=<folder>]
    [workers=16] [data.cache_dir=<folder>]

Takes the words of step3_defi.train. A killed run goes on with the same command.
"""

from __future__ import annotations

import logging

from hydra.utils import instantiate
from omegaconf import DictConfig

from common.program import program

log = logging.getLogger(__name__)


@program("step3_pack")
def main(cfg: DictConfig) -> None:
    splits = ("train", "val") if cfg.data.val_folder else ("all",)
    for split in splits:
        pack = instantiate(cfg.data, split=split, pack=True, workers=cfg.workers).pack
        log.info("results in %s: %d frames, pictures of %d", pack.folder, len(pack.frames), len(pack.image_frames))


if __name__ == "__main__":
    main()
