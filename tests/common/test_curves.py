"""Curves of a run: an incomplete last line is left out, a broken file is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.curves import draw_curves, read_metrics, save_curves, smooth
from common.figures import pyplot

PANELS = {"error": "mse|copy_mse", "usage": r"usage(_\d+)?", "gap": "gap"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [
        {
            "step": i,
            "time": 0.0,
            "train/mse": 1 / i,
            "train/copy_mse": 2.0,
            "train/usage": 0.0,
            "train/usage_1": i / 50,
            "lr": 1e-4,
        }
        for i in range(1, 41)
    ]
    lines = [json.dumps(row) for row in [*rows, {"step": 40, "time": 1.0, "val/mse": 0.1, "val/usage_1": 0.5}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "tr')
    return tmp_path


def test_an_incomplete_last_line_is_left_out(run: Path) -> None:
    series = read_metrics(run / "metrics.jsonl")
    assert series["val/mse"] == ([40], [0.1]) and series["lr"][0] == list(range(1, 41)) and "time" not in series


def test_panels_show_the_keys_that_match_their_patterns(run: Path) -> None:
    figure = draw_curves(run, PANELS)
    error, usage = figure.axes
    assert error.get_title() == "error" and error.get_yscale() == "log" and usage.get_yscale() == "linear", (
        "a panel that nothing was logged for is left out"
    )
    assert {text.get_text() for text in error.get_legend().get_texts()} == {
        "train/mse (mean)",
        "train/copy_mse (mean)",
        "val/mse",
    }
    assert {text.get_text() for text in usage.get_legend().get_texts()} == {
        "train/usage (mean)",
        "train/usage_1 (mean)",
        "val/usage_1",
    }
    assert error.lines[1].get_ydata()[-1] == pytest.approx((1 / 39 + 1 / 40) / 2)
    pyplot.close(figure)
    with pytest.raises(ValueError, match="metrics.jsonl has none of gap; it has train/mse, "):
        draw_curves(run, {"gap": "gap"})


def test_what_cannot_be_drawn_is_one_line_and_no_file(run: Path) -> None:
    out = run / "curves.png"
    assert save_curves(run / "nowhere", PANELS, out) == [
        f"No curves of the training: {run}/nowhere/metrics.jsonl does not exist; a training writes it."
    ]
    for line in ("{nonsense", '{"train/mse": 1.0}', "[1, 2]"):
        (run / "broken").mkdir(exist_ok=True)
        (run / "broken/metrics.jsonl").write_text(f'{{"step": 1, "train/mse": 1.0}}\n{line}\n')
        (said,) = save_curves(run / "broken", PANELS, out)
        assert "metrics.jsonl: line 2 is no row of metrics" in said and "\n" not in said
    assert not out.exists()
    assert save_curves(run, PANELS, out) == [] and out.stat().st_size > 1000


def test_smooth_is_a_running_mean() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], share=0.5).tolist() == [1.0, 2.0, 4.0, 6.0]
