"""Program: does what pretraining gave reach the robot? How much a policy relies on each stream, and how well its parts
fit (Sec. 3.3, Table 4).

    python -m step3_defi.links path=ckpts/defi/tiny scale=tiny

Leaves links.json, table.md and links.png (bars) in `out`.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from common import artifact
from common.distributed import processes
from common.figures import pyplot, save_figure
from common.files import write_text
from common.metrics import code_counts
from common.mixture import SeededDataset, collate
from common.program import program
from common.sampler import held_out
from step3_defi import policy, reliance
from step3_defi.model import DeFI

LOG = logging.getLogger(__name__)
PARTS = ("all", "motion", "gripper")


@torch.no_grad()
def measure_links(model: DeFI, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out batches of windows with true futures -> what stands in links.json. All shares are of the action loss,
    0.1 being 10 %."""
    costs: dict[str, list[dict[str, float]]] = defaultdict(list)
    numbers: dict[str, list[float]] = defaultdict(list)
    codes = {"imagined": torch.zeros(0), "true": torch.zeros(0)}
    for batch in tqdm(batches, desc="links", unit="batch"):
        text, actions = batch["text"], batch["actions"].to(model.device)
        views, futures = (
            {name: tensor.to(model.device) for name, tensor in batch[key].items()} for key in ("views", "futures")
        )
        seen = model.encode_observation(views, text, futures)
        goal, streams, extra = model.infer_streams(seen, text)
        generator = torch.Generator(model.device).manual_seed(0)
        errors = model.action_squared_errors(goal, streams, actions, generator)
        numbers["action_loss"].append(float(errors.mean()))
        for name, loss_increase in model.reliance(seen, text, actions).items():
            costs[name].append({part: float(value) for part, value in loss_increase.items()})
        for name, tokens in streams.items():
            numbers[f"spread_{name}"].append(float(reliance.spread(tokens)))
        if model.gidm.num_action_tokens:
            _measure_projection(model, seen, futures, text, numbers, codes)
    return {
        "windows": sum(len(batch["text"]) for batch in batches),
        "streams": list(model.streams),
        "costs": {
            name: {part: float(np.mean([row[part] for row in rows])) for part in PARTS} for name, rows in costs.items()
        },
        "codes_used": {name: int((counts > 0).sum()) for name, counts in codes.items() if len(counts)},
        **{name: float(np.mean(values)) for name, values in numbers.items()},
    }


def _measure_projection(
    model: DeFI,
    seen: dict[str, Tensor],
    futures: dict[str, Tensor],
    text: list[str],
    numbers: dict[str, list[float]],
    codes: dict[str, Tensor],
) -> None:
    """How far projected futures are from true ones, and what the inverse model makes of both; adds to `numbers` and
    `codes`."""
    _, _, present, projected = model.project_pairs(seen)
    projected = projected[:, model.pair_view_indices]
    if model.projector.uses_present_tokens:  # else the present is imagined, too, and DINOv2's tokens are no target
        target = model.encode_target_frames(futures)
        numbers["projector_error"].append(float((projected - target).square().mean()))
        numbers["copy_error"].append(float((present - target).square().mean()))
        found = {"imagined": projected, "true": target}
    else:
        found = {"imagined": projected}
    for name, future in found.items():
        latent = model.infer(present, future, text)
        lifted = model.gidm.embed_action(latent.quantized).unflatten(0, (len(text), -1)).flatten(1, 2)
        numbers[f"latent_deviation_{name}"].append(float(reliance.deviation(lifted)))
        if latent.codes is not None and model.gidm.num_codes:
            counts = code_counts(latent.codes, model.gidm.num_codes).sum(0).cpu()
            codes[name] = counts if not len(codes[name]) else codes[name] + counts


def table(found: dict[str, Any]) -> str:
    """links.json as Markdown."""
    lines = [
        "| stream | another window's | of motion | of the gripper | the mean | spread / rms |",
        "|---|---|---|---|---|---|",
    ]
    for name in [*found["streams"], "gfdm"]:
        swap, mean = (found["costs"][f"{how}_{name}"] for how in ("swap", "mean"))
        spread = f"{found[f'spread_{name}']:.2f}" if name != "gfdm" else ""
        label = "everything of the forward model" if name == "gfdm" else name
        lines.append(
            f"| {label} | {100 * swap['all']:+.1f} % | {100 * swap['motion']:+.1f} % | {100 * swap['gripper']:+.1f} % "
            "| "
            f"{100 * mean['all']:+.1f} % | {spread} |"
        )
    said = [
        f"Held-out action loss {found['action_loss']:.4f} over {found['windows']} windows; the columns say by how much "
        "it rises "
        "where a stream is replaced."
    ]
    if "copy_error" in found:
        said.append(
            f"Projected futures: error {found['projector_error'] / found['copy_error']:.2f} of that of the present in "
            "their place."
        )
    if found["codes_used"]:
        said.append(
            "Codes in use: "
            + ", ".join(f"{count} on {name} futures" for name, count in found["codes_used"].items())
            + "."
        )
    return "\n".join(lines) + "\n\n" + " ".join(said) + "\n"


def draw(found: dict[str, Any], file: Path) -> None:
    """Bars: what the wrong stream and the mean stream cost, motion and gripper apart."""
    names = [*found["streams"], "gfdm"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.6 * len(names) + 1.4), sharey=True)
    for axis, how, title in zip(axes, ("swap", "mean"), ("another window's", "the mean of all windows")):
        for offset, part in enumerate(PARTS):
            values = [100 * found["costs"][f"{how}_{name}"][part] for name in names]
            axis.barh(np.arange(len(names)) + 0.27 * (offset - 1), values, height=0.25, label=part)
        axis.set(title=title, xlabel="rise of the action loss in %", yticks=range(len(names)), yticklabels=names)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.invert_yaxis()
    axes[0].legend(fontsize=8)
    save_figure(figure, file)


@program("step3_links")
def main(cfg: DictConfig) -> None:
    cfg.policy = artifact.read_config(cfg.path, "defi")
    device = cfg.device or processes().device
    model = policy.load(cfg.path, device=device).model
    windows = instantiate(cfg.data, split=cfg.split, load_future_frames=True)
    chunks = held_out(
        len(windows), cfg.batch_size, seed=cfg.seed, rank=0, world=1, most=-(-cfg.windows // cfg.batch_size)
    )
    draws = SeededDataset(windows, cfg.seed)
    batches = [collate([draws[key] for key in keys]) for keys, _ in chunks if len(keys) == cfg.batch_size]
    if not batches:
        raise ValueError(
            f"{cfg.data.root}: fewer than batch_size={cfg.batch_size} windows in split {cfg.split}; set batch_size "
            "lower"
        )
    found = measure_links(model, batches)
    out = Path(cfg.out)
    write_text(
        out / "links.json",
        json.dumps(
            {"path": str(cfg.path), "policy_sha256": artifact.sha256(cfg.path), "seed": cfg.seed, **found}, indent=2
        )
        + "\n",
    )
    write_text(out / "table.md", table(found))
    draw(found, out / "links.png")
    LOG.info("%s", table(found))
    LOG.info("results in %s", out)


if __name__ == "__main__":
    main()
