"""The rollout program: its files, resuming, refusing, and several processes with one result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common import artifact
from common.errors import UserError
from common.program import CONFIGS
from envs import resolve_tasks
from step3_defi.eval import evaluate
from step3_defi.rollout import journal, stats
from step3_defi.rollout.journal import Journal, JournalError
from step3_defi.rollout.replay import Replay
from step3_defi.rollout.simulators import RolloutError, SimulatorPool
from tests.step3_defi.rollout.rollout_fakes import RowPolicy

CHAINS = [[30, 250, 300, 500, 30], [30, 999, 30, 30, 30], [300, 300, 300, 300, 300]]
FAKES = "tests.step3_defi.rollout.rollout_fakes"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def policy(tmp_path: Path) -> str:
    """A folder that has an identity; the fake planner does not read it."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps({"format": artifact.FORMAT, "kind": "defi"}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"width": 3}))
    return str(folder)


def run(out: Path, policy: str = "expert", **changes: Any) -> dict[str, Any]:
    env = {"_target_": f"{FAKES}.FakeEnv", "chains": CHAINS, **changes.pop("env", {})}
    arguments = {
        "planner": OmegaConf.create({"_target_": f"{FAKES}.NoisyPolicy", "execute": 10}),
        "tasks": list(resolve_tasks("all")),
        "sequences": 6,
        "length": 5,
        "horizon": 720,
        "workers": 2,
        "seed": 0,
        "films": {"candidates": 0, "keep": 1, "every": 40},
    }
    return evaluate(env_config=env, policy=policy, out=out, **{**arguments, **changes})


def command(out: Path, policy: str, *more: str) -> list[str]:
    settings = [
        f"policy={policy}",
        f"out={out}",
        "sequences=6",
        "workers=2",
        "films.candidates=0",
        f"env._target_={FAKES}.FakeEnv",
        f"+env.chains={json.dumps(CHAINS)}",
        f"planner._target_={FAKES}.NoisyPolicy",
        f"hydra.run.dir={out}",
        *more,
    ]
    return ["-m", "step3_defi.eval", *settings]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def files(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("rollouts.jsonl", "results.json", "table.md", "settings.json")}


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not (path.is_file() and path.read_bytes().count(b"\n") >= count) and time.monotonic() < deadline:
        time.sleep(0.02)


def test_results_hold_what_was_promised(tmp_path: Path) -> None:
    results = run(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert set(results["horizons"]) == {"280", "360", "720"}
    for row in results["horizons"].values():
        assert (
            set(row["chain_sr"]) == {"1", "2", "3", "4", "5"}
            and row["avg_len_ci95"][0] <= row["avg_len"] <= row["avg_len_ci95"][1]
        )
    assert [results["horizons"][h]["avg_len"] for h in ("280", "360", "720")] == [1.0, 3.0, pytest.approx(11 / 3)]
    assert results["tasks"]["task1_999"] == {"success": 0, "total": 2, "rate": 0.0, "ci95": stats.wilson(0, 2)}
    assert (results["world"], results["renderer"], results["policy_sha256"]) == ("fake-D", "none", None)
    assert results["versions"]["simulator"] == "fake 1"
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
    assert set(lines[0]) == {"index", "initial_state", "tasks", "steps_to_success", "clipped", "seed"}
    assert results["actions"] == {"steps": 2 * (1110 + 750 + 1500), "clipped": 0}
    assert lines[1]["steps_to_success"] == [30, None]
    assert "another world than fake-D" in (tmp_path / "table.md").read_text()


def test_a_short_run_reports_no_longer_horizon(tmp_path: Path) -> None:
    assert set(run(tmp_path, horizon=360, length=1)["horizons"]) == {"280", "360"}


def test_films_of_first_successes_and_failures(tmp_path: Path) -> None:
    run(tmp_path, films={"candidates": 5, "keep": 1, "every": 40})
    assert sorted(p.name for p in (tmp_path / "videos").iterdir()) == ["0000_5of5.mp4", "0001_1of5.mp4"]


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(tmp_path: Path, policy: str) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    results = run(straight, policy)
    assert results["policy_sha256"] == artifact.sha256(policy)
    # the same evaluation as a program, killed between two sequences
    with subprocess.Popen(
        [sys.executable, *command(broken, policy, "+planner.delay=0.01")], cwd=ROOT, env=environment()
    ) as process:
        lines = broken / "rollouts.jsonl"
        wait_for_lines(lines, 2)
        os.kill(process.pid, signal.SIGKILL)
    assert 2 <= len(journal.read(lines)) < 6 and not (broken / "results.json").exists()
    with lines.open("ab") as file:
        file.write(b'{"index":5,"initial_state":{"ind')  # cut off by the kill
    settings = json.loads((broken / "settings.json").read_text())
    run(broken, policy, env={"scene": "D"}, planner=OmegaConf.create(settings["planner"]))
    assert {k: v for k, v in files(broken).items() if k != "settings.json"} == {
        k: v for k, v in files(straight).items() if k != "settings.json"
    }


def test_a_finished_run_does_nothing_but_report(tmp_path: Path) -> None:
    run(tmp_path)
    before = files(tmp_path)
    run(tmp_path, env={})
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "change,named",
    [
        ({"seed": 1}, "seed is 0 there and 1 now"),
        ({"horizon": 360}, "horizon is 720 there"),
        ({"tasks": ["a"]}, "tasks"),
        ({"policy": "random"}, "policy"),
        ({"env": {"scene": "A"}}, "env"),
        ({"sequences": 7}, "sequences"),
    ],
)
def test_a_journal_of_other_settings_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    run(tmp_path, workers=1)
    before = files(tmp_path)
    with pytest.raises(JournalError, match=named) as caught:
        run(tmp_path, workers=1, **change)
    assert "\n" not in str(caught.value) and "choose another out=" in str(caught.value)
    assert files(tmp_path) == before


