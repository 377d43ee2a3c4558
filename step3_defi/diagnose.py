"""Program: of the sub-tasks that a rollout failed in, was the forecast wrong or the action? (App. Q9)

    python -m step3_defi.diagnose run=outputs/eval path=ckpts/defi/tiny

Carries the first sequences out again, has the expert go on from moments of them, and leaves diagnosis.json, table.md
and films/ in `out`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from common import artifact
from common.distributed import processes
from common.files import write_text
from common.program import program
from common.video import write_mp4
from step3_defi.rollout import film, journal
from step3_defi.rollout.diagnosis import FailureScorer, Subtask, assign_verdicts, check_criteria, enlarged, split, table
from step3_defi.rollout.replay import PlanKey, PlanRecorder, RecordedPlan, Replay, policy_continuation
from step3_defi.rollout.simulators import RolloutError, SimulatorPool
from step3_defi.rollout.worker import Branch

LOG = logging.getLogger(__name__)
FILM_FPS, FILM_HOLD = 8, 2  # frames a second, and frames that each picture stays
PAPER = "The paper sorted 200 failures on CALVIN by eye: forward dynamics 62 %, inverse dynamics 38 %."


def diagnose(
    *,
    run: Path,
    path: Path,
    failures: int,
    every: int,
    max_step: int,
    continuation_steps: int,
    steps: int,
    criteria: dict[str, str],
    quantile: float,
    workers: int,
    films: int,
    out: Path,
) -> dict[str, Any]:
    """Judge the failures of `run`, a folder of step3_defi.eval that rolled out the policy in `path`; returns what
    stands in diagnosis.json.

    ValueError where the folder, the policy or the numbers do not fit together, RolloutError where a simulator fails.
    """
    settings = journal.read_settings(run)
    if settings["policy_sha256"] is None or settings["policy_sha256"] != artifact.sha256(path):
        raise ValueError(
            f"{run} holds rollouts of {settings['policy']} {str(settings['policy_sha256'])[:12]}, not of {path}; name "
            "the policy that it was"
        )
    check_criteria(**criteria, quantile=quantile)
    if min(failures, every, max_step, workers) < 1:
        raise ValueError(
            f"failures={failures}, every={every}, within={max_step}, workers={workers}: each must be at least 1"
        )
    replay = Replay(journal.read(run / journal.NAME), failures=failures, horizon=settings["horizon"])
    policy = instantiate(OmegaConf.create(settings["planner"]), str(path), device=str(processes().device))
    critic, recorder = FailureScorer(policy.model, steps=steps), PlanRecorder(policy, every=every, max_step=max_step)
    check_criteria(**criteria, quantile=quantile, errors=critic.errors)
    if continuation_steps % (critic.frames - 1) or continuation_steps < recorder.execute:
        raise ValueError(
            f"ahead={continuation_steps}: a multiple of {critic.frames - 1}, the frames ahead that are imagined, and at least the "
            f"{recorder.execute} "
            "actions of a plan"
        )
    with SimulatorPool(settings["env"], count=workers) as simulators:
        chains = replay.chains(slots=workers)
        diverged = replay.diverged(
            tqdm(simulators.rollout(chains, recorder), total=len(chains), desc="repeat", unit="chain")
        )
        if len(diverged) == len(chains):
            raise ValueError(
                f"{run}: none of {len(chains)} sequences ends as in the journal; give workers= as the run had it, on a "
                "machine of its kind"
            )
        branches = {
            key: branch
            for index in replay.records
            if index not in diverged
            for key, branch in replay.moments(
                index, recorder, continuation_steps=continuation_steps, every=continuation_steps // (critic.frames - 1)
            ).items()
        }
        subtasks = _examine(simulators, branches, replay, recorder, critic)
        limits = assign_verdicts(subtasks, **criteria, quantile=quantile)
        failed = [subtask for subtask in subtasks if not subtask.solved]
        for subtask in tqdm(failed[:films], desc="films", unit="film"):
            _film(simulators, branches, subtask, recorder, critic, out / "films")
    results = {
        "run": str(run),
        "world": settings["world"],
        "policy_sha256": settings["policy_sha256"],
        "sequences": len(chains),
        "strayed": sorted(diverged),
        "criteria": criteria,
        "quantile": quantile,
        "limits": limits,
        "split": split(failed) if failed else {},
        "subtasks": [asdict(subtask) for subtask in subtasks],
    }
    write_text(out / "diagnosis.json", json.dumps(results, indent=2) + "\n")
    note = (
        f"{len(chains)} sequences in {settings['world']}, {len(diverged)} of them left out because they did not repeat; "
        "wrong is above "
        + " and ".join(f"{limit:.2f} ({name})" for name, limit in limits.items())
        + f", {100 * quantile:.0f} % of the successes. {PAPER}"
    )
    write_text(out / "table.md", f"{table(subtasks)}\n\n{note}\n")
    LOG.info("%s\n\n%s\nresults in %s", table(subtasks), note, out)
    return results


def _examine(
    simulators: SimulatorPool,
    branches: dict[PlanKey, Branch],
    replay: Replay,
    recorder: PlanRecorder,
    critic: FailureScorer,
) -> list[Subtask]:
    """Scored sub-tasks, in order."""
    found: dict[tuple[int, int], Subtask] = {}
    shown = simulators.branch(list(branches.values()))
    ways = list(branches.items())
    for position, expert in tqdm(shown, total=len(branches), desc="expert", unit="moment"):
        key, branch = ways[position]
        plan = recorder.plans[key]
        _check_start(plan, expert["start"], branch)
        subtask = found.setdefault(key[:2], Subtask(*key[:2], branch.task, solved=key[1] < replay.solved(key[0])))
        subtask.moments.append({"plan": key[2], **critic.score(plan, expert)})
    for subtask in found.values():
        subtask.moments.sort(key=lambda moment: moment["plan"])
    return [found[key] for key in sorted(found)]


def _check_start(plan: RecordedPlan, start: np.ndarray, branch: Branch) -> None:
    seen = np.concatenate([plan.observation["robot_obs"], plan.observation["scene_obs"]])
    if not np.allclose(seen, start, atol=1e-6):
        raise RolloutError(
            f"sequence {branch.index}, step {len(branch.past)}: the same actions led elsewhere "
            f"({np.abs(seen - start).max():.1g} apart), so "
            "this simulator cannot go back to a moment"
        )


def _film(
    simulators: SimulatorPool,
    branches: dict[PlanKey, Branch],
    subtask: Subtask,
    recorder: PlanRecorder,
    critic: FailureScorer,
    folder: Path,
) -> None:
    """The seconds after a sub-task's moments: what happened, what was imagined, what the expert shows, side by side."""
    keys = [(subtask.index, subtask.number, int(moment["plan"])) for moment in subtask.moments]
    asked = [branch for key in keys for branch in (policy_continuation(branches[key], key, recorder), branches[key])]
    shown = dict(simulators.branch(asked))
    movie = film.Film()
    for place, key in enumerate(keys):
        plan = recorder.plans[key]
        happened, expert = ([pictures[critic.key] for pictures in shown[2 * place + i]["frames"]] for i in range(2))
        imagined = enlarged(critic.imagine(plan), happened[0].shape[0])
        movie.start_task(
            f"{plan.instruction}, from step {key[2] * recorder.execute}: what happened | what was imagined | what the "
            "expert shows"
        )
        for row in range(critic.frames):
            page = [happened[min(row, len(happened) - 1)], imagined[row], expert[row]]
            for _ in range(FILM_HOLD):
                movie.add(np.concatenate(page, axis=1))
    name = f"{subtask.index:04d}_{subtask.number + 1}_{subtask.task}_{subtask.verdict}.mp4"
    write_mp4(folder / name, np.stack(movie.frames), FILM_FPS)


@program("step3_diagnose", RolloutError)
def main(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True)
    places = {name: Path(settings.pop(name)) for name in ("run", "path", "out")}
    diagnose(**places, **settings)


if __name__ == "__main__":
    main()
