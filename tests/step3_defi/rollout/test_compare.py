"""Comparing two rollouts by their folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from common.program import CONFIGS
from step3_defi.compare import compare_folders, write
from step3_defi.rollout.journal import FORMAT, SETTINGS_FILE, JournalError


def folder(path: Path, lengths: list[int], horizon: int = 360) -> Path:
    path.mkdir()
    settings = {"format": FORMAT, "world": "playtable-D", "horizon": horizon, "length": 5}
    (path / SETTINGS_FILE).write_text(json.dumps(settings))
    lines = [
        {
            "index": i,
            "initial_state": {},
            "tasks": list("abcde"),
            "steps_to_success": [9] * n + [None] * (n < 5),
            "clipped": 0,
            "seed": 0,
        }
        for i, n in enumerate(lengths)
    ]
    (path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_compare_two_folders(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", [5, 4, 3, 4, 5, 3] * 5, 720), folder(tmp_path / "b", [3, 3, 2, 3, 3, 3] * 6)
    result, table = compare_folders(a, b)
    assert set(result["horizons"]) == {"280", "360"}  # b was never given 720 steps
    row = result["horizons"]["360"]
    assert row["sequences"] == 30 and row["difference"] == pytest.approx(7 / 6) and row["p_value"] < 0.001
    assert "| 360 | 30 | +1.17 | [+" in table
    assert result["tasks_horizon"] == 360 and result["tasks"]["a"]["pairs"] == 30
    # b never gets past its third task; both reach the fourth in 25 of 30 pairs, where a fails in 5
    assert "| d | 25 | 80 % | 0 % | +80 | [+64, +96] | 0.0001 |" in table
    write(tmp_path / "out", result, table)
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == result


def test_different_sequences_are_refused(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", [5, 4]), folder(tmp_path / "b", [5, 4])
    text = (b / "rollouts.jsonl").read_text().replace('"e"]', '"x"]')
    (b / "rollouts.jsonl").write_text(text)
    with pytest.raises(JournalError, match="sequence 0 differs"):
        compare_folders(a, b)
    with pytest.raises(JournalError, match="there is no journal"):
        compare_folders(a, tmp_path)


def test_a_folder_of_an_older_version_is_refused(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", [5, 4]), folder(tmp_path / "b", [5, 4])
    (b / SETTINGS_FILE).write_text(json.dumps({"world": "playtable-D", "horizon": 360, "length": 5}))
    said = r"b holds rollouts of another version of this program \(format None"
    with pytest.raises(JournalError, match=said) as caught:
        compare_folders(a, b)
    assert "\n" not in str(caught.value)


def test_config_composes() -> None:
    with initialize_config_dir(CONFIGS, version_base=None):
        assert compose("step3_compare", ["a=x", "b=y"]).out == "outputs/compare"
