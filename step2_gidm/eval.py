"""Program: what do the latent actions carry (Sec. 3.2, Fig. 12)?   python -m step2_gidm.eval path=ckpts/gidm/<name> scale=<scale>

Held-out error of the predicted future tokens beside predicting no change, beside the same prediction with another
pair's latent action (the "action matters" gap), how many codes are in use, and where the queries look.
"""
from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from common import artifact
from common.files import beside, write_text
from common.metrics import bootstrap_ci
from common.mixture import SampleSet, Unreadable, collate
from common.program import program
from step2_gidm.model import GIDM, InverseModel
from step2_gidm.quantizer import perplexity

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend must be chosen first: no display)

ROWS = {"mse": "with its own latent action", "shuffled_mse": "with another pair's latent action", "copy_mse": "no change (the current frame)",
        "gain": "gain over no change", "gap": "gap: what the right latent action is worth"}
log = logging.getLogger(__name__)


def draw_pairs(samples: SampleSet, count: int, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """`count` pairs that depend on the seed only, and the lines of what could not be read."""
    rng, pairs, skipped = np.random.default_rng(seed), [], []
    for _ in tqdm(range(count), desc="pairs"):
        try:
            pairs.append(samples.sample(int(rng.integers(len(samples))), rng))
        except Unreadable as error:
            skipped.append(str(error))
            log.warning("skipped: %s", error)
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} of {count} pairs could be read, 2 are needed; the last: {skipped[-1] if skipped else 'pairs is too small'}")
    return pairs, skipped


@torch.no_grad()
def measure(model: InverseModel, pairs: list[dict[str, Any]], *, batch_size: int) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Errors by pair, and codes (pairs, K) where the bottleneck has codes. Pairs trade latent actions with their neighbour."""
    device = next(model.parameters()).device
    tokens, latents, codes = [], [], []
    chunks = [pairs[i:i + batch_size] for i in range(0, len(pairs), batch_size)]
    for chunk in tqdm(chunks, desc="infer"):
        frames = collate(chunk)["frames"].to(device)
        now, future = model.embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).unbind(1)
        action = model.infer(now, future, [pair["text"] for pair in chunk])
        tokens.append((now, future))
        latents.append(action.quantized)
        codes += [] if action.codes is None else [action.codes.cpu().numpy()]
    others = torch.cat(latents).roll(1, dims=0).split(batch_size)
    rows: dict[str, list[Tensor]] = {"mse": [], "shuffled_mse": [], "copy_mse": []}
    for chunk, (now, future), own, other in tqdm(list(zip(chunks, tokens, latents, others)), desc="decode"):
        text = [pair["text"] for pair in chunk]
        guesses = {"mse": model.decode(now, own, text), "shuffled_mse": model.decode(now, other, text), "copy_mse": now}
        for name, guess in guesses.items():
            rows[name].append((guess.float() - future).square().mean((1, 2)).cpu())
    errors = {name: torch.cat(values).numpy() for name, values in rows.items()}
    errors |= {"gain": errors["copy_mse"] - errors["mse"], "gap": errors["shuffled_mse"] - errors["mse"]}
    return errors, np.concatenate(codes) if codes else None


def summarize(errors: dict[str, np.ndarray], codes: np.ndarray | None, total: int | None) -> dict[str, Any]:
    """Means with 95 % intervals; usage and perplexity of the codes over all positions and by query position."""
    summary: dict[str, Any] = {name: dict(zip(("mean", "low", "high"), bootstrap_ci(values))) for name, values in errors.items()}
    if codes is not None:
        counts = [torch.from_numpy(np.unique(part, return_counts=True)[1]) for part in (codes, *codes.T)]
        summary["codes"] = {"used": len(counts[0]), "of": total, "used_by_query": [len(part) for part in counts[1:]],
                            "perplexity": float(perplexity(counts[0])), "perplexity_by_query": [float(perplexity(part)) for part in counts[1:]]}
    return summary


def table(summary: dict[str, Any], pairs: int) -> str:
    """The summary as Markdown."""
    lines = [f"Mean squared error of the future frame's DINOv2 tokens, {pairs} held-out pairs; mean [95 % interval over pairs].", "",
             "| future predicted | MSE |", "|---|---|"]
    lines += [f"| {label} | {summary[name]['mean']:.4f} [{summary[name]['low']:.4f}, {summary[name]['high']:.4f}] |" for name, label in ROWS.items()]
    if "codes" in summary:
        codes = summary["codes"]
        used, even = ", ".join(map(str, codes["used_by_query"])), ", ".join(f"{value:.1f}" for value in codes["perplexity_by_query"])
        lines += ["", f"Codes in use: {codes['used']} of {codes['of']} (by query: {used}); perplexity {codes['perplexity']:.1f} (by query: {even})."]
    return "\n".join(lines) + "\n"


def draw_attention(model: GIDM, pair: dict[str, Any], path: Path) -> None:
    """One PNG: both frames, then the future frame under each query's attention (Fig. 12)."""
    device = next(model.parameters()).device
    now, future = model.embed(pair["frames"].to(device)).unsqueeze(1)
    maps = model.attention(now, future, [pair["text"]])[0].unflatten(-1, model.vision.grid).cpu()
    images = [frame.permute(1, 2, 0).numpy() for frame in pair["frames"]]
    size = images[0].shape[0]
    figure, axes = pyplot.subplots(1, 2 + len(maps), figsize=(2 * (2 + len(maps)), 2.5), squeeze=False)
    titles = ["now", "future", *(f"query {i}" for i in range(len(maps)))]
    for axis, title, image in zip(axes[0], titles, images + [images[1]] * len(maps)):
        axis.imshow(image)
        axis.set(xticks=[], yticks=[], title=title)
    for axis, heat in zip(axes[0][2:], maps):
        axis.imshow(heat, cmap="jet", alpha=0.5, extent=(-0.5, size - 0.5, size - 0.5, -0.5), interpolation="bilinear")
    figure.suptitle(pair["text"], fontsize=10)
    figure.tight_layout()
    try:
        with beside(path) as part:
            figure.savefig(part, dpi=100)
    finally:
        pyplot.close(figure)


@program("step2_eval")
def main(cfg: DictConfig) -> None:
    model = artifact.load(cfg.path, "gidm").to(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cfg.gidm = OmegaConf.load(Path(cfg.path) / "config.yaml")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    pairs, skipped = draw_pairs(instantiate(cfg.data, split=cfg.split), cfg.pairs, cfg.seed)
    errors, codes = measure(model, pairs, batch_size=cfg.batch_size)
    summary = summarize(errors, codes, model.quantizer.size)
    if isinstance(model, GIDM):
        for i, pair in enumerate(pairs[:cfg.pictures]):
            draw_attention(model, pair, out / "attention" / f"{i:03d}.png")
    results = {"pairs": len(pairs), "skipped": skipped, "seed": cfg.seed, "split": cfg.split, "gidm_sha256": artifact.sha256(cfg.path),
               "data": OmegaConf.to_container(cfg.data, resolve=True), "summary": summary,
               "samples": [{"id": pair["id"], **{k: float(v[i]) for k, v in errors.items()},
                            "codes": None if codes is None else codes[i].tolist()} for i, pair in enumerate(pairs)]}
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(out / "table.md", table(summary, len(pairs)))
    log.info("\n%s", table(summary, len(pairs)))
    log.info("results in %s", out)


if __name__ == "__main__":
    main()
