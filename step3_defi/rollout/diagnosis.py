"""Why a sub-task failed: was the forecast wrong, or the action? (App. Q9)

At moments of planning the scripted expert continues from the very state that the policy observed. The forecast is
compared with the picture after the expert's continuation, and the planned actions with the expert's. The errors of
sub-tasks that succeeded say which error is too large. The expert is one way to continue, not the only one, and it
treats each moment as a beginning: it first opens the gripper and moves up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.calvin_format import KEYS
from common.errors import UserError
from common.image_range import normalize
from common.video import resize
from step3_defi.model import DeFI
from step3_defi.rollout.messages import BranchResult
from step3_defi.rollout.replay import RecordedPlan
from step3_defi.rollout.stats import wilson

VERDICTS = ("forecast", "action", "both", "neither")
# The metrics in which a greater value is worse. The tokens are the visual tokens of the inverse model.
ERROR_METRICS = ("forecast", "forecast_tokens", "action", "gripper")
METRIC_LABELS = {
    "forecast": "forecast: squared error relative to copying the present, dB",
    "forecast_tokens": "forecast: the same in visual tokens, dB",
    "action": "action: RMS difference of the pose command",
    "direction": "action: cosine of the displacement",
    "gripper": "action: share of steps with another gripper command",
}


@dataclass
class Subtask:
    """One sub-task of a sequence, with the scores of its moments."""

    index: int  # of the sequence
    number: int  # its place in the sequence
    task: str
    solved: bool
    moments: list[dict[str, float]] = field(default_factory=list)
    verdict: str = ""

    def score(self, name: str) -> float:
        """The mean of a metric over the moments."""
        return float(np.mean([moment[name] for moment in self.moments]))


class FailureScorer:
    """Scores moments with the policy's own forward and inverse models.

    `num_inference_steps` is the number of denoising steps of a forecast; the policy itself uses 1. Raises UserError
    where the forward model makes no pictures.
    """

    def __init__(self, model: DeFI, *, num_inference_steps: int = 1) -> None:
        self.model, self.gfdm, self.num_inference_steps = model, model.forward_model, num_inference_steps
        if not hasattr(self.gfdm, "generate"):
            raise UserError(
                f"{type(self.gfdm).__name__} forecasts features and makes no pictures, so its forecasts cannot be "
                "compared with the expert's continuation; diagnose a policy whose forward model makes pictures"
            )
        self.key = KEYS[model.views[0]]
        self.frames = self.gfdm.num_frames
        self.errors = tuple(name for name in ERROR_METRICS if model.gidm.num_tokens or name != "forecast_tokens")

    @torch.no_grad()
    def imagine(self, plan: RecordedPlan) -> Tensor:
        """The forecast of the first view, (F, 3, S, S) in [0, 1]."""
        now = self._pictures([plan.observation["rgb_obs"][self.key]])
        return self.gfdm.generate(
            normalize(now), [plan.instruction], steps=self.num_inference_steps, seed=self.model.imagine_seed
        )[0]

    @torch.no_grad()
    def score(self, plan: RecordedPlan, expert: BranchResult) -> dict[str, float]:
        """The forecast's error relative to copying the present, in pixels and visual tokens, and `action_metrics`.

        A policy without an inverse model (VPP) has no visual tokens. The present and the true picture pass through the
        VAE as well, because its blur is no error of the forecast.
        """
        pictures = self._pictures([plan.observation["rgb_obs"][self.key], expert.frames[-1][self.key]])
        now, truth = self.gfdm.vae.decode(self.gfdm.encode_image(normalize(pictures))[:, None])[:, 0]
        compared = torch.stack([self.imagine(plan)[-1], truth, now])
        scores = {"forecast": error_over_copy_db(*compared)}
        if "forecast_tokens" in self.errors:
            scores["forecast_tokens"] = error_over_copy_db(*self.model.gidm.embed(compared))
        return {**scores, **action_metrics(plan.actions, expert.actions)}

    def _pictures(self, pictures: list[np.ndarray]) -> Tensor:
        return resize(np.stack(pictures), self.model.image_size).to(self.model.device)


def error_over_copy_db(forecast: Tensor, truth: Tensor, now: Tensor) -> float:
    """Squared error of a forecast relative to that of the present in its place, in dB.

    It is negative where the forecast is closer to the truth than the present is.
    """
    own, copied = ((guess.float() - truth.float()).square().mean().clamp_min(1e-6) for guess in (forecast, now))
    return float(10 * torch.log10(own / copied))


def action_metrics(plan: np.ndarray, expert: np.ndarray) -> dict[str, float]:
    """Compares two chunks from one state, (A, 7) and (at least A, 7), in units of an action.

    action: root mean square over the steps of the difference of the six pose entries. direction: cosine of the two
    displacements. gripper: share of the steps in which the gripper commands differ.
    """
    expert = expert[: len(plan)]
    moved = [chunk[:, :3].sum(0) for chunk in (plan, expert)]
    length = np.linalg.norm(moved[0]) * np.linalg.norm(moved[1])
    return {
        "action": float(np.sqrt(np.square(plan[:, :6] - expert[:, :6]).sum(1).mean())),
        "direction": float(moved[0] @ moved[1] / length) if length > 1e-9 else 0.0,
        "gripper": float(((plan[:, 6] > 0) != (expert[:, 6] > 0)).mean()),
    }


def enlarged(video: Tensor, size: int) -> np.ndarray:
    """Pictures (F, 3, S, S) in [0, 1] -> (F, size, size, 3) uint8, enlarged without smoothing."""
    return (F.interpolate(video.float().cpu(), (size, size)) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def check_criteria(*, forecast: str, action: str, quantile: float, errors: Sequence[str] = ERROR_METRICS) -> None:
    """Raise UserError unless both criteria are among `errors` and the quantile lies between 0 and 1."""
    if unknown := {forecast, action} - set(errors):
        raise UserError(f"criteria names {sorted(unknown)}: choose among {list(errors)}")
    if not 0 < quantile < 1:
        raise UserError(f"quantile={quantile}: choose one between 0 and 1")


def assign_verdicts(subtasks: Sequence[Subtask], *, forecast: str, action: str, quantile: float) -> dict[str, float]:
    """Give each sub-task its verdict: an error is wrong above this quantile of the errors of successful sub-tasks.

    `forecast` and `action` name the metrics that decide. Returns {metric: limit}. Raises UserError where no sub-task
    succeeded.
    """
    solved = [subtask for subtask in subtasks if subtask.solved]
    if not solved:
        raise UserError(
            "no sub-task of these sequences succeeded, so there is no limit above which an error is wrong; diagnose a "
            "longer run"
        )
    limits = {
        name: float(np.quantile([subtask.score(name) for subtask in solved], quantile)) for name in (forecast, action)
    }
    for subtask in subtasks:
        wrong = tuple(subtask.score(name) > limits[name] for name in (forecast, action))
        subtask.verdict = {
            (True, False): "forecast",
            (False, True): "action",
            (True, True): "both",
            (False, False): "neither",
        }[wrong]
    return limits


def count_verdicts(subtasks: Sequence[Subtask]) -> dict[str, dict[str, Any]]:
    """{verdict: {"count", "total", "ci95"}}, with Wilson's intervals."""
    counts = {verdict: sum(subtask.verdict == verdict for subtask in subtasks) for verdict in VERDICTS}
    return {
        verdict: {"count": count, "total": len(subtasks), "ci95": wilson(count, len(subtasks))}
        for verdict, count in counts.items()
    }


