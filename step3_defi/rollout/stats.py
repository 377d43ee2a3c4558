"""Statistics of a journal: success rates at several horizons with intervals, tables, paired comparisons (Table 1).

A journal holds the steps to success up to the longest horizon. At a shorter horizon a sequence ends at its first
sub-task that took longer, so one run gives the results at the paper's 280 steps (App. Q9), at CALVIN's 360 and at the
release's 720.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from common.metrics import bootstrap_ci
from step3_defi.rollout.journal import JournalError, Record

HORIZONS = (280, 360, 720)
PAPER_CHAIN_SR = {"1": 0.979, "2": 0.942, "3": 0.907, "4": 0.870, "5": 0.812}  # Table 1, multi-view
PAPER_AVG_LEN = 4.51
CALVIN_TASKS = 34
PERMUTATIONS = 10_000
NORMAL_95 = 1.959964


def reported_horizons(longest: int) -> list[int]:
    """The usual horizons that a run of up to `longest` steps covers, and `longest` itself."""
    return sorted({h for h in HORIZONS if h <= longest} | {longest})


def chain_length(record: Record, horizon: int) -> int:
    """How many sub-tasks in a row succeeded, each within `horizon` steps."""
    done = 0
    for steps in record["steps_to_success"]:
        if steps is None or steps > horizon:
            break
        done += 1
    return done


def chain_lengths(records: Iterable[Record], horizon: int) -> np.ndarray:
    """(N,) sub-tasks in a row that succeeded in each sequence."""
    return np.array([chain_length(record, horizon) for record in records])


def chain_stats(records: Iterable[Record], horizon: int, *, length: int = 5, seed: int = 0) -> dict[str, Any]:
    """Average length and success rates of sequences of `length` sub-tasks, bootstrapped over sequences.

    {"avg_len", "avg_len_ci95", "chain_sr": {"1": ...}, "chain_sr_ci95": {"1": [low, high], ...}}
    """
    lengths = chain_lengths(records, horizon)
    mean, low, high = bootstrap_ci(lengths, seed=seed)
    rates = {str(k): bootstrap_ci(lengths >= k, seed=seed) for k in range(1, length + 1)}
    return {
        "avg_len": mean,
        "avg_len_ci95": [low, high],
        "chain_sr": {k: rate[0] for k, rate in rates.items()},
        "chain_sr_ci95": {k: [*rate[1:]] for k, rate in rates.items()},
    }


def task_stats(records: Iterable[Record], horizon: int) -> dict[str, dict[str, Any]]:
    """{task: {"success", "total", "rate", "ci95"}} over the sub-tasks that were reached.

    The intervals are Wilson's: they keep their coverage where all of a few trials succeed or fail, and a bootstrap
    interval has no width there.
    """
    counts: dict[str, list[int]] = {}
    for record in records:
        done = chain_length(record, horizon)
        for number, task in enumerate(record["tasks"][: done + 1]):
            count = counts.setdefault(task, [0, 0])
            count[0] += number < done
            count[1] += 1
    return {
        task: {"success": good, "total": total, "rate": good / total, "ci95": wilson(good, total)}
        for task, (good, total) in sorted(counts.items())
    }


def action_stats(records: Iterable[Record], longest: int) -> dict[str, int]:
    """{"steps": control steps of all sub-tasks, "clipped": those whose action left [-1, 1]}."""
    records = list(records)
    steps = sum(longest if taken is None else taken for record in records for taken in record["steps_to_success"])
    return {"steps": steps, "clipped": sum(record["clipped"] for record in records)}


def wilson(success: int, total: int) -> list[float]:
    """Wilson's 95 % interval of a proportion, [low, high]."""
    rate, square = success / total, NORMAL_95**2
    centre = (rate + square / (2 * total)) / (1 + square / total)
    half = NORMAL_95 * np.sqrt(rate * (1 - rate) / total + square / (4 * total**2)) / (1 + square / total)
    return [max(0.0, float(centre - half)), min(1.0, float(centre + half))]


def is_calvin(world: str) -> bool:
    """Whether a world is the real CALVIN, so that its numbers may be compared with the paper's."""
    return world.lower().startswith("calvin")


def caveat(world: str, vocabulary: Sequence[str] | None) -> str:
    """Why results of `world` over the tasks of `vocabulary` (None: all) must not be compared with the paper's.

    An empty string where they may be compared.
    """
    if not is_calvin(world):
        return "This world is not CALVIN: its numbers are not comparable with the paper's."
    if world != "calvin-D" or len(vocabulary or ()) not in (0, CALVIN_TASKS):
        return "CALVIN's benchmark is all its tasks in scene D: these numbers are not comparable with the paper's."
    return ""


