"""Measure what the latent actions of a trained inverse model carry (Sec. 3.2, Fig. 12).

Reconstruction: the error of the predicted future tokens on held-out pairs, against the error of predicting no change
and against the same prediction with the latent action of another pair (the gap). Codes: how many are in use. Analysis:
the nearest neighbours of the latent actions, the robot's motion that linear probes read out of them, and their effect
in another scene. Figures: the attention of the queries, neighbours, transfer, and the curves of the training. All of it
is written to `out`: results.json, table.md, PNGs and films.

Examples:
    python -m step2_gidm.eval path=ckpts/gidm/tiny scale=tiny
    python -m step2_gidm.eval path=ckpts/gidm/tiny scale=tiny pairs=64 pictures=0 films=0 out=outputs/gidm
"""

from __future__ import annotations

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

from common import artifact
from common.curves import save_curves
from common.distributed import processes
from common.errors import UnreadableSample, UserError
from common.files import write_json, write_text
from common.metrics import bootstrap_ci, perplexity
from common.mixture import Mixture, SampleSet
from common.program import program, root_cause
from common.progress import tqdm
from step2_gidm import analysis
from step2_gidm.analysis import QUANTIZED, SENTENCE, EncodedPairs, Labels, MissingLabels
from step2_gidm.model import GIDM, InverseModel
from step2_gidm.visualize import draw_attention, draw_neighbours, draw_transfer, film_attention

ROWS = {
    "mse": "with its own latent action",
    "shuffled_mse": "with another pair's latent action",
    "copy_mse": "no change (the current frame)",
    "gain": "gain over no change",
    "gap": "gap: what the right latent action is worth",
}
CURVES = {  # title of a panel: names of its metrics; those that end in _0, _1, ... are of one query
    "loss": "loss",
    "error of the future frame's tokens": "mse|copy_mse",
    "gap to another pair's latent action": "gap",
    "share of the codes in use": r"usage(_\d+)?",
    "perplexity": r"perplexity(_\d+)?",
}
Pairs = list[dict[str, Any]]  # samples of Transitions
log = logging.getLogger(__name__)


def sample_pairs(samples: SampleSet, count: int, seed: int) -> tuple[Pairs, list[str]]:
    """Draw `count` pairs that depend on the seed alone; returns those that could be read and a line on each other.

    Raises UserError where fewer than two could be read.
    """
    rng, pairs, skipped = np.random.default_rng(seed), [], []
    for _ in tqdm(range(count), desc="pairs"):
        try:
            pairs.append(samples.sample(int(rng.integers(len(samples))), rng))
        except UnreadableSample as error:
            skipped.append(str(error))
            log.warning("skipped: %s", error)
    if len(pairs) < 2:
        reason = f"the last that could not be read: {skipped[-1]}" if skipped else "raise pairs"
        raise UserError(f"{len(pairs)} of {count} pairs could be read, but 2 are needed; {reason}")
    return pairs, skipped


def encode_pairs(model: InverseModel, pairs: Pairs, *, batch_size: int) -> EncodedPairs:
    """Run all pairs through the inverse model."""
    batches = tqdm(_batches(pairs, batch_size), desc="infer")
    return analysis.concatenate([analysis.encode_batch(model, batch) for batch in batches])


@torch.no_grad()
def reconstruction_errors(
    model: InverseModel, pairs: Pairs, encoded: EncodedPairs, *, batch_size: int
) -> dict[str, np.ndarray]:
    """The errors of ROWS for each pair, (P,). Each pair is also decoded with the latent action of the previous one."""
    device = next(model.parameters()).device
    rows: dict[str, list[Tensor]] = {"mse": [], "shuffled_mse": [], "copy_mse": []}
    columns = (encoded.now, encoded.future, encoded.quantized, encoded.quantized.roll(1, dims=0))
    batches = list(zip(_batches(pairs, batch_size), *(column.split(batch_size) for column in columns)))
    for batch, *tensors in tqdm(batches, desc="decode"):
        now, future, own, other = (values.to(device) for values in tensors)
        text = [pair["text"] for pair in batch]
        predictions = {
            "mse": model.decode(now, own, text),
            "shuffled_mse": model.decode(now, other, text),
            "copy_mse": now,
        }
        for name, prediction in predictions.items():
            rows[name].append((prediction.float() - future).square().mean((1, 2)).cpu())
    errors = {name: torch.cat(values).numpy() for name, values in rows.items()}
    return errors | {"gain": errors["copy_mse"] - errors["mse"], "gap": errors["shuffled_mse"] - errors["mse"]}


