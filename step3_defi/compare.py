"""Compare two rollouts on the same sequences, in pairs: difference of average lengths, interval and p-value.

Leaves compare.json and table.md in `out`.

Examples:
    python -m step3_defi.compare a=outputs/eval/defi b=outputs/eval/blind
    python -m step3_defi.compare a=outputs/defi b=outputs/vpp out=outputs/defi_vpp
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common.files import write_json, write_text
from common.program import program
from step3_defi.rollout import journal, stats

LOG = logging.getLogger(__name__)


def compare_folders(a: Path, b: Path, *, seed: int = 0) -> tuple[dict[str, Any], str]:
    """Two folders of step3_defi.eval -> (result, Markdown), at every usual horizon that both cover.

    Raises JournalError where a folder holds no rollout, or where the two hold different sequences.
    """
    records = [journal.read(folder / journal.JOURNAL_FILE) for folder in (a, b)]
    settings = [journal.read_settings(folder) for folder in (a, b)]
    length = settings[0]["length"]
    horizons = stats.reported_horizons(min(own["horizon"] for own in settings))
    result = {
        "a": str(a),
        "b": str(b),
        "worlds": [own["world"] for own in settings],
        "horizons": {str(h): stats.compare(*records, h, seed=seed) for h in horizons},
        "tasks": stats.compare_tasks(*records, horizons[-1], seed=seed),
        "tasks_horizon": horizons[-1],
    }
    shared = stats.shared(*records)
    rows = {
        f"{name}: {folder}, {own['world']}, {h} steps": stats.chain_stats(
            [own_records[i] for i in shared], h, length=length
        )
        for h in horizons
        for name, folder, own_records, own in zip("ab", (a, b), records, settings)
    }
    lines = [
        stats.chain_table(rows, length=length),
        "",
        "| horizon | sequences | a - b | 95 % | p |",
        "|---|---|---|---|---|",
    ]
    for horizon, row in result["horizons"].items():
        low, high = row["difference_ci95"]
        lines.append(
            f"| {horizon} | {row['sequences']} | {row['difference']:+.2f} | [{low:+.2f}, {high:+.2f}] | "
            f"{row['p_value']:.4f} |"
        )
    lines += [
        "",
        f"Sub-tasks that both reached, within {horizons[-1]} steps (p-values not corrected for their number):",
        "",
        "| task | pairs | a | b | a - b | 95 % | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, row in result["tasks"].items():
        low, high = (100 * bound for bound in row["difference_ci95"])
        lines.append(
            f"| {task} | {row['pairs']} | {100 * row['rate_a']:.0f} % | {100 * row['rate_b']:.0f} % | "
            f"{100 * row['difference']:+.0f} | [{low:+.0f}, {high:+.0f}] | {row['p_value']:.4f} |"
        )
    return result, "\n".join(lines)


def write(out: Path, result: dict[str, Any], table: str) -> None:
    """Write compare.json and table.md."""
    write_json(out / "compare.json", result)
    write_text(out / "table.md", table + "\n")


@program("step3_compare")
def main(cfg: DictConfig) -> None:
    out = Path(cfg.out)
    result, table = compare_folders(Path(cfg.a), Path(cfg.b), seed=cfg.seed)
    write(out, result, table)
    LOG.info("%s", table)
    LOG.info("results in %s", out)


if __name__ == "__main__":
    main()