def compare(a: Mapping[int, Record], b: Mapping[int, Record], horizon: int, *, seed: int = 0) -> dict[str, Any]:
    """Paired comparison of average lengths on the sequences that both journals hold.

    {"sequences", "avg_len_a", "avg_len_b", "difference" (a - b), "difference_ci95", "p_value"}: the interval is
    bootstrapped over pairs, and the p-value is that of a two-sided permutation test that swaps a and b within pairs.
    Raises JournalError where the journals share no sequence or their sequences differ.
    """
    common = shared(a, b)
    first, second = (chain_lengths([records[i] for i in common], horizon) for records in (a, b))
    return {
        "sequences": len(common),
        "avg_len_a": float(first.mean()),
        "avg_len_b": float(second.mean()),
        **_paired(first, second, seed),
    }


def compare_tasks(
    a: Mapping[int, Record], b: Mapping[int, Record], horizon: int, *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Paired comparison of each task, over the sub-tasks that both journals reached.

    {task: {"pairs", "rate_a", "rate_b", "difference" (a - b), "difference_ci95", "p_value"}}. These are fewer trials
    than those of `task_stats`, because both runs must have succeeded in all sub-tasks before. The p-values are those of
    `compare`, not corrected for the number of tasks.
    """
    outcomes: dict[str, list[tuple[bool, bool]]] = {}
    for index in shared(a, b):
        done = chain_length(a[index], horizon), chain_length(b[index], horizon)
        for number, task in enumerate(a[index]["tasks"][: min(done) + 1]):
            outcomes.setdefault(task, []).append((number < done[0], number < done[1]))
    found = {}
    for task, pairs in sorted(outcomes.items()):
        first, second = np.array(pairs, float).T
        found[task] = {
            "pairs": len(pairs),
            "rate_a": float(first.mean()),
            "rate_b": float(second.mean()),
            **_paired(first, second, seed),
        }
    return found


def _paired(first: np.ndarray, second: np.ndarray, seed: int) -> dict[str, Any]:
    difference = (first - second).astype(float)
    mean, low, high = bootstrap_ci(difference, seed=seed)
    return {"difference": mean, "difference_ci95": [low, high], "p_value": permutation_p(difference, seed=seed)}


def shared(a: Mapping[int, Record], b: Mapping[int, Record]) -> list[int]:
    """The sequences that both journals hold. Raises JournalError where there are none, or where they differ."""
    common = sorted(set(a) & set(b))
    if not common:
        raise JournalError(
            "the two journals share no sequence; roll out with equal sequences=, tasks=, length= and seed="
        )
    for index in common:
        if any(a[index][key] != b[index][key] for key in ("initial_state", "tasks")):
            raise JournalError(
                f"sequence {index} differs between the two journals; roll out with equal sequences=, tasks=, "
                "length= and seed=, in one kind of world"
            )
    return common


def permutation_p(difference: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p-value of a mean of paired differences under random signs. It is never zero."""
    rng = np.random.default_rng(seed)
    observed = abs(difference.sum())
    extreme = 0
    for block in np.array_split(np.arange(PERMUTATIONS), 10):
        signs = rng.integers(0, 2, (len(block), len(difference))) * 2 - 1
        extreme += int((np.abs(signs @ difference) >= observed - 1e-9).sum())
    return (1 + extreme) / (1 + PERMUTATIONS)


def chain_table(rows: Mapping[str, Mapping[str, Any]], *, length: int = 5, paper: str | None = None) -> str:
    """Markdown in the form of Table 1: a row for each {label: chain_stats}.

    For sequences of five sub-tasks the paper's row follows, under the label `paper`.
    """
    columns = [str(k) for k in range(1, length + 1)]
    lines = ["| | " + " | ".join(columns) + " | Avg. Len. |", "|---|" + "---|" * (length + 1)]
    for label, stats in rows.items():
        rates = [f"{100 * stats['chain_sr'][k]:.1f} {_interval(stats['chain_sr_ci95'][k], 100, 0)}" for k in columns]
        mean = f"**{stats['avg_len']:.2f}** {_interval(stats['avg_len_ci95'], 1, 2)}"
        lines.append(f"| {label} | " + " | ".join(rates) + f" | {mean} |")
    if paper and length == len(PAPER_CHAIN_SR):
        lines.append(
            f"| {paper} | "
            + " | ".join(f"{100 * PAPER_CHAIN_SR[k]:.1f}" for k in columns)
            + f" | {PAPER_AVG_LEN:.2f} |"
        )
    return "\n".join(lines)


def paper_label(world: str) -> str:
    """The label of the paper's row in a table of results of `world`."""
    return "DeFI, paper, CALVIN ABC→D" + ("" if is_calvin(world) else f" (another world than {world})")


def task_table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: the success of each sub-task that was reached."""
    lines = ["| task | success | rate, 95 % |", "|---|---|---|"]
    for task, count in tasks.items():
        lines.append(
            f"| {task} | {count['success']}/{count['total']} | {100 * count['rate']:.0f} % "
            f"{_interval(count['ci95'], 100, 0)} |"
        )
    return "\n".join(lines)


def _interval(bounds: list[float], scale: float, digits: int) -> str:
    return f"[{scale * bounds[0]:.{digits}f}, {scale * bounds[1]:.{digits}f}]"
