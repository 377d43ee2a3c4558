"""Rows over seeds: differences are paired by seed, with the interval of Student's t."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from step3_defi import seeds


def run(runs: Path, row: str, seed: int, loss: float, step: int = 600) -> None:
    lines = [
        {"step": 300, "val/action_loss": 9.0},
        {"step": step, "train/loss": 0.1},
        {"step": step, "val/action_loss": loss, "val/swap_latent": 0.2},
    ]
    folder = runs / row / str(seed)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    for seed, loss in enumerate([0.10, 0.20, 0.40]):  # seeds differ far more than rows
        run(tmp_path, "base", seed, loss)
        run(tmp_path, "row", seed, loss * (1.10 + 0.01 * seed))
    run(tmp_path, "row", 7, 5.0)  # a seed that the base lacks
    result, table = seeds.compare(seeds.read_runs(tmp_path), "base", ["action_loss", "swap_latent"])
    mean, low, high = result["row"]["against_base_percent"]
    assert (
        mean == pytest.approx(11.0)
        and low == pytest.approx(11 - 4.303 / 3**0.5, abs=1e-3)
        and high == pytest.approx(22 - low)
    )
    assert result["base"]["against_base_percent"] is None
    assert table.splitlines()[2].startswith("| base | 3 | 0.2333 +- 0.1528 | 0.2000 +- 0.0000 |")


def test_one_seed_has_no_interval() -> None:
    mean, low, high = seeds.interval(np.array([3.0]))
    assert mean == 3.0 and np.isnan([low, high]).all()


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    run(tmp_path, "base", 0, 0.1)
    with pytest.raises(ValueError, match="base=other is none of the rows: base"):
        seeds.compare(seeds.read_runs(tmp_path), "other", ["action_loss"])
    run(tmp_path, "row", 0, 0.1, step=700)
    with pytest.raises(ValueError, match=r"end at steps \[600, 700\]"):
        seeds.read_runs(tmp_path)
    (tmp_path / "row" / "0" / "metrics.jsonl").write_text(json.dumps({"step": 5, "train/loss": 1.0}) + "\n")
    with pytest.raises(ValueError, match="holds no validation"):
        seeds.read_runs(tmp_path)
