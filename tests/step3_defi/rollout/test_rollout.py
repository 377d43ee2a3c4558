"""Rollouts in processes: protocol, batches, pictures for plans only, and simulators that fail."""

from __future__ import annotations

import dataclasses
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from step3_defi.action_chunk import RolloutKey
from step3_defi.policy import DeFIPolicy
from step3_defi.rollout.journal import Claims
from step3_defi.rollout.messages import Chain, ChainFailure, PlanRequest, SequencesRequest
from step3_defi.rollout.simulators import RolloutError, SimulatorPool, plan_batch
from tests.step3_defi.parts import SENTENCES, build, wake
from tests.step3_defi.rollout.rollout_fakes import NoisyPolicy, RowPolicy, SteadyPolicy, make_tasks

CHAINS = [[30, 250, 300, 500, 30], [30, 999, 30, 30, 30], [300, 300, 300, 300, 300]]
REQUEST = PlanRequest({}, "go", RolloutKey(0, 0, 0, 0))


def config(**arguments: Any) -> dict[str, Any]:
    return {"_target_": "tests.step3_defi.rollout.rollout_fakes.FakeEnv", "chains": CHAINS, **arguments}


def chains(controller: str = "policy", horizon: int = 720, count: int = 3, slots: int = 1, **more: Any) -> list[Chain]:
    return [
        Chain(i, {"index": i}, make_tasks(CHAINS[i % 3]), controller, horizon, seed=5, slot=i % slots, **more)
        for i in range(count)
    ]


def run(
    work: list[Chain],
    policy: Any = None,
    *,
    workers: int = 1,
    response_timeout: float = 60,
    claim: Any = None,
    **arguments: Any,
) -> dict[int, Any]:
    with SimulatorPool(config(**arguments), count=workers, response_timeout=response_timeout) as simulators:
        return {result.index: result for result in simulators.rollout(work, policy, claim)}


def notes(log: Path) -> list[str]:
    return [line for file in log.parent.glob(log.name + ".*") for line in file.read_text().splitlines()]


def test_steps_to_success_end_at_the_first_failure() -> None:
    results = run(chains(), SteadyPolicy())
    assert [results[i].steps_to_success for i in range(3)] == [[30, 250, 300, 500, 30], [30, None], [300] * 5]


def test_a_shorter_horizon_ends_chains_earlier() -> None:
    results = run(chains(horizon=280), SteadyPolicy())
    assert [results[i].steps_to_success for i in range(3)] == [[30, 250, None], [30, None], [None]]


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
    assert expert[0].steps_to_success == [30, 250, 300, 500, 30]
    first, second = (run(chains("random", horizon=40), workers=n) for n in (1, 2))
    assert {i: r.steps_to_success for i, r in first.items()} == {i: r.steps_to_success for i, r in second.items()}
    assert "render" not in notes(tmp_path / "env")


def test_two_workers_get_what_one_gets() -> None:
    one, two = (run(chains(count=5, slots=n), NoisyPolicy(), workers=n) for n in (1, 2))
    assert one == two
    assert len({tuple(r.steps_to_success) for r in one.values()}) > 3  # the noise does something


def test_processes_share_work_as_they_get_free_and_come_to_the_same(tmp_path: Path) -> None:
    """Two processes claim from one folder, one of them with a slow simulator."""
    work, claims = chains(count=12, slots=2, horizon=60), Claims(tmp_path)
    straight = run(work, RowPolicy(), workers=2)
    with ThreadPoolExecutor() as pool:
        slow, fast = pool.map(
            lambda pace: run(work, RowPolicy(), workers=2, pace=pace, claim=claims.acquire), (0.02, 0.0)
        )
    assert not slow.keys() & fast.keys() and {**slow, **fast} == straight
    assert 1 <= len(slow) < len(fast)


def test_all_batches_have_one_size() -> None:
    policy = SteadyPolicy()
    run(chains(count=4, slots=3), policy, workers=3)
    assert {len(batch) for batch in policy.batches} == {3}
    assert any(len(set(batch)) == 3 for batch in policy.batches)


