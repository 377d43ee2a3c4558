"""Program: a policy of the release, or VPP's dp-calvin, -> our artifact.

    python -m step3_defi.import_weights path=<policy.pt> gfdm=<artifact or SVD folder> name=<name> foreign=skip
    [policy=vpp] [gidm=<artifact>]

Keys are strict. What the file holds and ours does not need is named and counted (release.UNUSED_PREFIXES); the forward model is
not in it.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from common import artifact
from common.checkpoint import CheckpointError, check_import, read_tensors, state_dict_mismatch
from common.files import sha256
from common.program import program
from step3_defi.model import DeFI
from step3_defi.policy import parents
from step3_defi.released.names import IGNORED_PREFIXES, from_release

log = logging.getLogger(__name__)


def fill(model: DeFI, path: str | Path, *, skip_foreign: bool = False) -> dict[str, int]:
    """Put a published policy's weights into a DeFI, keys strict; returns what was left out: prefix -> how many numbers.

    CheckpointError: the file cannot be read, is no policy, or is one of another preset or size.
    """
    tensors = read_tensors(path, skip_foreign=skip_foreign)
    try:
        release = from_release(tensors)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if release.inverse != bool(model.gidm.num_action_tokens):
        raise CheckpointError(
            f"{path}: "
            + (
                "holds an inverse model (lam.*), so it is the release's; use policy=official"
                if release.inverse
                else "holds no inverse model (lam.*), so it is VPP's; use policy=vpp"
            )
        )
    if wrong := state_dict_mismatch(model, release.state):
        raise CheckpointError(f"{path} does not fit the configured policy (names are ours): {wrong}")
    model.load_state_dict(release.state)
    return release.left


def configure(cfg: DictConfig) -> dict[str, Any]:
    """The tree that builds the policy over the forward and inverse models that were named."""
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
        raise ValueError(
            f"gidm={cfg.parents.gidm}: this policy has no inverse model; leave gidm out, or use policy=official"
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
    left = fill(model, cfg.path, skip_foreign=cfg.foreign == "skip")
    source = {"file": Path(cfg.path).name, "sha256": sha256(Path(cfg.path)), "left": left}
    artifact.save(
        model,
        cfg.output_dir,
        kind="defi",
        config=config,
        scale=cfg.scale,
        parents=parents(config),
        stats={"imported": source},
    )
    for prefix, count in left.items():
        log.info("left out: %s* (%s numbers; %s)", prefix, f"{count:,}", IGNORED_PREFIXES[prefix])
    log.info(
        "%d tensors of %s numbers taken; policy in %s",
        len(model.state_dict()),
        f"{sum(p.numel() for p in model.state_dict().values()):,}",
        cfg.output_dir,
    )


def plain_keys(arguments: list[str]) -> list[str]:
    """`gfdm` and `gidm` are also config groups, whose values Hydra would look up as files."""
    return [re.sub(r"^(gfdm|gidm)=", r"parents.\1=", argument) for argument in arguments]


if __name__ == "__main__":
    sys.argv[1:] = plain_keys(sys.argv[1:])
    main()