def test_other_weights_are_refused(tmp_path: Path, policy: str) -> None:
    out = tmp_path / "out"
    run(out, policy)
    (Path(policy) / "config.yaml").write_text("width: 4\n")
    with pytest.raises(JournalError, match="policy_sha256"):
        run(out, policy)


def test_workers_killed_every_few_sequences_leave_no_trace(tmp_path: Path, policy: str) -> None:
    """Journal, results and table are equal to the byte. The settings differ, because they hold the fake's trouble."""
    trials = tmp_path / "trials"
    trials.mkdir()
    trouble = {"trouble": [[index, "kill", 1] for index in (1, 3, 6, 8, 9)], "trials": str(trials)}
    run(tmp_path / "straight", policy, sequences=10, env={"scene": "D"})
    run(tmp_path / "broken", policy, sequences=10, env={"scene": "D", **trouble})
    assert sorted(int(path.name) for path in trials.iterdir()) == [1, 3, 6, 8, 9], "each died once"
    straight, broken = (files(tmp_path / name) for name in ("straight", "broken"))
    assert all(straight[name] == broken[name] for name in ("rollouts.jsonl", "results.json", "table.md"))


def test_sequences_that_failed_are_named_and_no_result_is_made_without_them(tmp_path: Path, policy: str) -> None:
    trials, out = tmp_path / "trials", tmp_path / "out"
    trials.mkdir()
    env = {"trouble": [[1, "kill", 2], [4, "raise", 2]], "trials": str(trials)}
    with pytest.raises(
        RolloutError,
        match=r"^2 of 6 sequences could not be rolled out .*: 1, 4; the others .*, and the same command tries .*$",
    ):
        run(out, policy, env=env)
    assert (
        list(journal.read(out / "rollouts.jsonl")) == [0, 2, 3, 5]
        and not (out / "results.json").exists()
        and not (out / "table.md").exists()
    )
    run(out, policy, env=env)  # their third trials go well
    run(tmp_path / "straight", policy)
    assert files(out)["rollouts.jsonl"] == files(tmp_path / "straight")["rollouts.jsonl"]


def test_clipped_actions_are_counted_over_a_resume(tmp_path: Path, policy: str) -> None:
    """NoisyPolicy's pace is above 1 in half of its plans."""
    results = run(tmp_path / "a", policy)
    assert 0 < results["actions"]["clipped"] < results["actions"]["steps"]
    counted = "{clipped:,} of {steps:,} actions left [-1, 1] and were clipped.".format_map(results["actions"])
    assert counted in (tmp_path / "a/table.md").read_text()
    lines = (tmp_path / "a/rollouts.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a/rollouts.jsonl").write_bytes(b"".join(lines[:2]))
    assert run(tmp_path / "a", policy) == results


def test_two_runs_do_not_share_a_journal(tmp_path: Path, policy: str) -> None:
    with (
        journal.exclusive_lock(tmp_path),
        pytest.raises(
            JournalError, match="another run is writing its journal; wait until it ends, or choose another out="
        ),
    ):
        run(tmp_path, policy, sequences=1)
    assert not (tmp_path / "settings.json").exists()
    run(tmp_path, policy, sequences=1)  # free again