def _batches(pairs: Pairs, size: int) -> list[Pairs]:
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def summarize(errors: dict[str, np.ndarray], codes: np.ndarray | None, num_codes: int | None) -> dict[str, Any]:
    """Means of the errors with 95 % intervals; use and perplexity of the `codes` (P, K), in all and by query."""
    summary: dict[str, Any] = {
        name: dict(zip(("mean", "low", "high"), bootstrap_ci(values))) for name, values in errors.items()
    }
    if codes is not None:
        counts = [torch.from_numpy(np.unique(part, return_counts=True)[1]) for part in (codes, *codes.T)]
        summary["codes"] = {
            "used": len(counts[0]),
            "of": num_codes,
            "used_by_query": [len(part) for part in counts[1:]],
            "perplexity": float(perplexity(counts[0])),
            "perplexity_by_query": [float(perplexity(part)) for part in counts[1:]],
        }
    return summary


def reconstruction_table(summary: dict[str, Any], num_pairs: int) -> str:
    """The summary as Markdown."""
    lines = [
        f"Mean squared error of the future frame's DINOv2 tokens, {num_pairs} held-out pairs; mean [95 % interval over "
        "pairs].",
        "",
        "| future predicted | MSE |",
        "|---|---|",
        *(f"| {label} | {_cell(summary[name], places=4)} |" for name, label in ROWS.items()),
        "",
    ]
    if "codes" in summary:
        codes = summary["codes"]
        used = ", ".join(map(str, codes["used_by_query"]))
        perplexities = ", ".join(f"{value:.1f}" for value in codes["perplexity_by_query"])
        lines.append(
            f"Codes in use: {codes['used']} of {codes['of']} (by query: {used}); perplexity {codes['perplexity']:.1f} "
            f"(by query: {perplexities})."
        )
    else:
        lines.append("No codes: this model's bottleneck is continuous.")
    return "\n".join(lines) + "\n"


def retrieval_table(results: dict[str, Any], count: int, reads_sentence: bool) -> str:
    """The results of analysis.measure_retrieval for `count` neighbours as Markdown."""
    names = {"sentence": "share with the same sentence", "displacement": "cosine of the end effector's displacements"}
    lines = [
        "",
        f"Neighbours: the nearest pair of each of the {count} nearest other episodes, same camera; mean [95 % interval "
        "over episodes]. The gain is over all pairs that might have been found."
        f"{' The encoder reads the sentence.' if reads_sentence else ''}",
    ]
    for name, rows in results.items():
        lines += ["", f"| nearest by | {names[name]} | gain over a random pair |", "|---|---|---|"]
        lines += [f"| {source} | {_cell(row['value'])} | {_cell(row['gain'], '+')} |" for source, row in rows.items()]
    return "\n".join(lines) + "\n"


