"""Tell which was wrong in the sub-tasks that a rollout failed in, the forecast or the action (App. Q9).

The first sequences are rolled out again, the scripted expert continues from moments of them, and the policy's forecast
and actions are compared with what the expert shows. Leaves diagnosis.json, table.md and films/ in `out`.

Examples:
    python -m step3_defi.rollout.diagnose run=outputs/eval path=ckpts/defi/tiny
    python -m step3_defi.rollout.diagnose run=outputs/eval path=ckpts/defi/tiny failures=15 out=outputs/diagnosis
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from common import artifact
from common.distributed import processes
from common.errors import UserError, check_at_least_one
from common.files import write_json, write_text
from common.program import program
from common.progress import tqdm
from common.video import write_mp4
from step3_defi.rollout import film, journal
from step3_defi.rollout.diagnosis import (
    FailureScorer,
    Subtask,
    assign_verdicts,
    check_criteria,
    count_verdicts,
    enlarged,
    table,
)
from step3_defi.rollout.handle import RolloutError
from step3_defi.rollout.messages import Branch
from step3_defi.rollout.replay import Moment, PlanRecorder, RecordedPlan, Replay, policy_continuation
from step3_defi.rollout.simulators import SimulatorPool

LOG = logging.getLogger(__name__)
FILM_FPS, FILM_REPEATS = 8, 2  # frames a second, and frames that each picture is shown for
PAPER = "The paper sorted 200 failures on CALVIN by eye: forward dynamics 62 %, inverse dynamics 38 %."


def diagnose(
    *,
    run: Path,
    path: Path,
    failures: int,
    plan_stride: int,
    max_step: int,
    continuation_steps: int,
    num_inference_steps: int,
    criteria: dict[str, str],
    quantile: float,
    workers: int,
    films: int,
    out: Path,
) -> dict[str, Any]:
    """Diagnose the failures of `run`, a folder of step3_defi.eval that rolled out the policy in `path`.

    The other arguments are the keys of configs/step3_diagnose.yaml. Returns the content of diagnosis.json. Raises
    UserError where the folder, the policy or the numbers do not fit together, and RolloutError where a simulator fails.
    """
    settings = journal.read_settings(run)
    if settings["policy_sha256"] is None or settings["policy_sha256"] != artifact.sha256(path):
        raise UserError(
            f"{run} holds rollouts of {settings['policy']} {str(settings['policy_sha256'])[:12]}, not of {path}; give "
            "path= as the policy that was rolled out"
        )
    check_criteria(**criteria, quantile=quantile)
    check_at_least_one(
        failures=failures,
        plan_stride=plan_stride,
        max_step=max_step,
        workers=workers,
    )
    replay = Replay(journal.read(run / journal.JOURNAL_FILE), failures=failures, horizon=settings["horizon"])
    policy = instantiate(OmegaConf.create(settings["planner"]), str(path), device=str(processes().device))
    scorer = FailureScorer(policy.model, num_inference_steps=num_inference_steps)
    recorder = PlanRecorder(policy, plan_stride=plan_stride, max_step=max_step)
    check_criteria(**criteria, quantile=quantile, errors=scorer.errors)
    forecast_steps = scorer.frames - 1
    if continuation_steps % forecast_steps or continuation_steps < recorder.execute:
        raise UserError(
            f"continuation_steps={continuation_steps}: must be a multiple of {forecast_steps}, the number of future "
            f"frames of a forecast, and at least {recorder.execute}, the number of actions of a plan"
        )
    with SimulatorPool(settings["env"], count=workers) as simulators:
        chains = replay.chains(slots=workers)
        diverged = replay.diverged(
            tqdm(simulators.rollout(chains, recorder), total=len(chains), desc="repeat", unit="sequence")
        )
        if len(diverged) == len(chains):
            raise UserError(
                f"{run}: none of {len(chains)} sequences ends as in the journal; give workers= as the run had it, and "
                "use a machine of the same kind"
            )
        branches = {
            moment: branch
            for index in replay.records
            if index not in diverged
            for moment, branch in replay.moments(
                index,
                recorder,
                continuation_steps=continuation_steps,
                frame_stride=continuation_steps // forecast_steps,
            ).items()
        }
        subtasks = _score(simulators, branches, replay, recorder, scorer)
        limits = assign_verdicts(subtasks, **criteria, quantile=quantile)
        failed = [subtask for subtask in subtasks if not subtask.solved]
        for subtask in tqdm(failed[:films], desc="films", unit="film"):
            _film(simulators, branches, subtask, recorder, scorer, out / "films")
    results = {
        "run": str(run),
        "world": settings["world"],
        "policy_sha256": settings["policy_sha256"],
        "sequences": len(chains),
        "diverged": sorted(diverged),
        "criteria": criteria,
        "quantile": quantile,
        "limits": limits,
        "verdicts": count_verdicts(failed) if failed else {},
        "subtasks": [asdict(subtask) for subtask in subtasks],
    }
    write_json(out / "diagnosis.json", results)
    thresholds = " and ".join(f"{limit:.2f} ({name})" for name, limit in limits.items())
    note = (
        f"{len(chains)} sequences in {settings['world']}; {len(diverged)} of them are left out because they did not "
        f"repeat exactly. An error counts as wrong above {thresholds}, which {100 * quantile:.0f} % of the successful "
        f"sub-tasks stay below. {PAPER}"
    )
    write_text(out / "table.md", f"{table(subtasks)}\n\n{note}\n")
    LOG.info("%s\n\n%s\nresults in %s", table(subtasks), note, out)
    return results


def _score(
    simulators: SimulatorPool,
    branches: dict[Moment, Branch],
    replay: Replay,
    recorder: PlanRecorder,
    scorer: FailureScorer,
) -> list[Subtask]:
    """The sub-tasks of the moments, in order, with their scores."""
    found: dict[tuple[int, int], Subtask] = {}
    moments = list(branches)
    results = simulators.branch(list(branches.values()))
    for position, expert in tqdm(results, total=len(branches), desc="expert", unit="moment"):
        moment = moments[position]
        plan, branch = recorder.plans[moment], branches[moment]
        _check_start(plan, expert.start, branch)
        place = moment.sequence, moment.subtask
        solved = moment.subtask < replay.num_solved(moment.sequence)
        subtask = found.setdefault(place, Subtask(*place, branch.task, solved=solved))
        subtask.moments.append({"plan": moment.plan, **scorer.score(plan, expert)})
    for subtask in found.values():
        subtask.moments.sort(key=lambda scores: scores["plan"])
    return [found[place] for place in sorted(found)]


def _check_start(plan: RecordedPlan, start: np.ndarray, branch: Branch) -> None:
    """Raise RolloutError unless the branch starts in the state that the policy observed."""
    observed = np.concatenate([plan.observation["robot_obs"], plan.observation["scene_obs"]])
    if not np.allclose(observed, start, atol=1e-6):
        raise RolloutError(
            f"sequence {branch.index}, step {len(branch.prefix_actions)}: the same actions led to another state "
            f"({np.abs(observed - start).max():.1g} apart), so this simulator cannot return to a moment"
        )


def _film(
    simulators: SimulatorPool,
    branches: dict[Moment, Branch],
    subtask: Subtask,
    recorder: PlanRecorder,
    scorer: FailureScorer,
    folder: Path,
) -> None:
    """Write the continuations of a sub-task's moments, side by side: the policy's, its forecast, and the expert's."""
    moments = [Moment(subtask.index, subtask.number, int(scores["plan"])) for scores in subtask.moments]
    requests = [
        branch
        for moment in moments
        for branch in (policy_continuation(branches[moment], moment, recorder), branches[moment])
    ]
    results = dict(simulators.branch(requests))
    movie = film.Film()
    for place, moment in enumerate(moments):
        plan = recorder.plans[moment]
        actual, expert = ([pictures[scorer.key] for pictures in results[2 * place + i].frames] for i in range(2))
        forecast = enlarged(scorer.imagine(plan), actual[0].shape[0])
        step = moment.plan * recorder.execute
        movie.start_task(f"{plan.instruction}, from step {step}: what happened | the policy's forecast | the expert")
        for row in range(scorer.frames):
            pictures = [actual[min(row, len(actual) - 1)], forecast[row], expert[row]]
            for _ in range(FILM_REPEATS):
                movie.add(np.concatenate(pictures, axis=1))
    name = f"{subtask.index:04d}_{subtask.number + 1}_{subtask.task}_{subtask.verdict}.mp4"
    write_mp4(folder / name, np.stack(movie.frames), FILM_FPS)


@program("step3_diagnose", RolloutError)
def main(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True)
    folders = {name: Path(settings.pop(name)) for name in ("run", "path", "out")}
    diagnose(**folders, **settings)


if __name__ == "__main__":
    main()
