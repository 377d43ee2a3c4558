"""Program: couple both models with the action adapter and finetune (Sec. 3.3, Table 10).

    python -m step3_defi.train scale=tiny|small|full [experiment=defi/<row>] name=<name> [init=<policy>]

Leaves the policy as it was at the end in ckpts/defi/<name>, and as it was at its lowest held-out action loss in
ckpts/defi/<name>/best.
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
from common.frozen import weights_sha256
from common.program import program
from step3_defi import policy
from step3_defi.data import features
from step3_defi.model import DeFI

log = logging.getLogger(__name__)
# What a finetuning may change of a policy that it starts from: how it learns, and where the sentence encoder lies
INIT_OVERRIDABLE = re.compile(
    r"trainable|noise_draws|alignment_\w+|bottleneck_weight|codebook|restart_codes|frozen_precision|edm\.log_\w+|goal\.path|"
    r"adapter\.(\w+_)?dropout"
)


@program("step3_defi")
def main(cfg: DictConfig) -> None:
    config = OmegaConf.to_container(cfg.policy, resolve=True)
    start = policy.resolve_source(cfg.init) if cfg.init else None
    if start:
        config = config_from_init(start, config)
    policy.check_scale(config, cfg.scale)
    sets = {split: instantiate(cfg.data, split=split) for split in ("train", "val")}
    stats = {"actions": action_stats(sets["train"].actions)}
    torch.manual_seed(cfg.seed)
    model = instantiate(config)
    if start:
        load_init_weights(model, start)
        stats["init"] = artifact.sha256(start)
    if cfg.cache and "gfdm" not in model.trainable:
        sets = _cache(sets, model, config, Path(cfg.cache_dir))
    loop = instantiate(cfg.loop, output_dir=cfg.output_dir, seed=cfg.seed)
    record = {"kind": "defi", "config": config, "scale": cfg.scale, "parents": policy.parents(config), "stats": stats}
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
    """`config` over the forward and inverse model of the policy `start`. Raises ValueError naming the keys in which the
    two differ beyond INIT_OVERRIDABLE."""
    own = artifact.read_config(start, "defi")
    models = {name: own[name] for name in policy.PARENTS}
    for key, place in policy.find_parents(start).items():
        models[key.removesuffix(".path")] = {**models[key.removesuffix(".path")], "path": place}
    there, asked = (
        dict(_leaves({key: value for key, value in tree.items() if key not in models})) for tree in (own, config)
    )
    wrong = [
        key
        for key in sorted(there.keys() | asked.keys())
        if there.get(key) != asked.get(key) and not INIT_OVERRIDABLE.fullmatch(key)
    ]
    if wrong:
        raise ValueError(
            f"init={start} is another policy than the one asked for: "
            + "; ".join(f"policy.{key} is {there.get(key)} there, {asked.get(key)} here" for key in wrong)
            + "; set them as there (policy=official or policy=vpp for imported ones)"
        )
    if "gfdm" in own["trainable"] and "gfdm" not in config["trainable"]:
        raise ValueError(
            f"init={start} holds a forward model of its own; keep it learning: policy/trainable=all or gfdm_adapter"
        )
    return {**config, **models}


def load_init_weights(model: DeFI, start: Path) -> None:
    """Put the weights of the artifact `start` into a model of its config, keys strict, whatever of it learns here and
    learned there."""
    here = model.trainable
    model.set_trainable(artifact.read_config(start, "defi")["trainable"])
    artifact.load_weights(model, start)
    model.set_trainable(here)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _cache(sets: dict[str, Any], model: DeFI, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Every set behind its cache. One process builds; the others wait and open it. Of an inverse model only the frozen
    eyes are cached, so all share.

    What was computed is known by the weights of the parts that see, and by the rest of their config: under the same
    path others may lie today.
    """
    state = processes(SLOWEST)
    model.to(state.device)
    gfdm, gidm = (
        artifact.read_config(part["path"], name, part["overrides"]) if policy.is_artifact(part) else part
        for name, part in ((name, config[name]) for name in policy.PARENTS)
    )
    sources = {"gfdm": weights_sha256(model.forward_model) + repr(gfdm)}
    if model.uses_present_tokens or model.alignment_weight:
        sources["vision"] = weights_sha256(model.gidm.vision) + repr(gidm["vision"])
    with state.main_process_first():
        return {split: features.cached(windows, model, folder, parents=sources) for split, windows in sets.items()}


def action_stats(actions: Any) -> dict[str, list[float]]:
    """For the record: CALVIN's relative actions lie in [-1, 1] already and are not normalised."""
    return {
        "min": actions.min(0).tolist(),
        "max": actions.max(0).tolist(),
        "mean": actions.mean(0).tolist(),
        "std": actions.std(0).tolist(),
    }


if __name__ == "__main__":
    main()