def motion_table(results: dict[str, Any]) -> str:
    """The results of analysis.probe_motion as Markdown."""
    names = {"motion": "displacement", "gripper": "gripper change"}
    columns = [(view, target) for view, row in results.items() for target in row]
    sizes = "; ".join(f"camera {v}, {names[t]}: " + " / ".join(map(str, results[v][t]["pairs"])) for v, t in columns)
    lines = [
        "",
        "Linear probes of the robot's motion: R² on held-out episodes [95 % interval over them]. Pairs to fit / to "
        f"choose the regularization / to measure: {sizes}. The probes are fitted on training episodes, and no input is "
        "wider than the latent action.",
        "",
        "| read from | " + " | ".join(f"camera {view}: {names[target]}" for view, target in columns) + " |",
        "|" + "---|" * (len(columns) + 1),
    ]
    first = next(iter(results[columns[0][0]].values()))
    for source in first["r2"]:
        cells = (_cell(results[view][target]["r2"][source], places=2) for view, target in columns)
        lines.append(f"| {source} | " + " | ".join(cells) + " |")
    for source in first["lead"]:
        cells = (_cell(results[view][target]["lead"][source], "+", places=2) for view, target in columns)
        lines.append(f"| latent action, continuous, minus {source} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def transfer_table(results: dict[str, Any]) -> str:
    """The results of analysis.measure_transfer as Markdown."""
    names = {
        "own": "its own",
        "same": "same sentence in another scene, at the same part of the episode",
        "other": "another sentence in another scene, at the same part",
        "shuffled": "any in another scene",
        "gain": "same sentence minus any",
        "sentence_gain": "same sentence minus another sentence",
    }
    lines = [
        "",
        f"Transfer: cosine of the decoded change of the tokens with the true change, {results['pairs']} pairs; mean "
        "[95 % interval over episodes].",
        "",
        "| latent action | cosine |",
        "|---|---|",
        *(f"| {label} | {_cell(results[name], places=3)} |" for name, label in names.items()),
    ]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, float], sign: str = "", places: int = 2) -> str:
    return f"{row['mean']:{sign}.{places}f} [{row['low']:{sign}.{places}f}, {row['high']:{sign}.{places}f}]"


def film_episodes(model: GIDM, samples: Mixture, out: Path, cfg: DictConfig) -> list[str]:
    """Film a few episodes of every set; returns a line on each that cannot be filmed."""
    notes = []
    for name, transitions in zip(samples.names, samples.sets):
        count = min(cfg.films, len(transitions))
        for index in np.unique(np.linspace(0, len(transitions) - 1, count).round().astype(int)):
            try:
                clip = transitions.episode_pairs(int(index), cfg.film_steps)
            except UnreadableSample as error:
                notes.append(f"No film of {error}.")
                continue
            film_attention(model, clip, out / f"{name}_{index:03d}.mp4", fps=cfg.fps, batch_size=cfg.batch_size)
    return notes


def probe_training_data(model: InverseModel, cfg: DictConfig) -> tuple[dict[str, Tensor], Labels]:
    """Representations and labels of `cfg.probe` pairs of training episodes, on which probes are fitted.

    Raises MissingLabels where there are no training data.
    """
    try:
        samples = instantiate(cfg.data, split="train", labelled=True, augment=False, stream=None)
    except InstantiationException as error:
        cause = root_cause(error)
        if not isinstance(cause, UserError):
            raise
        raise MissingLabels(
            f"probes of the robot's motion are left out: no training episodes to fit on ({cause})"
        ) from error
    pairs, _ = sample_pairs(samples, cfg.probe, cfg.seed + 1)
    parts = [
        analysis.representations(model, analysis.encode_batch(model, batch), batch)
        for batch in tqdm(_batches(pairs, cfg.batch_size), desc="infer")
    ]
    labels = analysis.read_labels(pairs)
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return values | {SENTENCE: analysis.embed_sentences(model, labels.text)}, labels


