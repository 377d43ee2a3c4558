"""Compare rows of a table by their held-out loss, over several seeds (Table 4).

It reads the last validation in every `runs`/<row>/<seed>/metrics.jsonl. The difference of a row to the base is paired
by seed, and its 95 % interval is that of Student's t over the seeds that both have. The results are written to `out`:
seeds.json and table.md.

Examples:
    python -m step3_defi.seeds runs=ckpts/defi/few base=pretrained
    python -m step3_defi.seeds runs=ckpts/defi/few base=pretrained metrics=[action_loss] out=outputs/few
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from scipy.stats import t as student

from common.curves import read_metrics
from common.errors import UserError
from common.files import write_json, write_text
from common.program import program

LOG = logging.getLogger(__name__)


def last_validation(folder: Path) -> dict[str, float]:
    """Metric -> value of the last validation in a training's metrics.jsonl, and its "step".

    Raises UserError if there is none.
    """
    path = folder / "metrics.jsonl"
    series = read_metrics(path)
    if "val/action_loss" not in series:
        raise UserError(f"{path} holds no validation; train that run to its end, or move it out of the folder")
    last = {key.removeprefix("val/"): values[-1] for key, (_, values) in series.items() if key.startswith("val/")}
    return last | {"step": series["val/action_loss"][0][-1]}


def read_runs(runs: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Row -> seed -> last validation. Raises UserError if the trainings have different lengths."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for folder in sorted(path for path in runs.glob("*/*") if path.is_dir()):
        found.setdefault(folder.parent.name, {})[folder.name] = last_validation(folder)
    steps = sorted({values["step"] for row in found.values() for values in row.values()})
    if len(steps) > 1:
        raise UserError(f"the runs in {runs} end at steps {steps}; only trainings of equal length can be compared")
    return found


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """(mean, lower bound, upper bound) of Student's 95 % interval; the bounds of a single number are nan."""
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return mean, float("nan"), float("nan")
    half = float(student.ppf(0.975, count - 1) * differences.std(ddof=1) / count**0.5)
    return mean, mean - half, mean + half


def compare(found: dict[str, dict[str, dict[str, float]]], base: str, metrics: list[str]) -> tuple[dict[str, Any], str]:
    """Compare the seeds of every row with those of the base -> (content of seeds.json, table as Markdown)."""
    if base not in found:
        raise UserError(f"base={base} is none of the rows: {', '.join(found) or 'the folder is empty'}")
    result: dict[str, Any] = {}
    lines = [
        "| row | seeds | " + " | ".join(metrics) + " | action_loss against the base, in % [95 %] |",
        "|---" * (len(metrics) + 3) + "|",
    ]
    for row, seeds in sorted(found.items(), key=lambda item: item[0] != base):
        values = {metric: np.array([run[metric] for run in seeds.values() if metric in run]) for metric in metrics}
        shared = sorted(set(seeds) & set(found[base]))
        ratios = np.array([seeds[seed]["action_loss"] / found[base][seed]["action_loss"] - 1 for seed in shared])
        share = interval(100 * ratios) if row != base and shared else None
        result[row] = {"seeds": sorted(seeds), "runs": seeds, "against_base_percent": share}
        cells = [_mean_and_deviation(part) for part in values.values()]
        against = f"{share[0]:+.1f} [{share[1]:+.1f}, {share[2]:+.1f}]" if share else ""
        lines.append("| " + " | ".join([row, str(len(seeds)), *cells, against]) + " |")
    return result, "\n".join(lines)


def _mean_and_deviation(values: np.ndarray) -> str:
    """A cell of the table; empty where no run has the metric."""
    if not len(values):
        return ""
    deviation = values.std(ddof=1) if len(values) > 1 else float("nan")
    return f"{values.mean():.4f} +- {deviation:.4f}"


@program("step3_seeds")
def main(cfg: DictConfig) -> None:
    result, table = compare(read_runs(Path(cfg.runs)), cfg.base, list(cfg.metrics))
    out = Path(cfg.out)
    write_json(out / "seeds.json", result)
    write_text(out / "table.md", table + "\n")
    LOG.info("%s", table)
    LOG.info("results in %s", out)


if __name__ == "__main__":
    main()
