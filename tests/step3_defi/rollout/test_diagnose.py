"""Why sub-tasks fail: returning to moments, scores, verdicts, and the program in a world without physics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from common import artifact
from common.errors import UserError
from common.video import read_frames
from step3_defi.released.vpp import NullInverseDynamics
from step3_defi.rollout.diagnose import diagnose
from step3_defi.rollout.diagnosis import (
    FailureScorer,
    Subtask,
    action_metrics,
    assign_verdicts,
    check_criteria,
    count_verdicts,
    error_over_copy_db,
    table,
)
from step3_defi.rollout.messages import Branch, BranchResult
from step3_defi.rollout.replay import PlanRecorder, RecordedPlan, Replay, policy_continuation
from step3_defi.rollout.simulators import RolloutError, SimulatorPool
from tests.step3_defi.parts import configure
from tests.step3_defi.rollout import test_eval, test_rollout
from tests.step3_defi.rollout.rollout_fakes import InstructionDependentPolicy, NoisyPolicy, make_tasks

CHAINS = [[30, 60], [40, 999], [30, 250], [50, 50]]
SETTINGS = {
    "failures": 9,
    "plan_stride": 3,
    "max_step": 120,
    "continuation_steps": 30,
    "num_inference_steps": 1,
    "criteria": {"forecast": "forecast", "action": "action"},
    "quantile": 0.9,
    "workers": 2,
    "films": 1,
}


class WithoutInverse(InstructionDependentPolicy):
    """A policy without an inverse model, as VPP is."""

    def __init__(self, folder: str = "", **settings: Any):
        super().__init__(folder, **settings)
        self.model.gidm = NullInverseDynamics()


def branch(prefix_actions: int, **more: Any) -> Branch:
    return Branch(0, {"index": 0}, "task0_30", np.ones((prefix_actions, 7)), 30, 10, seed=0, **more)


def test_a_branch_returns_and_continues_with_the_expert_or_with_given_actions() -> None:
    asked = [branch(7), branch(50), branch(50, override_actions=np.full((30, 7), 2.0)), branch(0)]
    with SimulatorPool(test_rollout.config(), count=2) as simulators:
        found = dict(simulators.branch(asked))
    assert sorted(found) == [0, 1, 2, 3]
    levels = [[int(pictures["rgb_static"][0, 0, 0]) for pictures in found[i].frames] for i in range(4)]
    assert levels == [[7, 17, 27, 37], [50, 60, 70, 80], [50, 70, 90, 110], [0, 10, 20, 30]]
    assert (
        [found[i].start[0] for i in range(4)] == [7, 50, 50, 0]
        and found[2].actions[0, 0] == 2
        and found[1].actions.shape == (30, 7)
    )


def test_a_simulator_that_fails_on_the_way_back_names_the_moment(tmp_path: Path) -> None:
    trouble = {"trouble": [(0, "raise", 1)], "trials": str(tmp_path)}
    with (
        SimulatorPool(test_rollout.config(**trouble), count=1) as simulators,
        pytest.raises(RolloutError, match="sequence 0 .*returning to step 50.*block fell"),
    ):
        list(simulators.branch([branch(50)]))


def test_the_way_back_is_what_was_carried_out() -> None:
    """The pace differs between plans; the progress at a moment is the sum of the actions before it."""
    records = {
        0: {
            "index": 0,
            "initial_state": {"index": 0},
            "tasks": make_tasks([30, 250]),
            "steps_to_success": [],
            "seed": 5,
        }
    }
    recorder = PlanRecorder(NoisyPolicy(execute=8), plan_stride=2, max_step=30)
    replay = Replay(records, failures=1, horizon=100)
    with SimulatorPool(test_rollout.config(), count=1) as simulators:
        result = next(simulators.rollout(replay.chains(slots=1), recorder))
    assert replay.diverged([result]) == {0}
    replay.records[0]["steps_to_success"] = result.steps_to_success
    assert not replay.diverged([result]) and result.steps_to_success[-1] is None
    moments = replay.moments(0, recorder, continuation_steps=20, frame_stride=10)
    assert {key[1:] for key in moments} >= {(0, 0), (0, 2), (1, 0), (1, 2)} and (1, 4) not in {
        key[1:] for key in moments
    }
    for key, way in moments.items():
        assert way.prefix_actions[:, 0].sum() == pytest.approx(recorder.plans[key].observation["robot_obs"][0]), key
        assert way.task == records[0]["tasks"][key[1]]
    on = policy_continuation(moments[0, 1, 2], (0, 1, 2), recorder)
    assert np.array_equal(on.override_actions[:8], recorder.plans[0, 1, 2].actions) and on.override_actions.shape == (
        20,
        7,
    )
    assert recorder.plans[0, 1, 1].observation is None  # only the moments to score keep their pictures


def test_replay_stops_at_the_failures_that_were_asked_for() -> None:
    def record(index: int, *steps: int | None) -> dict[str, Any]:
        return {"index": index, "initial_state": {}, "tasks": ["a", "b"], "steps_to_success": list(steps), "seed": 0}

    records = {0: record(0, 5, 5), 1: record(1, None), 2: record(2, 5, None), 3: record(3, None)}
    replay = Replay(records, failures=2, horizon=9)
    assert list(replay.records) == [0, 1, 2] and [replay.num_solved(i) for i in range(3)] == [2, 0, 1]


def test_errors_are_zero_for_the_expert_and_grow_away_from_it() -> None:
    rng = np.random.default_rng(0)
    expert = rng.uniform(-1, 1, (30, 7))
    same, away = action_metrics(expert[:8], expert), action_metrics(-expert[:8], expert)
    assert same == {"action": 0.0, "direction": pytest.approx(1.0), "gripper": 0.0}
    assert away["direction"] == pytest.approx(-1.0) and away["gripper"] == 1.0
    assert away["action"] == pytest.approx(2 * np.sqrt(np.square(expert[:8, :6]).sum(1).mean()))
    now, truth = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    assert error_over_copy_db(now, truth, now) == 0 and error_over_copy_db(0.9 * truth, truth, now) == pytest.approx(
        -20, abs=1e-3
    )


def subtask(solved: bool, forecast: float, action: float, task: str = "open_drawer") -> Subtask:
    scores = {"forecast": forecast, "action": action, "forecast_tokens": 0.0, "direction": 1.0, "gripper": 0.0}
    return Subtask(0, 0, task, solved, [scores, scores])


def test_verdicts_compare_with_the_successes() -> None:
    good = [subtask(True, -i, 0.1 * i) for i in range(10)]
    bad = [
        subtask(False, 5, 0.2),
        subtask(False, -5, 3.0, "lift"),
        subtask(False, 5, 3.0),
        subtask(False, -5, 0.2),
        subtask(False, -5, 3.0),
    ]
    limits = assign_verdicts([*good, *bad], forecast="forecast", action="action", quantile=0.9)
    assert limits == {"forecast": pytest.approx(-0.9), "action": pytest.approx(0.81)}
    assert [s.verdict for s in bad] == ["forecast", "action", "both", "neither", "action"]
    assert {verdict: cell["count"] for verdict, cell in count_verdicts(bad).items()} == {
        "forecast": 1,
        "action": 2,
        "both": 1,
        "neither": 1,
    }
    text = table([*good, *bad])
    assert "| open_drawer | 4 | 1 | 1 | 1 | 1 |" in text and "| lift | 1 | 0 | 1 | 0 | 0 |" in text
    assert (
        "| **all failures** | 5 | 1 (20 % [4, 62]) | 2 (40 %" in text
        and "| successes, for comparison | 10 | 1 (10 %" in text
    )
    with pytest.raises(UserError, match="no sub-task .* succeeded"):
        assign_verdicts(bad, forecast="forecast", action="action", quantile=0.9)
    with pytest.raises(UserError, match="pixels.*forecast_tokens"):
        check_criteria(forecast="pixels", action="action", quantile=0.9)
    with pytest.raises(UserError, match="quantile=1"):
        check_criteria(forecast="forecast", action="action", quantile=1)


def test_a_forward_model_without_pictures_is_refused() -> None:
    model = InstructionDependentPolicy().model
    del model.forward_model.generate
    with pytest.raises(UserError, match="no pictures"):
        FailureScorer(model)


def test_a_vpp_policy_is_scored_by_pixels_and_actions(tree: Path) -> None:
    """The policy of the config, whose inverse model has no visual tokens."""
    model = instantiate(
        OmegaConf.to_container(configure("step3_defi", f"paths.ckpts={tree}/ckpts", "defi=vpp").policy, resolve=True)
    ).eval()
    assert isinstance(model.gidm, NullInverseDynamics)
    pictures = np.random.default_rng(0).integers(0, 255, (2, 200, 200, 3), np.uint8)
    plan = RecordedPlan(np.zeros((10, 7)), "open the drawer", {"rgb_obs": {"rgb_static": pictures[0]}})
    scores = FailureScorer(model).score(
        plan, BranchResult(np.zeros(39), [{"rgb_static": pictures[1]}], np.ones((30, 7)))
    )
    assert scores.keys() == {"forecast", "action", "direction", "gripper"} and np.isfinite(list(scores.values())).all()


@pytest.fixture
def rolled(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A policy's folder, and a rollout of it that fails twice: once it sees no future, once it acts backwards."""
    path = artifact.save(torch.nn.Linear(1, 1), tmp_path / "policy", kind="defi", config={})
    planner = OmegaConf.create(
        {
            "_target_": getattr(request, "param", "tests.step3_defi.rollout.rollout_fakes.InstructionDependentPolicy"),
            "execute": 8,
        }
    )
    test_eval.run(
        tmp_path / "run", str(path), env={"chains": CHAINS}, planner=planner, sequences=4, length=2, horizon=280
    )
    return tmp_path / "run", path