def analyze(
    model: InverseModel, pairs: Pairs, encoded: EncodedPairs, out: Path, cfg: DictConfig
) -> tuple[dict[str, Any], str]:
    """What the latent actions carry: the results for results.json, and their tables.

    Where the data lack what a part needs, a line in `notes` takes its place.
    """
    labels, values = analysis.read_labels(pairs), analysis.representations(model, encoded, pairs)
    results: dict[str, Any] = {"notes": []}
    tables = ""

    def retrieval() -> str:
        neighbours = {
            source: analysis.find_neighbours(x, values[analysis.CONTINUOUS], labels, cfg.neighbours)
            for source, x in values.items()
        }
        results["retrieval"] = analysis.measure_retrieval(neighbours, labels)
        if cfg.pictures:
            rows = _with_varied_sentences(labels.text, cfg.pictures)
            draw_neighbours(out / "neighbours.png", pairs, neighbours[QUANTIZED][:, :3], rows)
        return retrieval_table(results["retrieval"], cfg.neighbours, "encoder" in model.text_in)

    def motion() -> str:
        if not np.isfinite(labels.motion).any():
            raise MissingLabels(
                "probes of the robot's motion are left out: the data hold no readings of the robot ('state' in the "
                "annotations)"
            )
        fit, fit_labels = probe_training_data(model, cfg)
        test = values | {SENTENCE: analysis.embed_sentences(model, labels.text)}
        results["motion"] = analysis.probe_motion(fit, fit_labels, test, labels, seed=cfg.seed)
        return motion_table(results["motion"])

    def transfer() -> str:
        chosen = analysis.find_transfer_pairs(labels, cfg.seed)
        results["transfer"] = analysis.measure_transfer(model, encoded, labels, chosen, batch_size=cfg.batch_size)
        if cfg.pictures:
            rows = _with_varied_sentences(labels.text[chosen.target], cfg.pictures)
            draw_transfer(out / "transfer.png", model, pairs, encoded, labels, chosen, rows)
        return transfer_table(results["transfer"])

    for part in (retrieval, *([motion] if cfg.probe else []), transfer):
        try:
            tables += part()
        except MissingLabels as error:
            results["notes"].append(f"{str(error)[0].upper()}{str(error)[1:]}.")
    return results, tables


def _with_varied_sentences(texts: Sequence[str], count: int) -> list[int]:
    """Indices of up to `count` texts, with as many different ones as there are."""
    seen: Counter[str] = Counter()
    order = []
    for i, text in enumerate(texts):
        order.append((seen[text], i))
        seen[text] += 1
    return [i for _, i in sorted(order)[:count]]


@program("step2_eval")
def main(cfg: DictConfig) -> None:
    if not processes().is_main_process:  # the launcher starts one process per GPU, but this program needs only one
        return
    model = artifact.load(cfg.path, "gidm").to(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cfg.gidm = OmegaConf.load(Path(cfg.path) / "config.yaml")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    samples = instantiate(cfg.data, split=cfg.split, labelled=True, stream=None)
    pairs, skipped = sample_pairs(samples, cfg.pairs, cfg.seed)
    encoded = encode_pairs(model, pairs, batch_size=cfg.batch_size)
    errors = reconstruction_errors(model, pairs, encoded, batch_size=cfg.batch_size)
    codes = None if encoded.codes is None else encoded.codes.numpy()
    summary = summarize(errors, codes, model.quantizer.size)
    analyzed, tables = analyze(model, pairs, encoded, out, cfg)
    notes = analyzed["notes"]
    if cfg.pictures:
        notes += save_curves(Path(cfg.path), CURVES, out / "curves.png")
    if isinstance(model, GIDM):
        for i, pair in enumerate(pairs[: cfg.pictures]):
            draw_attention(model, pair, out / "attention" / f"{i:03d}.png")
        if cfg.films:
            notes += film_episodes(model, samples, out / "attention", cfg)
    results = {
        "pairs": len(pairs),
        "skipped": skipped,
        "seed": cfg.seed,
        "split": cfg.split,
        "gidm_sha256": artifact.sha256(cfg.path),
        "data": OmegaConf.to_container(cfg.data, resolve=True),
        "summary": summary,
        **analyzed,
        "samples": [
            {
                "id": pair["id"],
                **{name: float(values[i]) for name, values in errors.items()},
                "codes": None if codes is None else codes[i].tolist(),
            }
            for i, pair in enumerate(pairs)
        ],
    }
    text = reconstruction_table(summary, len(pairs)) + tables + "".join(f"\n{note}\n" for note in notes)
    write_json(out / "results.json", results)
    write_text(out / "table.md", text)
    log.info("\n%s", text)
    log.info("results in %s", out)


if __name__ == "__main__":
    main()
