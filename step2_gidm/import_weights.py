"""Program: UniVLA's or the release's inverse model -> our artifact.   python -m step2_gidm.import_weights
path=lam_idm.ckpt name=<name>

Keys are strict. What the file holds and ours does not need is named and counted (univla.UNUSED_PREFIXES): DINOv2 and T5, which
ours names and never copies.
"""

from __future__ import annotations

import logging
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from common import artifact
from common.checkpoint import CheckpointError, check_import, counted, read_tensors, state_dict_mismatch
from common.files import sha256
from common.program import program
from step2_gidm.released.univla import IGNORED_PREFIXES, from_univla, prefixed

log = logging.getLogger(__name__)


def fill(model: nn.Module, path: str | Path, *, skip_foreign: bool = False) -> dict[str, int]:
    """Put a published checkpoint's weights into a GIDM, keys strict; returns what was left out: prefix -> how many
    numbers.

    CheckpointError: the file cannot be read, is no latent action model, or is one of another size.
    """
    tensors = read_tensors(path, skip_foreign=skip_foreign)
    try:
        state = from_univla(tensors)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if wrong := state_dict_mismatch(model, state):
        raise CheckpointError(f"{path} does not fit the configured model (gidm=...; names are ours): {wrong}")
    model.load_state_dict(state)
    return counted(prefixed(tensors), IGNORED_PREFIXES)


@program("step2_import")
def main(cfg: DictConfig) -> None:
    check_import(
        cfg.path, cfg.output_dir, cfg.foreign, expected="UniVLA's lam-stage-1 or the release's lam_idm checkpoint"
    )
    model = instantiate(cfg.gidm)
    left = fill(model, cfg.path, skip_foreign=cfg.foreign == "skip")
    config = OmegaConf.to_container(cfg.gidm, resolve=True)
    source = {"file": Path(cfg.path).name, "sha256": sha256(Path(cfg.path)), "left": left}
    artifact.save(
        model,
        cfg.output_dir,
        kind="gidm",
        config=config,
        scale="full",
        parents={source["file"]: source["sha256"]},
        stats={"imported": source},
    )
    for prefix, count in left.items():
        log.info("left out: %s* (%s numbers; %s)", prefix, f"{count:,}", IGNORED_PREFIXES[prefix])
    log.info("%d tensors taken; GIDM in %s", len(model.state_dict()), cfg.output_dir)


if __name__ == "__main__":
    main()