def test_a_chain_is_always_planned_in_its_slot() -> None:
    policy = SteadyPolicy()
    # slot 1 holds all the work but for one chain, so that chains of one slot meet
    work = [dataclasses.replace(chain, slot=int(chain.index > 0)) for chain in chains(count=5)]
    results = run(work, policy, workers=2)
    assert sorted(results) == list(range(5)) and {len(batch) for batch in policy.batches} == {2}
    asked = [(row, key[1]) for batch in policy.batches for row, key in enumerate(batch) if len(set(batch)) == 2]
    assert asked and all(row == int(index > 0) for row, index in asked)
    keys = [key for batch in policy.batches for key in batch]
    plans = {index: sum(-(-(s or 720) // 10) for s in results[index].steps_to_success) for index in results}
    assert {i: len({key for key in keys if key[1] == i}) for i in plans} == plans


def test_films_hold_every_second_frame_with_a_caption() -> None:
    film = run(chains(horizon=280, count=1, film_every=2), SteadyPolicy())[0].film
    assert len(film) > (30 + 250 + 280) / 2
    assert film[0].shape == (228, 200, 3)
    assert film[0][200:].max() > 100 and run(chains(horizon=280, count=1), SteadyPolicy())[0].film is None


def test_get_sequences() -> None:
    with SimulatorPool(config(scene="A"), count=2) as simulators:
        answer = simulators.get_sequences(SequencesRequest(4, None, 2, 9))
    assert answer.world == "fake-A" and simulators.versions["simulator"] == "fake 1"
    assert answer.sequences[3] == ({"index": 3, "seed": 9}, make_tasks([30, 250]))


@pytest.mark.parametrize("controller", ["policy", "random"])
def test_sequences_of_simulators_that_fail_once_are_tried_again_and_come_to_the_same(
    controller: str, tmp_path: Path
) -> None:
    """Simulators are killed, hang and raise in the middle of a sub-task, while others wait for their plans."""
    work, policy = chains(controller, count=9, slots=3, horizon=400), NoisyPolicy()
    straight = run(work, policy, workers=3)
    trouble = [(0, "kill", 1), (2, "kill", 1), (4, "hang", 1), (5, "raise", 1), (8, "kill", 1)]
    assert run(work, policy, workers=3, response_timeout=4, trouble=trouble, trials=str(tmp_path)) == straight
    assert sorted(int(mark.name) for mark in tmp_path.iterdir()) == [0, 2, 4, 5, 8], "every trouble came"


@pytest.mark.parametrize(
    "kind, why",
    [
        ("kill", r"the process died \(exit code -9\)"),
        ("hang", "no sign of life for 2 s; raise response_timeout= if it is slow"),
        ("raise", r"ValueError: block fell off the table \(_fail, line \d+\)"),
    ],
)
def test_a_sequence_whose_simulator_fails_twice_is_reported_as_failed(
    kind: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = run(
        chains(count=4, slots=2),
        SteadyPolicy(),
        workers=2,
        response_timeout=2,
        trouble=[(1, kind, 9)],
        trials=str(tmp_path),
    )
    assert sorted(results) == [0, 1, 2, 3] and [
        index for index in results if isinstance(results[index], ChainFailure)
    ] == [1]
    assert re.fullmatch(r"simulator \d, sequence 1 \(task0_30.*\): " + why, results[1].reason)
    assert (tmp_path / "1").read_text() == "xx", "tried once more, not twice"
    assert (
        "trying the sequence again" in caplog.messages[0]
        and "going on without" in caplog.messages[1]
        and len(caplog.messages) == 2
    )


def test_simulators_that_never_work_end_the_run(tmp_path: Path) -> None:
    trouble = [(index, "raise", 9) for index in range(9)]
    with pytest.raises(
        RolloutError,
        match="3 sequences in a row failed 2 times each, the last with: simulator 0, sequence 2 .*block fell",
    ):
        run(chains(count=9), SteadyPolicy(), trouble=trouble, trials=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def test_silence_is_measured_between_signs_of_life_and_not_over_a_chain() -> None:
    """The expert sends no plan requests: its chain of 1110 steps takes longer than the timeout."""
    work = chains("expert", count=1)
    began = time.monotonic()
    assert run(work, response_timeout=1.5, pace=0.002)[0].steps_to_success == [30, 250, 300, 500, 30]
    assert time.monotonic() - began > 2


def test_actions_out_of_range_are_clipped_and_counted() -> None:
    fast, slow = SteadyPolicy(), SteadyPolicy()
    fast.predict_action_chunk = lambda observations, instructions, rollout_keys: (
        np.where(np.arange(10) % 5, 1.0, 1.5)[None, :, None] * np.ones((len(observations), 10, 7))
    )
    one, other = (run(chains(count=1), policy)[0] for policy in (fast, slow))
    assert one.steps_to_success == other.steps_to_success, "1.5 carries no further than 1"
    assert one.clipped == 1110 / 5 and other.clipped == 0


def test_a_simulator_that_dies_before_it_answers_is_replaced() -> None:
    with SimulatorPool(config(), count=1) as simulators:
        simulators.workers[0].process.kill()
        assert simulators.get_sequences(SequencesRequest(1, None, 5, 0)).world == "fake-D"


def test_a_simulator_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(RolloutError, match="no GL: install"),
        SimulatorPool(config(refuse="no GL: install libosmesa6"), count=1),
    ):
        pass


def test_all_simulators_render_with_what_the_first_chooses(tmp_path: Path) -> None:
    """Also one that replaces a dead one. Without this, each later one would choose the CPU."""
    (tmp_path / "starts").mkdir()
    trouble = {"trouble": [(1, "kill", 1)], "trials": str(tmp_path)}
    with SimulatorPool(config(renderer="auto", starts=str(tmp_path / "starts"), **trouble), count=3) as simulators:
        assert len(list(simulators.rollout(chains(count=4, slots=3), SteadyPolicy()))) == 4
    assert simulators.versions["renderer"] == "egl" and len(list((tmp_path / "starts").iterdir())) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_a_simulator_that_renders_differently_ends_the_run(workers: int, tmp_path: Path) -> None:
    """The second simulator does or, where there is only one, the simulator that replaces it."""
    (tmp_path / "starts").mkdir()
    trouble = {"trouble": [(0, "kill", workers % 2)], "trials": str(tmp_path)}
    with pytest.raises(
        RolloutError,
        match=r"reference_frame is 0 in the first simulator, 1 in simulator \d; choose the renderer by hand",
    ) as caught:
        run(
            chains(count=4, slots=workers),
            SteadyPolicy(),
            workers=workers,
            starts=str(tmp_path / "starts"),
            drifts=True,
            **trouble,
        )
    assert "\n" not in str(caught.value)


def test_processes_end_with_their_context() -> None:
    with SimulatorPool(config(), count=2) as simulators:
        simulators.get_sequences(SequencesRequest(1, None, 5, 0))
    assert [worker.process.poll() for worker in simulators.workers] == [0, 0]


@pytest.mark.parametrize("shape", [(2, 10, 6), (2, 9, 7), (1, 10, 7), (2, 7)])
def test_wrong_action_shapes_are_refused(shape: tuple[int, ...]) -> None:
    policy = SteadyPolicy(execute=10)
    policy.predict_action_chunk = lambda observations, instructions, rollout_keys: np.zeros(shape)
    with pytest.raises(RolloutError, match=r"shape .* needed are \(2, at least 10, 7\)"):
        plan_batch(policy, {0: REQUEST}, size=2)


def test_actions_that_are_not_finite_are_refused() -> None:
    policy = SteadyPolicy()
    policy.predict_action_chunk = lambda observations, instructions, rollout_keys: np.full((1, 10, 7), np.nan)
    with pytest.raises(RolloutError, match="not finite, for 'go'"):
        plan_batch(policy, {0: REQUEST}, size=1)


def test_a_plan_of_the_real_policy_depends_on_its_key_and_not_on_its_neighbours() -> None:
    model = build()
    wake(model)
    policy = DeFIPolicy(model)

    def request(picture: int, number: int) -> PlanRequest:
        rng = np.random.default_rng(picture)
        pictures = {
            "rgb_static": rng.integers(0, 255, (200, 200, 3), np.uint8),
            "rgb_gripper": rng.integers(0, 255, (84, 84, 3), np.uint8),
        }
        observation = {"rgb_obs": pictures, "robot_obs": np.zeros(15)}
        return PlanRequest(observation, SENTENCES[0], RolloutKey(0, 7, 0, number))

    single = plan_batch(policy, {2: request(0, 3)}, size=3)[2]
    together = plan_batch(policy, {0: request(1, 5), 1: request(2, 3), 2: request(0, 3)}, size=3)[2]
    assert np.array_equal(single, together)  # bit for bit, so that a resumed run repeats
    assert not np.allclose(single, plan_batch(policy, {2: request(0, 4)}, size=3)[2])
