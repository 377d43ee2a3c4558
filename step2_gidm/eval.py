"""Program: what do the latent actions carry (Sec. 3.2, Fig. 12)?   python -m step2_gidm.eval path=ckpts/gidm/<name>
scale=<scale>

Held-out error of the predicted future tokens beside predicting no change, beside the same prediction with another
pair's latent action (the "action matters" gap), how many codes are in use, and where the queries look; then what the
latent actions mean: their neighbours, the robot's motion read out of them, and what they do in another scene.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from common import artifact
from common.curves import save_curves
from common.distributed import processes
from common.files import write_text
from common.metrics import bootstrap_ci, perplexity
from common.mixture import Mixture, SampleSet, UnreadableSample
from common.program import EXPECTED, program, root_cause
from step2_gidm import analysis
from step2_gidm.analysis import QUANTIZED, SENTENCE, EncodedPairs, MissingLabels
from step2_gidm.model import GIDM, InverseModel
from step2_gidm.visualize import draw_attention, draw_neighbours, draw_transfer, film_attention

ROWS = {
    "mse": "with its own latent action",
    "shuffled_mse": "with another pair's latent action",
    "copy_mse": "no change (the current frame)",
    "gain": "gain over no change",
    "gap": "gap: what the right latent action is worth",
}
CURVES = {
    "loss": "loss",
    "error of the future frame's tokens": "mse|copy_mse",
    "gap to another pair's latent action": "gap",
    "share of the codes in use": r"usage(_\d+)?",
    "perplexity": r"perplexity(_\d+)?",
}  # title: names in metrics.jsonl; _0, _1, ...: by query
log = logging.getLogger(__name__)


def draw_pairs(samples: SampleSet, count: int, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """`count` pairs that depend on the seed only, and the lines of what could not be read."""
    rng, pairs, skipped = np.random.default_rng(seed), [], []
    for _ in tqdm(range(count), desc="pairs"):
        try:
            pairs.append(samples.sample(int(rng.integers(len(samples))), rng))
        except UnreadableSample as error:
            skipped.append(str(error))
            log.warning("skipped: %s", error)
    if len(pairs) < 2:
        raise ValueError(
            f"{len(pairs)} of {count} pairs could be read, 2 are needed; the last: "
            f"{skipped[-1] if skipped else 'pairs is too small'}"
        )
    return pairs, skipped


def encode_pairs(model: InverseModel, pairs: list[dict[str, Any]], *, batch_size: int) -> EncodedPairs:
    """All pairs through the inverse model."""
    return analysis.join(
        [analysis.encode_pairs(model, chunk) for chunk in tqdm(_chunks(pairs, batch_size), desc="infer")]
    )


@torch.no_grad()
def measure(
    model: InverseModel, pairs: list[dict[str, Any]], encoded: EncodedPairs, *, batch_size: int
) -> dict[str, np.ndarray]:
    """Errors by pair. Pairs trade latent actions with their neighbour."""
    device = next(model.parameters()).device
    rows: dict[str, list[Tensor]] = {"mse": [], "shuffled_mse": [], "copy_mse": []}
    columns = (encoded.now, encoded.future, encoded.quantized, encoded.quantized.roll(1, dims=0))
    for chunk, *tensors in tqdm(
        list(zip(_chunks(pairs, batch_size), *(column.split(batch_size) for column in columns))), desc="decode"
    ):
        now, future, own, other = (values.to(device) for values in tensors)
        text = [pair["text"] for pair in chunk]
        guesses = {"mse": model.decode(now, own, text), "shuffled_mse": model.decode(now, other, text), "copy_mse": now}
        for name, guess in guesses.items():
            rows[name].append((guess.float() - future).square().mean((1, 2)).cpu())
    errors = {name: torch.cat(values).numpy() for name, values in rows.items()}
    return errors | {"gain": errors["copy_mse"] - errors["mse"], "gap": errors["shuffled_mse"] - errors["mse"]}


def _chunks(pairs: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def summarize(errors: dict[str, np.ndarray], codes: np.ndarray | None, total: int | None) -> dict[str, Any]:
    """Means with 95 % intervals; usage and perplexity of the codes over all positions and by query position."""
    summary: dict[str, Any] = {
        name: dict(zip(("mean", "low", "high"), bootstrap_ci(values))) for name, values in errors.items()
    }
    if codes is not None:
        counts = [torch.from_numpy(np.unique(part, return_counts=True)[1]) for part in (codes, *codes.T)]
        summary["codes"] = {
            "used": len(counts[0]),
            "of": total,
            "used_by_query": [len(part) for part in counts[1:]],
            "perplexity": float(perplexity(counts[0])),
            "perplexity_by_query": [float(perplexity(part)) for part in counts[1:]],
        }
    return summary


def table(summary: dict[str, Any], pairs: int) -> str:
    """The summary as Markdown."""
    lines = [
        f"Mean squared error of the future frame's DINOv2 tokens, {pairs} held-out pairs; mean [95 % interval over "
        "pairs].",
        "",
        "| future predicted | MSE |",
        "|---|---|",
    ]
    lines += [
        f"| {label} | {summary[name]['mean']:.4f} [{summary[name]['low']:.4f}, {summary[name]['high']:.4f}] |"
        for name, label in ROWS.items()
    ]
    if "codes" in summary:
        codes = summary["codes"]
        used, even = (
            ", ".join(map(str, codes["used_by_query"])),
            ", ".join(f"{value:.1f}" for value in codes["perplexity_by_query"]),
        )
        lines += [
            "",
            f"Codes in use: {codes['used']} of {codes['of']} (by query: {used}); perplexity {codes['perplexity']:.1f} "
            f"(by query: {even}).",
        ]
    else:
        lines += ["", "No codes: this model's bottleneck is continuous."]
    return "\n".join(lines) + "\n"


def retrieval_table(results: dict[str, Any], count: int, told: bool) -> str:
    """What neighbours share, as Markdown."""
    names = {"sentence": "share with the same sentence", "displacement": "cosine of the end effector's displacements"}
    lines = [
        "",
        f"Neighbours: the nearest pair of each of the {count} nearest other episodes, same camera; mean [95 % interval "
        "over episodes]. "
        "Above random: beside all pairs that might have been "
        f"found.{' The encoder is told the sentence.' if told else ''}",
    ]
    for name, rows in results.items():
        lines += ["", f"| nearest by | {names[name]} | above random |", "|---|---|---|"]
        lines += [f"| {source} | {_cell(row['value'])} | {_cell(row['gain'], '+')} |" for source, row in rows.items()]
    return "\n".join(lines) + "\n"


def motion_table(results: dict[str, Any]) -> str:
    """The read-outs as Markdown."""
    names = {"motion": "displacement", "gripper": "gripper change"}
    columns = [(view, target) for view, row in results.items() for target in row]
    sizes = "; ".join(f"camera {v}, {names[t]}: " + " / ".join(map(str, results[v][t]["pairs"])) for v, t in columns)
    lines = [
        "",
        "Linear read-outs of the robot's motion: R² on held-out episodes [95 % interval over them]. Pairs to fit / "
        "choose / measure: "
        f"{sizes}. Fitted on training episodes; all inputs at most as wide as the latent action.",
        "",
        "| read from | " + " | ".join(f"camera {view}: {names[target]}" for view, target in columns) + " |",
        "|" + "---|" * (len(columns) + 1),
    ]
    for source in next(iter(results[columns[0][0]].values()))["r2"]:
        lines.append(
            f"| {source} | "
            + " | ".join(_cell(results[view][target]["r2"][source], places=2) for view, target in columns)
            + " |"
        )
    for source in next(iter(results[columns[0][0]].values()))["lead"]:
        leads = (_cell(results[view][target]["lead"][source], "+", places=2) for view, target in columns)
        lines.append(f"| latent action, continuous, above {source} | " + " | ".join(leads) + " |")
    return "\n".join(lines) + "\n"


def transfer_table(results: dict[str, Any]) -> str:
    """What actions do in another scene, as Markdown."""
    names = {
        "own": "its own",
        "same": "same sentence in another scene, at the same part of the episode",
        "other": "another sentence in another scene, at the same part",
        "shuffled": "any in another scene",
        "gain": "same sentence above any",
        "sentence_gain": "same sentence above another sentence",
    }
    lines = [
        "",
        f"Transfer: cosine of the decoded change of tokens with the true one, {results['pairs']} pairs; mean [95 % "
        "interval over episodes].",
        "",
        "| latent action | cosine |",
        "|---|---|",
    ]
    return (
        "\n".join(lines + [f"| {label} | {_cell(results[name], places=3)} |" for name, label in names.items()]) + "\n"
    )


def _cell(row: dict[str, float], sign: str = "", places: int = 2) -> str:
    return f"{row['mean']:{sign}.{places}f} [{row['low']:{sign}.{places}f}, {row['high']:{sign}.{places}f}]"


def film(model: GIDM, samples: Mixture, out: Path, cfg: DictConfig) -> list[str]:
    """Films of a few episodes of every set; returns a line on each that cannot be filmed."""
    notes = []
    for name, member in zip(samples.names, samples.sets):
        for index in np.unique(np.linspace(0, len(member) - 1, min(cfg.films, len(member))).round().astype(int)):
            try:
                clip = member.episode_pairs(int(index), cfg.film_steps)
            except UnreadableSample as error:
                notes.append(f"No film of {error}.")
                continue
            film_attention(model, clip, out / f"{name}_{index:03d}.mp4", fps=cfg.fps, batch_size=cfg.batch_size)
    return notes


def training_inputs(model: InverseModel, cfg: DictConfig) -> tuple[dict[str, Tensor], analysis.Labels]:
    """Inputs of the read-outs and labels of `cfg.probe` pairs of training episodes. Raises Missing."""
    try:
        samples = instantiate(cfg.data, split="train", labelled=True, augment=False, stream=None)
    except InstantiationException as error:
        if not isinstance(root_cause(error), EXPECTED):
            raise
        raise MissingLabels(
            f"read-outs of the robot's motion are left out: no training episodes to fit on ({root_cause(error)})"
        ) from error
    pairs, _ = draw_pairs(samples, cfg.probe, cfg.seed + 1)
    parts = [
        analysis.inputs(model, analysis.encode_pairs(model, chunk), chunk)
        for chunk in tqdm(_chunks(pairs, cfg.batch_size), desc="infer")
    ]
    known = analysis.labels(pairs)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | {
        SENTENCE: analysis.sentences(model, known.text)
    }, known


def interpret(
    model: InverseModel, pairs: list[dict[str, Any]], encoded: EncodedPairs, out: Path, cfg: DictConfig
) -> tuple[dict[str, Any], str]:
    """What the latent actions mean: results and their tables. A part that the data do not allow is a line of
    `notes`."""
    known, values = analysis.labels(pairs), analysis.inputs(model, encoded, pairs)
    results: dict[str, Any] = {"notes": []}
    said = ""

    def retrieve() -> str:
        found = {
            source: analysis.neighbours(x, values[analysis.CONTINUOUS], known, cfg.neighbours)
            for source, x in values.items()
        }
        results["retrieval"] = analysis.retrieve(found, known)
        if cfg.pictures:
            draw_neighbours(
                out / "neighbours.png", pairs, found[QUANTIZED][:, :3], _spread_out(known.text, cfg.pictures)
            )
        return retrieval_table(results["retrieval"], cfg.neighbours, "encoder" in model.text_in)

    def read() -> str:
        if not np.isfinite(known.motion).any():
            raise MissingLabels(
                "read-outs of the robot's motion are left out: the data hold no readings of the robot ('state' in the "
                "annotations)"
            )
        fit, fit_known = training_inputs(model, cfg)
        results["motion"] = analysis.read_motion(
            fit, fit_known, values | {SENTENCE: analysis.sentences(model, known.text)}, known, seed=cfg.seed
        )
        return motion_table(results["motion"])

    def transfer() -> str:
        partners = analysis.transfers(known, cfg.seed)
        results["transfer"] = analysis.measure_transfer(model, encoded, known, partners, batch_size=cfg.batch_size)
        if cfg.pictures:
            draw_transfer(
                out / "transfer.png",
                model,
                pairs,
                encoded,
                known,
                partners,
                _spread_out(known.text[partners.target], cfg.pictures),
            )
        return transfer_table(results["transfer"])

    for part in (retrieve, *([read] if cfg.probe else []), transfer):
        try:
            said += part()
        except MissingLabels as error:
            results["notes"].append(f"{str(error)[0].upper()}{str(error)[1:]}.")
    return results, said


def _spread_out(texts: Sequence[str], count: int) -> list[int]:
    """Numbers of up to `count` pairs, of as many different sentences as there are."""
    turns: Counter[str] = Counter()
    order = []
    for i, text in enumerate(texts):
        order.append((turns[text], i))
        turns[text] += 1
    return [i for _, i in sorted(order)[:count]]


@program("step2_eval")
def main(cfg: DictConfig) -> None:
    if not processes().is_main_process:  # the launcher starts one process a GPU; a few pairs need one
        return
    model = artifact.load(cfg.path, "gidm").to(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cfg.gidm = OmegaConf.load(Path(cfg.path) / "config.yaml")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    samples = instantiate(cfg.data, split=cfg.split, labelled=True, stream=None)
    pairs, skipped = draw_pairs(samples, cfg.pairs, cfg.seed)
    encoded = encode_pairs(model, pairs, batch_size=cfg.batch_size)
    errors, codes = (
        measure(model, pairs, encoded, batch_size=cfg.batch_size),
        None if encoded.codes is None else encoded.codes.numpy(),
    )
    summary = summarize(errors, codes, model.quantizer.size)
    meant, said = interpret(model, pairs, encoded, out, cfg)
    meant["notes"] += save_curves(Path(cfg.path), CURVES, out / "curves.png") if cfg.pictures else []
    if isinstance(model, GIDM):
        for i, pair in enumerate(pairs[: cfg.pictures]):
            draw_attention(model, pair, out / "attention" / f"{i:03d}.png")
        meant["notes"] += film(model, samples, out / "attention", cfg) if cfg.films else []
    results = {
        "pairs": len(pairs),
        "skipped": skipped,
        "seed": cfg.seed,
        "split": cfg.split,
        "gidm_sha256": artifact.sha256(cfg.path),
        "data": OmegaConf.to_container(cfg.data, resolve=True),
        "summary": summary,
        **meant,
        "samples": [
            {
                "id": pair["id"],
                **{k: float(v[i]) for k, v in errors.items()},
                "codes": None if codes is None else codes[i].tolist(),
            }
            for i, pair in enumerate(pairs)
        ],
    }
    said = table(summary, len(pairs)) + said + "".join(f"\n{note}\n" for note in meant["notes"])
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(out / "table.md", said)
    log.info("\n%s", said)
    log.info("results in %s", out)


if __name__ == "__main__":
    main()
