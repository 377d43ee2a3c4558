"""Measure how much a policy relies on each stream and how well its parts fit, to see if pretraining reaches the robot.

See Sec. 3.3 and Table 4. The results are written to `out`: links.json, table.md and links.png with bars.

Examples:
    python -m step3_defi.links path=ckpts/defi/tiny scale=tiny
    python -m step3_defi.links path=ckpts/defi/full windows=1024 out=outputs/links
"""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from common import artifact
from common.distributed import processes
from common.errors import UserError
from common.figures import pyplot, save_figure
from common.files import write_json, write_text
from common.metrics import code_counts
from common.mixture import SeededDataset, collate
from common.program import program
from common.progress import tqdm
from common.sampler import validation_batches
from step3_defi import policy, reliance
from step3_defi.model import DeFI, EncodedObservation

LOG = logging.getLogger(__name__)
PARTS = ("all", "motion", "gripper")  # of reliance.loss_increase


@torch.no_grad()
def measure_links(model: DeFI, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches of held-out windows with their true futures -> the content of links.json.

    All costs are shares of the action loss: 0.1 means that it rises by 10 %.
    """
    costs: dict[str, list[dict[str, float]]] = defaultdict(list)
    numbers: dict[str, list[float]] = defaultdict(list)
    codes: dict[str, Tensor] = {}
    for batch in tqdm(batches, desc="links", unit="batch"):
        text, actions = batch["text"], batch["actions"].to(model.device)
        views, futures = (
            {name: tensor.to(model.device) for name, tensor in batch[key].items()} for key in ("views", "futures")
        )
        encoded = model.encode_observation(views, text, with_targets=False)
        inferred = model.infer_streams(encoded, text)
        generator = torch.Generator(model.device).manual_seed(0)
        errors = model.action_squared_errors(inferred.goal, inferred.streams, actions, generator)
        numbers["action_loss"].append(float(errors.mean()))
        for name, rise in model.reliance(inferred, encoded, text, actions).items():
            costs[name].append({part: float(value) for part, value in rise.items()})
        for name, tokens in inferred.streams.items():
            numbers[f"spread_{name}"].append(float(reliance.spread(tokens)))
        if model.gidm.num_action_tokens:
            _measure_projection(model, encoded, futures, text, numbers, codes)
    return {
        "windows": sum(len(batch["text"]) for batch in batches),
        "streams": list(model.streams),
        "costs": {
            name: {part: float(np.mean([row[part] for row in rows])) for part in PARTS} for name, rows in costs.items()
        },
        "codes_used": {name: int((counts > 0).sum()) for name, counts in codes.items()},
        **{name: float(np.mean(values)) for name, values in numbers.items()},
    }


def _measure_projection(
    model: DeFI,
    encoded: EncodedObservation,
    true_frames: dict[str, Tensor],
    text: list[str],
    numbers: dict[str, list[float]],
    codes: dict[str, Tensor],
) -> None:
    """Measure how far projected futures are from the true ones, and what the inverse model infers from both.

    Appends to `numbers`, and adds to `codes`: imagined | true -> how often each code was inferred.
    """
    pairs = model.project_pairs(encoded)
    projected = pairs.futures[:, model.pair_view_indices]  # (B, V', P, N, E)
    futures = {"imagined": projected}
    if model.projector.uses_present_tokens:  # else the present is imagined as well, and DINOv2's tokens are no target
        target = model.encode_target_frames(true_frames)
        numbers["projector_error"].append(float((projected - target).square().mean()))
        numbers["copy_error"].append(float((pairs.present - target).square().mean()))
        futures["true"] = target
    for name, future in futures.items():
        latent = model.infer(pairs.present, future, text)
        deviation = reliance.deviation(model.embed_latent(latent, len(text)))
        numbers[f"latent_deviation_{name}"].append(float(deviation))
        if latent.codes is not None and model.gidm.num_codes:
            counts = code_counts(latent.codes, model.gidm.num_codes).sum(0).cpu()
            codes[name] = codes.get(name, 0) + counts


def table(found: dict[str, Any]) -> str:
    """links.json as Markdown."""
    lines = [
        "| stream | another window's | of motion | of the gripper | the mean | spread / rms |",
        "|---|---|---|---|---|---|",
    ]
    for name in [*found["streams"], "gfdm"]:
        swap, mean = (found["costs"][f"{ablation}_{name}"] for ablation in ("swap", "mean"))
        label, spread = ("all of the forward model", "") if name == "gfdm" else (name, f"{found[f'spread_{name}']:.2f}")
        rises = (swap["all"], swap["motion"], swap["gripper"], mean["all"])
        lines.append(f"| {label} | " + " | ".join(f"{100 * rise:+.1f} %" for rise in rises) + f" | {spread} |")
    notes = [
        f"The held-out action loss is {found['action_loss']:.4f} over {found['windows']} windows; the columns say by "
        "how much it rises when a stream is replaced."
    ]
    if "copy_error" in found:
        share = found["projector_error"] / found["copy_error"]
        notes.append(f"The error of the projected futures is {share:.2f} of the error of the present in their place.")
    if found["codes_used"]:
        counts = ", ".join(f"{count} on {name} futures" for name, count in found["codes_used"].items())
        notes.append(f"Codes used: {counts}.")
    return "\n".join(lines) + "\n\n" + " ".join(notes) + "\n"


def draw(found: dict[str, Any], file: Path) -> None:
    """Draw bars: the cost of a swapped stream and of the mean stream, for motion and gripper."""
    names = [*found["streams"], "gfdm"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.6 * len(names) + 1.4), sharey=True)
    for axis, ablation, title in zip(axes, ("swap", "mean"), ("another window's", "the mean of all windows")):
        for offset, part in enumerate(PARTS):
            values = [100 * found["costs"][f"{ablation}_{name}"][part] for name in names]
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
    chunks = validation_batches(
        len(windows), cfg.batch_size, seed=cfg.seed, rank=0, world=1, most=-(-cfg.windows // cfg.batch_size)
    )
    draws = SeededDataset(windows, cfg.seed)
    batches = [collate([draws[key] for key in keys]) for keys, _ in chunks if len(keys) == cfg.batch_size]
    if not batches:
        raise UserError(
            f"{cfg.data.root}: the split {cfg.split} has fewer than batch_size={cfg.batch_size} windows; set a lower "
            "batch_size"
        )
    found = measure_links(model, batches)
    out = Path(cfg.out)
    record = {"path": str(cfg.path), "policy_sha256": artifact.sha256(cfg.path), "seed": cfg.seed, **found}
    write_json(out / "links.json", record)
    write_text(out / "table.md", table(found))
    draw(found, out / "links.png")
    LOG.info("%s", table(found))
    LOG.info("results in %s", out)


if __name__ == "__main__":
    main()
