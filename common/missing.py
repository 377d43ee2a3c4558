"""Program: which of these artifacts are still to be made?   python -m common.missing scale=tiny
models=[gfdm/tiny,gidm/t8_binning]

Prints their names, for scripts. An artifact of another kind or scale in the place of one is a line on stderr and exit
status 1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig

from common import artifact
from common.program import program

log = logging.getLogger(__name__)


def missing(ckpts: str | Path, models: Iterable[str], scale: str) -> list[str]:
    """Those of `models` (<kind>/<name>) that `ckpts` holds no artifact of. ArtifactError where it holds one of another
    kind or scale."""
    absent = []
    for model in models:
        folder = Path(ckpts) / model
        if (folder / "meta.json").is_file():
            artifact.check_scale(folder, model.partition("/")[0], scale)
        else:
            absent.append(model)
    return absent


@program("missing")
def main(cfg: DictConfig) -> None:
    for model in missing(cfg.paths.ckpts, cfg.models, cfg.scale):
        log.info(model)


if __name__ == "__main__":
    main()
