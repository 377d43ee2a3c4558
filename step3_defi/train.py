"""Program: couple both models with the action adapter and finetune (Sec. 3.3, Table 10).

    python -m step3_defi.train scale=tiny|small|full [experiment=defi/<row>] name=<name>
"""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from common import artifact
from common.program import program
from step3_defi import features, policy
from step3_defi.model import DeFI

log = logging.getLogger(__name__)


@program("step3_defi")
def main(cfg: DictConfig) -> None:
    config = OmegaConf.to_container(cfg.policy, resolve=True)
    sets = {split: instantiate(cfg.data, split=split) for split in ("train", "val")}
    stats = {"actions": action_stats(sets["train"].actions)}
    torch.manual_seed(cfg.seed)
    model = instantiate(config)
    if cfg.cache if cfg.cache is not None else cfg.data.pack and "gfdm" not in model.trainable:
        sets = _cache(sets, model, config, Path(cfg.cache_dir))
    loop = instantiate(cfg.loop, output_dir=cfg.output_dir, seed=cfg.seed)
    model = loop.fit(model, sets["train"], sets["val"])
    if loop.accelerator.is_main_process:
        artifact.save(model, cfg.output_dir, kind="defi", config=config, step=loop.step, parents=policy.parents(config), stats=stats)
        log.info("results in %s", cfg.output_dir)


def _cache(sets: dict[str, Any], model: DeFI, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Every set behind its cache. One process builds; the others wait and open it. Of an inverse model only the frozen eyes are cached, so all share."""
    state = PartialState()
    model.to(state.device)
    gfdm, gidm = config["gfdm"], config["gidm"]
    sources = {"gfdm": artifact.sha256(gfdm["path"]) + repr(gfdm["overrides"]) if policy.is_artifact(gfdm) else repr(gfdm)}
    if model.sees_now or model.alignment_weight:
        sources["vision"] = repr((artifact.read_config(gidm["path"], "gidm", gidm["overrides"]) if policy.is_artifact(gidm) else gidm)["vision"])
    with state.main_process_first():
        return {split: features.cached(windows, model, folder, parents=sources) for split, windows in sets.items()}


def action_stats(actions: Any) -> dict[str, list[float]]:
    """For the record: CALVIN's relative actions lie in [-1, 1] already and are not normalised."""
    return {"min": actions.min(0).tolist(), "max": actions.max(0).tolist(), "mean": actions.mean(0).tolist(), "std": actions.std(0).tolist()}


if __name__ == "__main__":
    main()
