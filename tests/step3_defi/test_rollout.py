"""Rollouts in processes: protocol, batching, pictures only where they are looked at, and what happens when things break."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollout_fakes import NoisyPolicy, SteadyPolicy, make_tasks

from step3_defi.rollout import RolloutError, Simulators, plan
from step3_defi.worker import Chain, Survey

CHAINS = [[30, 250, 300, 500, 30], [30, 999, 30, 30, 30], [300, 300, 300, 300, 300]]


def config(**arguments: Any) -> dict[str, Any]:
    return {"_target_": "rollout_fakes.FakeEnv", "chains": CHAINS, **arguments}


def chains(agent: str = "policy", horizon: int = 720, count: int = 3, **more: Any) -> list[Chain]:
    return [Chain(i, {"index": i}, make_tasks(CHAINS[i % 3]), agent, horizon, seed=5, **more) for i in range(count)]


def run(work: list[Chain], policy: Any = None, *, workers: int = 1, **arguments: Any) -> dict[int, Any]:
    with Simulators(config(**arguments), count=workers) as simulators:
        return {r["index"]: r for r in simulators.rollout(work, policy)}


def notes(log: Path) -> list[str]:
    return [line for file in log.parent.glob(log.name + ".*") for line in file.read_text().splitlines()]


def test_steps_to_success_end_at_the_first_failure() -> None:
    results = run(chains(), SteadyPolicy())
    assert [results[i]["steps_to_success"] for i in range(3)] == [[30, 250, 300, 500, 30], [30, None], [300] * 5]


def test_a_shorter_horizon_ends_chains_earlier() -> None:
    results = run(chains(horizon=280), SteadyPolicy())
    assert [results[i]["steps_to_success"] for i in range(3)] == [[30, 250, None], [30, None], [None]]


def test_pictures_are_rendered_for_plans_only(tmp_path: Path) -> None:
    policy = SteadyPolicy(execute=10)
    run(chains(count=1), policy, log=str(tmp_path / "env"))
    assert notes(tmp_path / "env").count("render") == sum(map(len, policy.batches)) == 3 + 25 + 30 + 50 + 3


def test_a_new_subtask_gets_a_new_plan() -> None:
    policy = SteadyPolicy(execute=8)
    run(chains(count=1), policy)
    keys = [key for batch in policy.batches for key in batch]
    # 30 steps are four plans of 8; the fifth belongs to the next sub-task and counts from zero
    assert keys[:5] == [(5, 0, 0, 0), (5, 0, 0, 1), (5, 0, 0, 2), (5, 0, 0, 3), (5, 0, 1, 0)]


def test_expert_and_random_need_no_pictures(tmp_path: Path) -> None:
    expert = run(chains("expert"), log=str(tmp_path / "env"))
    assert expert[0]["steps_to_success"] == [30, 250, 300, 500, 30]
    first, second = (run(chains("random", horizon=40), workers=n) for n in (1, 2))
    assert {i: r["steps_to_success"] for i, r in first.items()} == {i: r["steps_to_success"] for i, r in second.items()}
    assert "render" not in notes(tmp_path / "env")


def test_two_workers_get_what_one_gets() -> None:
    one, two = (run(chains(count=5), NoisyPolicy(), workers=n) for n in (1, 2))
    assert one == two
    assert len({tuple(r["steps_to_success"]) for r in one.values()}) > 3  # the noise does something


def test_all_batches_have_one_size() -> None:
    policy = SteadyPolicy()
    run(chains(count=4), policy, workers=3)
    assert {len(batch) for batch in policy.batches} == {3}
    assert any(len(set(batch)) == 3 for batch in policy.batches)


def test_films_hold_every_second_frame_with_a_caption() -> None:
    film = run(chains(horizon=280, count=1, film_every=2), SteadyPolicy())[0]["film"]
    assert len(film) > (30 + 250 + 280) / 2
    assert film[0].shape == (228, 200, 3)
    assert film[0][200:].max() > 100 and run(chains(horizon=280, count=1), SteadyPolicy())[0]["film"] is None


def test_survey() -> None:
    with Simulators(config(scene="A"), count=2) as simulators:
        survey = simulators.survey(Survey(4, None, 2, 9))
    assert survey["world"] == "fake-A" and survey["versions"]["simulator"] == "fake 1"
    assert survey["sequences"][3] == ({"index": 3, "seed": 9}, make_tasks([30, 250]))


def test_a_dead_simulator_names_its_sequence() -> None:
    with pytest.raises(RolloutError, match=r"sequence 1 \(task0_30.*exit code 7.*the same command goes on"):
        run(chains(), SteadyPolicy(), workers=2, die_in=1)


def test_an_error_in_a_simulator_is_one_line() -> None:
    with pytest.raises(RolloutError, match=r"^simulator \d, sequence 2 .*ValueError: block fell off the table") as caught:
        run(chains(), SteadyPolicy(), workers=2, raise_in=2)
    assert "\n" not in str(caught.value)


def test_a_simulator_that_does_not_start_says_why() -> None:
    with Simulators(config(refuse="no GL: install libosmesa6"), count=1) as simulators, pytest.raises(RolloutError, match="no GL: install"):
        simulators.survey(Survey(1, None, 5, 0))


def test_processes_end_with_their_context() -> None:
    with Simulators(config(), count=2) as simulators:
        simulators.survey(Survey(1, None, 5, 0))
    assert [worker.process.poll() for worker in simulators.workers] == [0, 0]


@pytest.mark.parametrize("shape", [(2, 10, 6), (2, 9, 7), (1, 10, 7), (2, 7)])
def test_wrong_action_shapes_are_refused(shape: tuple[int, ...]) -> None:
    policy = SteadyPolicy(execute=10)
    policy.plan = lambda observations, instructions: np.zeros(shape)
    with pytest.raises(RolloutError, match=r"shape .* needed are \(2, at least 10, 7\)"):
        plan(policy, [({}, "go")], size=2)


def test_actions_that_are_not_finite_are_refused() -> None:
    policy = SteadyPolicy()
    policy.plan = lambda observations, instructions: np.full((1, 10, 7), np.nan)
    with pytest.raises(RolloutError, match="not finite, for 'go'"):
        plan(policy, [({}, "go")], size=1)
