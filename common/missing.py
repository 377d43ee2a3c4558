"""Print which of the given artifacts do not exist yet, for scripts.

An artifact of another kind or scale in the place of one ends the program with an error.

Examples:
    python -m common.missing scale=tiny models=[gfdm/tiny,gidm/tiny]
    python -m common.missing scale=small models=[gidm/t8_binning] paths.ckpts=/data/ckpts
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
    """Those of `models`, each <kind>/<name>, that have no artifact under the folder `ckpts`.

    Raises ArtifactError where there is one of another kind or scale.
    """
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
