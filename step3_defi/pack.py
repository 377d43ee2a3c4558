"""Pack the frames that training would read from a dataset in CALVIN's format, so that random windows are fast to read.

It takes the keys of step3_defi.train (Sec. 4.2; step3_defi.data.store describes the files). A run that was killed
continues with the same command.

Examples:
    python -m step3_defi.pack scale=full workers=16
    python -m step3_defi.pack data=calvin_d data.root=/data/task_D_D workers=8
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