def table(subtasks: Sequence[Subtask]) -> str:
    """Markdown: the verdicts of the failed sub-tasks, by task and in total, and those of the successful ones."""
    failed, solved = ([subtask for subtask in subtasks if subtask.solved == wanted] for wanted in (False, True))
    lines = [
        "| failed sub-task | failures | forecast wrong | action wrong | both | neither |",
        "|---|---|---|---|---|---|",
    ]
    groups = {
        task: [subtask for subtask in failed if subtask.task == task]
        for task in sorted({subtask.task for subtask in failed})
    }
    for task, group in groups.items():
        lines.append(
            f"| {task} | {len(group)} | "
            + " | ".join(str(cell["count"]) for cell in count_verdicts(group).values())
            + " |"
        )
    for name, group in (("**all failures**", failed), ("successes, for comparison", solved)):
        if group:
            cells = [
                f"{cell['count']} ({100 * cell['count'] / cell['total']:.0f} % [{100 * cell['ci95'][0]:.0f}, "
                f"{100 * cell['ci95'][1]:.0f}])"
                for cell in count_verdicts(group).values()
            ]
            lines.append(f"| {name} | {len(group)} | " + " | ".join(cells) + " |")
    lines += ["", "| median over sub-tasks | failures | successes |", "|---|---|---|"]
    for name, label in METRIC_LABELS.items():
        if all(name in moment for subtask in subtasks for moment in subtask.moments):
            medians = [
                f"{np.median([subtask.score(name) for subtask in group]):.2f}" if group else ""
                for group in (failed, solved)
            ]
            lines.append(f"| {label} | {medians[0]} | {medians[1]} |")
    return "\n".join(lines)
