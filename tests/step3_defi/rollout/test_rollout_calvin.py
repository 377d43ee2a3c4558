"""env=calvin in the rollout program, with the stand-in for calvin_env: what results say of the world, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.program import CONFIGS
from step3_defi import eval as program
from step3_defi.rollout import journal, stats

FAKE = Path(__file__).resolve().parents[2] / "envs" / "calvin" / "fake_calvin"


def configured() -> dict[str, Any]:
    with initialize_config_dir(version_base=None, config_dir=CONFIGS):
        return OmegaConf.to_container(compose("step3_eval", overrides=["env=calvin", "policy=random"]).env)


def run(out: Path, sequences: int = 2, tasks: list[str] | None = None) -> dict[str, Any]:
    return program.evaluate(
        env_config=configured(),
        policy="random",
        planner=OmegaConf.create(),
        tasks=tasks,
        sequences=sequences,
        length=5,
        horizon=9,
        workers=1,
        seed=0,
        out=out,
        films={"candidates": 0, "keep": 0, "every": 2},
    )


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FAKE))  # simulators get this process's path


def test_results_name_world_renderer_and_reference_frame(tmp_path: Path) -> None:
    results = run(tmp_path / "out")
    assert results["world"] == "calvin-D" and stats.is_calvin(results["world"])
    assert results["renderer"] == "pybullet TinyRenderer (CPU)"
    assert results["versions"]["simulator"].startswith("calvin_env 0123456789ab, pybullet 9.9.9")
    assert len(results["versions"]["reference_frame"]) == 16
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert "not comparable" not in (tmp_path / "out" / "table.md").read_text()


def test_a_part_of_the_tasks_is_not_calvins_benchmark(tmp_path: Path) -> None:
    run(
        tmp_path,
        tasks=["open_drawer", "close_drawer", "turn_on_led", "turn_off_led", "move_slider_left", "move_slider_right"],
    )
    assert "not comparable with the paper" in (tmp_path / "table.md").read_text()


def test_rollouts_of_another_renderer_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    monkeypatch.setenv("FAKE_EGL", "NVIDIA H100")
    with pytest.raises(journal.JournalError, match="versions"):
        run(tmp_path)
