"""Couple both models with the action adapter, and finetune on demonstrations (Sec. 3.3, Table 10).

The policy at the end of training is written to ckpts/defi/<name>, and the policy with the lowest held-out action loss
to ckpts/defi/<name>/best.

Examples:
    python -m step3_defi.train scale=tiny name=first
    python -m step3_defi.train scale=full experiment=defi/t9_all name=t9_all
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from common import artifact
from common.distributed import SLOWEST, processes
from common.errors import UserError
from common.frozen import weights_sha256
from common.program import program
from step3_defi import policy
from step3_defi.config import trainable_parts
from step3_defi.data import features
from step3_defi.model import DeFI

log = logging.getLogger(__name__)
# The keys of the policy in which a run with init_from may differ from the policy that it starts from: how it learns,
# and where the sentence encoder lies.
INIT_OVERRIDABLE = re.compile(
    r"trainable|alignment\.\w+|bottleneck\.\w+|observation\.precision|edm\.(log_\w+|noise_draws)|goal\.path|"
    r"adapter\.(\w+_)?dropout"
)


@program("step3_defi")
def main(cfg: DictConfig) -> None:
    config = OmegaConf.to_container(cfg.policy, resolve=True)
    start = policy.resolve_source(cfg.init_from) if cfg.init_from else None
    if start:
        config = config_from_init(start, config)
    policy.check_scale(config, cfg.scale)
    sets = {split: instantiate(cfg.data, split=split) for split in ("train", "val")}
    stats = {"actions": action_stats(sets["train"].actions)}
    torch.manual_seed(cfg.seed)
    model = instantiate(config)
    if start:
        load_init_weights(model, start)
        stats["init_from"] = artifact.sha256(start)
    if cfg.cache and "gfdm" not in model.trainable:
        sets = _cache(sets, model, config, Path(cfg.cache_dir))
    loop = instantiate(cfg.loop, output_dir=cfg.output_dir, seed=cfg.seed)
    hashes = policy.parent_hashes(config)
    record = {"kind": "defi", "config": config, "scale": cfg.scale, "parents": hashes, "stats": stats}
    model = loop.fit(
        model,
        sets["train"],
        sets["val"],
        on_best=lambda step: artifact.save(model, Path(cfg.output_dir) / policy.BEST, step=step, **record),
    )
    if loop.accelerator.is_main_process:
        artifact.save(model, cfg.output_dir, step=loop.step, **record)
        log.info("results in %s", cfg.output_dir)


def config_from_init(start: Path, config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the forward and the inverse model of the policy in the folder `start`.

    Raises UserError that names the keys in which the two policies differ, INIT_OVERRIDABLE excepted.
    """
    own = artifact.read_config(start, "defi")
    models = {name: own[name] for name in policy.PARENTS}
    for key, place in policy.find_parents(start).items():
        name = key.removesuffix(".path")
        models[name] = {**models[name], "path": place}
    theirs, ours = (
        dict(_leaves({key: value for key, value in tree.items() if key not in models})) for tree in (own, config)
    )
    differing = [
        key
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and not INIT_OVERRIDABLE.fullmatch(key)
    ]
    if differing:
        raise UserError(
            f"init_from={start} is another policy than the one that is configured: "
            + "; ".join(f"policy.{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in differing)
            + "; give these keys the values of that policy (defi=official or defi=vpp for imported ones)"
        )
    if "gfdm" in trainable_parts(own["trainable"]) and "gfdm" not in trainable_parts(config["trainable"]):
        raise UserError(
            f"init_from={start} holds a forward model that was finetuned with it, which would be lost; let it learn: "
            "policy.trainable=all or gfdm_adapter"
        )
    return {**config, **models}


def load_init_weights(model: DeFI, start: Path) -> None:
    """Load the weights of the policy in the folder `start`, keys strict, into a model of its config.

    The state dict holds the forward model only where it learns, so the model takes the saved choice while it loads.
    """
    trainable = model.trainable
    model.set_trainable(artifact.read_config(start, "defi")["trainable"])
    artifact.load_weights(model, start)
    model.set_trainable(trainable)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _cache(sets: dict[str, Any], model: DeFI, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Put every set behind a cache of what the frozen parts say. One process builds it, the others wait and open it.

    The cache is identified by the weights of the parts that read pictures and by the rest of their config, because the
    files at a path may be replaced. Of the inverse model, only its frozen vision encoder counts, so that policies with
    different inverse models share a cache.
    """
    state = processes(SLOWEST)
    model.to(state.device)
    gfdm, gidm = (
        artifact.read_config(part["path"], name, part["overrides"]) if policy.is_artifact(part) else part
        for name, part in ((name, config[name]) for name in policy.PARENTS)
    )
    sources = {"gfdm": weights_sha256(model.forward_model) + repr(gfdm)}
    if model.uses_present_tokens or model.alignment.weight:
        sources["vision"] = weights_sha256(model.gidm.vision) + repr(gidm["vision"])
    with state.main_process_first():
        return {
            split: features.get_or_build_cache(windows, model, folder, parents=sources)
            for split, windows in sets.items()
        }


def action_stats(actions: Any) -> dict[str, list[float]]:
    """Statistics of actions (N, 7), for the record only: CALVIN's relative actions lie in [-1, 1] already."""
    return {
        "min": actions.min(0).tolist(),
        "max": actions.max(0).tolist(),
        "mean": actions.mean(0).tolist(),
        "std": actions.std(0).tolist(),
    }


if __name__ == "__main__":
    main()
