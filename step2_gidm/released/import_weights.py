"""Turn a published inverse model, that of UniVLA or of the release, into an artifact of this repository (Sec. 3.2).

The file has to hold exactly the tensors that the model needs. The program names what else it holds and how many numbers
that is; the copies of DINOv2 and T5 are ignored, since an artifact names its frozen encoders and never copies them.

Examples:
    python -m step2_gidm.released.import_weights path=lam_idm.ckpt name=official
    python -m step2_gidm.released.import_weights path=lam-stage-1.ckpt name=univla foreign=skip
"""

from __future__ import annotations

import logging
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from common import artifact
from common.checkpoint import CheckpointError, check_import, counted, read_tensors, state_dict_mismatch
from common.errors import UserError
from common.files import sha256
from common.program import program
from step2_gidm.released.univla import IGNORED_PREFIXES, from_univla, with_lam_prefix

log = logging.getLogger(__name__)


def load_published(model: nn.Module, path: str | Path, *, skip_foreign: bool = False) -> dict[str, int]:
    """Load the weights of a published checkpoint into a GIDM; every key has to fit.

    Returns how many numbers of the file are not used, by the prefix of their names. Raises CheckpointError where the
    file cannot be read, is no latent action model, or is one of another size.
    """
    tensors = read_tensors(path, skip_foreign=skip_foreign)
    try:
        state = from_univla(tensors)
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if mismatch := state_dict_mismatch(model, state):
        raise CheckpointError(f"{path} does not fit the configured model (gidm=...; names are ours): {mismatch}")
    model.load_state_dict(state)
    return counted(with_lam_prefix(tensors), IGNORED_PREFIXES)


@program("step2_import")
def main(cfg: DictConfig) -> None:
    check_import(
        cfg.path, cfg.output_dir, cfg.foreign, expected="UniVLA's lam-stage-1 or the release's lam_idm checkpoint"
    )
    model = instantiate(cfg.gidm)
    unused = load_published(model, cfg.path, skip_foreign=cfg.foreign == "skip")
    config = OmegaConf.to_container(cfg.gidm, resolve=True)
    source = {"file": Path(cfg.path).name, "sha256": sha256(Path(cfg.path)), "unused": unused}
    artifact.save(
        model,
        cfg.output_dir,
        kind="gidm",
        config=config,
        scale="full",
        parents={source["file"]: source["sha256"]},
        stats={"imported": source},
    )
    for prefix, count in unused.items():
        log.info("not used: %s* (%s numbers; %s)", prefix, f"{count:,}", IGNORED_PREFIXES[prefix])
    log.info("loaded %d tensors; GIDM in %s", len(model.state_dict()), cfg.output_dir)


if __name__ == "__main__":
    main()