def test_a_policy_comes_from_the_hub(tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("step3_defi.policy.snapshot_download", lambda name: asked.append(name) or policy)
    assert run(tmp_path / "hub", "lab/policy", sequences=1)["policy_sha256"] == artifact.sha256(policy) and asked == [
        "lab/policy"
    ]
    run(tmp_path / "hub", policy, sequences=1)  # the same journal: what counts is the weights


def test_two_processes_make_one_result(tmp_path: Path, policy: str) -> None:
    straight, shared = tmp_path / "straight", tmp_path / "shared"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29871"]
    subprocess.run(
        [*launcher, *command(shared, policy, f"planner._target_={FAKES}.RowPolicy")],
        cwd=ROOT,
        env=environment(),
        check=True,
        timeout=300,
    )
    planner = OmegaConf.create(json.loads((shared / "settings.json").read_text())["planner"])
    run(straight, policy, planner=planner, env={"scene": "D"})
    assert {k: v for k, v in files(shared).items() if k != "settings.json"} == {
        k: v for k, v in files(straight).items() if k != "settings.json"
    }
    assert not list(shared.glob("rollouts.*.jsonl"))
    replay = Replay(journal.read(shared / "rollouts.jsonl"), failures=9, horizon=720)
    with SimulatorPool({"_target_": f"{FAKES}.FakeEnv", "chains": CHAINS}, count=2) as simulators:
        results = simulators.rollout(replay.chains(slots=2), RowPolicy())
        assert not replay.diverged(results), "diagnose plans in the rows of the run"


def test_two_processes_in_different_worlds_make_none(tmp_path: Path, policy: str) -> None:
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29872"]
    ended = subprocess.run(
        [*launcher, *command(out, policy, "+env.version='${oc.env:RANK}'")],
        cwd=ROOT,
        env=environment(),
        check=False,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert (
        ended.returncode
        and "simulator is fake 0 in process 0, fake 1 in process 1; choose the renderer by hand"
        in ended.stderr + ended.stdout
    )
    assert not (out / "settings.json").exists() and not list(out.glob("rollouts*"))


def test_a_killed_run_of_two_processes_goes_on_in_one(tmp_path: Path, policy: str) -> None:
    """The claims of killed processes do not count, and a plan's row in the batch depends on the sequence alone."""
    out = tmp_path / "out"
    run(tmp_path / "straight", policy, env={"scene": "D"})
    whole = (tmp_path / "straight/rollouts.jsonl").read_bytes().splitlines(keepends=True)
    out.mkdir()
    shutil.copy(tmp_path / "straight/settings.json", out)
    (out / "rollouts.1.jsonl").write_bytes(whole[3] + whole[4][:20])
    assert all(journal.Claims(out).acquire(index) for index in range(5)) and not journal.Claims(out).acquire(4)
    run(out, policy, env={"scene": "D"})
    assert files(out) == files(tmp_path / "straight") and not (out / ".claims").exists()


def test_parts_of_other_processes_are_merged(tmp_path: Path) -> None:
    run(tmp_path / "a")
    out = tmp_path / "b"
    out.mkdir()
    shutil.copy(tmp_path / "a" / "settings.json", out)
    lines = (tmp_path / "a" / "rollouts.jsonl").read_bytes().splitlines(keepends=True)
    (out / "rollouts.0.jsonl").write_bytes(lines[0] + lines[2])
    (out / "rollouts.1.jsonl").write_bytes(lines[3] + lines[5][:20])
    assert list(journal.merge(out)) == [0, 2, 3] and not (out / "rollouts.0.jsonl").exists()
    run(out)
    assert files(out) == files(tmp_path / "a")


def test_torn_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    good = b'{"index":0,"initial_state":{},"tasks":["a"],"steps_to_success":[3],"clipped":0,"seed":0}\n'
    path.write_bytes(good + b'{"index":1,"ini')
    with Journal(path) as lines:
        assert list(lines.records) == [0]
        lines.append({**lines.records[0], "index": 1})
    assert list(journal.read(path)) == [0, 1]
    path.write_bytes(good + b"garbage\n" + good)
    with pytest.raises(JournalError, match="line 2"):
        journal.read(path)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(
        artifact.ArtifactError,
        match=r"^policy=no/where/ is not random, not expert, and no/where/: neither a folder nor a hub id.*$",
    ):
        run(tmp_path, "no/where/")
    with pytest.raises(UserError, match="workers=0"):
        run(tmp_path, workers=0)
    with pytest.raises(UserError, match="sequences=0"):
        run(tmp_path, sequences=0)
    assert not list(tmp_path.iterdir())


def test_the_keys_are_those_of_the_config() -> None:
    with initialize_config_dir(CONFIGS, version_base=None):
        cfg = compose("step3_eval", ["policy=ckpts/defi/x", "tasks=[open_drawer,turn_on_led]", "scene=A"])
        assert (cfg.policy, resolve_tasks(cfg.tasks), cfg.scene) == (
            "ckpts/defi/x",
            ("open_drawer", "turn_on_led"),
            "A",
        )
        for tasks, count in (("all", 34), ("eleven", 11), ("lifts", 3)):
            assert len(resolve_tasks(compose("step3_eval", ["policy=random", f"tasks={tasks}"]).tasks)) == count
        assert len(resolve_tasks(compose("step3_eval", ["policy=random"]).tasks)) == 34


def test_a_folder_of_an_older_version_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings.pop("format") == journal.FORMAT
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    before = files(tmp_path)
    with pytest.raises(
        JournalError, match="another version of this program.*choose another out= or delete it"
    ) as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value) and files(tmp_path) == before
