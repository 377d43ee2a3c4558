"""Numbers of a journal, with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from step3_defi.rollout import stats
from step3_defi.rollout.journal import JournalError, Record

TASKS = ["a", "b", "c", "d", "e"]


def record(index: int, *steps: int | None) -> Record:
    return Record(
        index=index, initial_state={"led": index % 2}, tasks=TASKS, steps_to_success=list(steps), clipped=0, seed=0
    )


RECORDS = [record(0, 30, 250, 300, 500, 30), record(1, 30, None), record(2, 300, 300, 300, 300, 300), record(3, None)]


@pytest.mark.parametrize("horizon,lengths", [(280, [2, 1, 0, 0]), (360, [3, 1, 5, 0]), (720, [5, 1, 5, 0])])
def test_one_journal_serves_all_horizons(horizon: int, lengths: list[int]) -> None:
    assert stats.chain_lengths(RECORDS, horizon).tolist() == lengths
    row = stats.chain_stats(RECORDS, horizon)
    assert row["avg_len"] == pytest.approx(np.mean(lengths)) == pytest.approx(sum(row["chain_sr"].values()))
    assert row["chain_sr"]["1"] == np.mean(np.array(lengths) >= 1)
    assert list(row["chain_sr"]) == ["1", "2", "3", "4", "5"]


def test_success_exactly_at_the_horizon_counts() -> None:
    assert stats.chain_length(record(0, 360, 361), 360) == 1


def test_tasks_count_only_where_they_were_reached() -> None:
    tasks = stats.task_stats(RECORDS, 280)
    assert {t: (c["success"], c["total"]) for t, c in tasks.items()} == {"a": (2, 4), "b": (1, 2), "c": (0, 1)}
    assert {t: (c["success"], c["total"]) for t, c in stats.task_stats(RECORDS, 720).items()}["e"] == (2, 2)


def test_reported_horizons() -> None:
    assert stats.reported_horizons(720) == [280, 360, 720]
    assert stats.reported_horizons(360) == [280, 360]
    assert stats.reported_horizons(100) == [100]


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        lengths = rng.integers(0, 6, 100)
        row = stats.chain_stats([record(i, *[10] * n, *[None] * int(n < 5)) for i, n in enumerate(lengths)], 360)
        low, high = row["avg_len_ci95"]
        assert low < row["avg_len"] < high and 0.4 < high - low < 1.0
        hits += low <= 2.5 <= high
    assert 33 <= hits <= 40


def test_wilson_at_rates_of_zero_and_one() -> None:
    assert stats.wilson(10, 10) == pytest.approx([0.7225, 1.0], abs=1e-3)
    assert stats.wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-3)
    assert stats.wilson(50, 100) == pytest.approx([0.4038, 0.5962], abs=1e-3)


def paired(shift: float, count: int = 60) -> dict:
    rng = np.random.default_rng(1)
    a, b = {}, {}
    for i in range(count):
        base = int(rng.integers(1, 4))
        a[i] = record(i, *[10] * (base + int(rng.random() < shift)), None)
        b[i] = record(i, *[10] * base, None)
    return stats.compare(a, b, 360)


def test_paired_comparison_finds_small_differences() -> None:
    found = paired(0.4)
    assert 0.2 < found["difference"] < 0.6 and found["difference_ci95"][0] > 0 and found["p_value"] < 0.001
    assert found["difference"] == pytest.approx(found["avg_len_a"] - found["avg_len_b"])
    same = paired(0.0)
    assert same["difference"] == 0 and same["p_value"] == 1


def test_tasks_are_compared_where_both_reached_them() -> None:
    a = {0: record(0, 10, 10, None), 1: record(1, 10, None), 2: record(2, None)}
    b = {0: record(0, 10, None), 1: record(1, 10, 300, None), 2: record(2, 10, 10, 10, 10, 10), 3: record(3, None)}
    found = stats.compare_tasks(a, b, 360)
    assert {task: (row["pairs"], row["rate_a"], row["rate_b"]) for task, row in found.items()} == {
        "a": (3, 2 / 3, 1.0),
        "b": (2, 0.5, 0.5),
    }
    assert (
        found["a"]["difference"] == pytest.approx(-1 / 3)
        and found["b"]["difference_ci95"] == [-1, 1]
        and found["b"]["p_value"] == 1
    )
    assert stats.compare_tasks(a, b, 280)["b"]["rate_b"] == 0, "300 steps are too many"
    sure = stats.compare_tasks(
        {i: record(i, 10, None) for i in range(20)}, {i: record(i, None) for i in range(20)}, 360
    )
    assert sure["a"]["difference"] == 1 and sure["a"]["p_value"] < 0.001 and set(sure) == {"a"}


def test_permutation_agrees_with_all_sign_flips() -> None:
    difference = np.array([1.0, 1, 1, 1, 1])  # 2 of the 32 sign patterns are as extreme
    assert stats.permutation_p(difference) == pytest.approx(2 / 32, abs=0.01)


def test_only_equal_sequences_are_compared() -> None:
    with pytest.raises(JournalError, match="share no sequence"):
        stats.compare({0: record(0, None)}, {1: record(1, None)}, 360)
    other = {**record(0, None), "tasks": list(reversed(TASKS))}
    with pytest.raises(JournalError, match="sequence 0 differs"):
        stats.compare({0: record(0, None)}, {0: other}, 360)


def test_the_table_has_the_papers_row() -> None:
    table = stats.chain_table({"mine": stats.chain_stats(RECORDS, 360)}, paper=stats.paper_label("playtable-D"))
    assert (
        "| DeFI, paper, CALVIN ABC→D (another world than playtable-D) | 97.9 | 94.2 | 90.7 | 87.0 | 81.2 | 4.51 |"
        in table
    )
    assert "| mine | 75.0 [" in table and "**2.25** [" in table
    assert "another" not in stats.paper_label("calvin-D")
    assert sum(stats.PAPER_CHAIN_SR.values()) == pytest.approx(stats.PAPER_AVG_LEN, abs=0.005)
    single = stats.chain_table({"mine": stats.chain_stats(RECORDS, 360, length=1)}, length=1, paper="paper")
    assert "4.51" not in single and single.startswith("| | 1 | Avg. Len. |")