def test_the_program_tells_forecast_from_action(rolled: tuple[Path, Path], tmp_path: Path) -> None:
    run, path = rolled
    results = diagnose(run=run, path=path, out=tmp_path / "out", **SETTINGS)
    assert json.loads((tmp_path / "out/diagnosis.json").read_text()) == results and results["diverged"] == []
    found = {s["task"]: s for s in results["subtasks"]}
    assert {task: s["verdict"] for task, s in found.items() if not s["solved"]} == {
        "task1_999": "forecast",
        "task1_250": "action",
    }
    assert len(results["subtasks"]) == 8 and [m["plan"] for m in found["task1_999"]["moments"]] == [0, 3, 6, 9, 12]
    assert (
        found["task1_999"]["moments"][0]["forecast"] == pytest.approx(0, abs=1e-3)
        and found["task1_60"]["moments"][0]["forecast"] < -20
    )
    assert "| task1_250 | 1 | 0 | 1 | 0 | 0 |" in (tmp_path / "out/table.md").read_text()
    films = list((tmp_path / "out/films").iterdir())
    assert [film.name for film in films] == ["0001_2_task1_999_forecast.mp4"]
    assert read_frames(films[0]).shape == (5 * 4 * 2, 228, 600, 3)


@pytest.mark.parametrize("rolled", ["tests.step3_defi.rollout.test_diagnose.WithoutInverse"], indirect=True)
def test_the_program_scores_a_policy_without_inverse_model_by_pixels(rolled: tuple[Path, Path], tmp_path: Path) -> None:
    run, path = rolled
    with pytest.raises(
        UserError, match=r"criteria names \['forecast_tokens'\]: choose among \['forecast', 'action', 'gripper'\]"
    ):
        diagnose(
            run=run,
            path=path,
            out=tmp_path / "out",
            **{**SETTINGS, "criteria": {"forecast": "forecast_tokens", "action": "action"}},
        )
    results = diagnose(run=run, path=path, out=tmp_path / "out", **{**SETTINGS, "films": 0})
    assert {s["task"]: s["verdict"] for s in results["subtasks"] if not s["solved"]} == {
        "task1_999": "forecast",
        "task1_250": "action",
    }
    text = (tmp_path / "out/table.md").read_text()
    assert "squared error relative to copying" in text and "visual tokens" not in text


def test_the_program_refuses_what_does_not_belong_together(rolled: tuple[Path, Path], tmp_path: Path) -> None:
    run, path = rolled
    with pytest.raises(UserError, match="continuation_steps=31: must be a multiple of 3"):
        diagnose(run=run, path=path, out=tmp_path / "out", **{**SETTINGS, "continuation_steps": 31})
    text = (run / "rollouts.jsonl").read_text()
    (run / "rollouts.jsonl").write_text(text.replace("[40,null]", "[41,null]"))
    assert diagnose(run=run, path=path, out=tmp_path / "out", **{**SETTINGS, "films": 0})["diverged"] == [1]
    (run / "rollouts.jsonl").write_text(text.splitlines()[1].replace("[40,null]", "[41,null]") + "\n")
    with pytest.raises(UserError, match="none of 1 sequences ends as in the journal"):
        diagnose(run=run, path=path, out=tmp_path / "out", **SETTINGS)
    other = artifact.save(torch.nn.Linear(1, 1), tmp_path / "other", kind="defi", config={"width": 3})
    with pytest.raises(UserError, match="not of .*other"):
        diagnose(run=run, path=other, out=tmp_path / "out", **SETTINGS)
