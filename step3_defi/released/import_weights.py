"""Convert a published policy, of the release or VPP's dp-calvin, to an artifact of this project.

All keys have to match. What the file holds and this project does not need is counted and named
(released.names.IGNORED_PREFIXES). The forward model is not in the file: parents.gfdm names it.

Examples:
    python -m step3_defi.released.import_weights path=29999.pt parents.gfdm=ckpts/hub/svd name=official foreign=skip
    python -m step3_defi.released.import_weights defi=vpp path=dp-calvin.pt parents.gfdm=ckpts/gfdm/vpp name=vpp
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from common import artifact
from common.checkpoint import CheckpointError, check_import, read_tensors, state_dict_mismatch
from common.errors import UserError
from common.files import sha256
from common.program import program
from step3_defi.model import DeFI
from step3_defi.policy import parent_hashes
from step3_defi.released.names import IGNORED_PREFIXES, from_release

log = logging.getLogger(__name__)


def load_published(model: DeFI, path: str | Path, *, skip_foreign: bool = False) -> dict[str, int]:
    """Load the weights of a published policy into a DeFI, keys strict.

    Returns what was left out: prefix -> how many numbers. Raises CheckpointError if the file cannot be read, holds no
    policy, or holds one of another preset or size.
    """
    tensors = read_tensors(path, skip_foreign=skip_foreign)
    try:
        release = from_release(tensors)
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if release.has_gidm != bool(model.gidm.num_action_tokens):
        raise CheckpointError(
            f"{path} holds an inverse model (lam.*), so it is a policy of the release; use defi=official"
            if release.has_gidm
            else f"{path} holds no inverse model (lam.*), so it is VPP's; use defi=vpp"
        )
    if mismatch := state_dict_mismatch(model, release.state):
        raise CheckpointError(f"{path} does not fit the configured policy, by our names: {mismatch}")
    model.load_state_dict(release.state)
    return release.unused


def configure(cfg: DictConfig) -> dict[str, Any]:
    """The config of the policy over the forward and the inverse model that `parents` names."""
    config = OmegaConf.to_container(cfg.policy, resolve=True)
    if (Path(cfg.parents.gfdm) / "meta.json").is_file():
        config["gfdm"]["path"] = cfg.parents.gfdm
    else:
        config["gfdm"] = {**OmegaConf.to_container(cfg.svd, resolve=True), "svd": cfg.parents.gfdm}
    if "path" in config["gidm"]:
        config["gidm"] = (
            {**config["gidm"], "path": cfg.parents.gidm}
            if cfg.parents.gidm
            else OmegaConf.to_container(cfg.lam, resolve=True)
        )
    elif cfg.parents.gidm:
        raise UserError(
            f"parents.gidm={cfg.parents.gidm}: this policy has no inverse model; leave parents.gidm out, or use "
            "defi=official"
        )
    return config


@program("step3_import")
def main(cfg: DictConfig) -> None:
    check_import(
        cfg.path,
        cfg.output_dir,
        cfg.foreign,
        expected="a policy of the release (saved_models/<step>.pt) or VPP's dp-calvin",
    )
    config = configure(cfg)
    log.info("building the policy over %s", cfg.parents.gfdm)
    model = instantiate(config)
    log.info("reading %s", cfg.path)
    unused = load_published(model, cfg.path, skip_foreign=cfg.foreign == "skip")
    source = {"file": Path(cfg.path).name, "sha256": sha256(Path(cfg.path)), "unused": unused}
    artifact.save(
        model,
        cfg.output_dir,
        kind="defi",
        config=config,
        scale=cfg.scale,
        parents=parent_hashes(config),
        stats={"imported": source},
    )
    for prefix, count in unused.items():
        log.info("left out: %s* (%s numbers; %s)", prefix, f"{count:,}", IGNORED_PREFIXES[prefix])
    log.info(
        "%d tensors of %s numbers were loaded; the policy is in %s",
        len(model.state_dict()),
        f"{sum(p.numel() for p in model.state_dict().values()):,}",
        cfg.output_dir,
    )


if __name__ == "__main__":
    main()
