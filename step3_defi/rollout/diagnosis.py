"""Why a sub-task failed: was the forecast wrong, or the action? (App. Q9)

At a moment of planning the scripted expert goes on from the very state that the policy saw. What the table looks like
after its second
is what the forecast is held against, what it did is what the plan is held against. How wrong is too wrong, sub-tasks
that succeeded say.
The expert is one way to go on, not the only one, and it plays each moment as a beginning: it first lets go of what it
holds and rises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.calvin_format import KEYS
from common.video import resize
from step3_defi.model import DeFI
from step3_defi.rollout.replay import RecordedPlan
from step3_defi.rollout.stats import wilson

VERDICTS = ("forecast", "action", "both", "neither")
ERROR_METRICS = (
    "forecast",
    "forecast_tokens",
    "action",
    "gripper",
)  # of which greater is worse; tokens are the inverse model's
METRIC_LABELS = {
    "forecast": "forecast, dB of squared error above copying the present",
    "forecast_tokens": "the same in visual tokens, dB",
    "action": "action, RMS difference of the pose command",
    "direction": "action, cosine of the displacement",
    "gripper": "action, share of steps with another gripper command",
}


@dataclass
class Subtask:
    """One sub-task of a sequence and the scores of its moments."""

    index: int
    number: int
    task: str
    solved: bool
    moments: list[dict[str, float]] = field(default_factory=list)
    verdict: str = ""

    def score(self, name: str) -> float:
        """The mean over the moments."""
        return float(np.mean([moment[name] for moment in self.moments]))


class FailureScorer:
    """Scores moments with the eyes of the policy's own models. `steps` of denoising for a forecast; 1 is what the
    policy imagines with.

    ValueError: the forward model makes no pictures.
    """

    def __init__(self, model: DeFI, *, steps: int = 1) -> None:
        self.model, self.gfdm, self.steps = model, model.forward_model, steps
        if not hasattr(self.gfdm, "generate"):
            raise ValueError(
                f"{type(self.gfdm).__name__} imagines features and no pictures: its forecasts cannot be held against "
                "what an expert shows"
            )
        self.key = KEYS[model.views[0]]
        self.frames = self.gfdm.num_frames
        self.errors = tuple(name for name in ERROR_METRICS if model.gidm.num_tokens or name != "forecast_tokens")

    @torch.no_grad()
    def imagine(self, plan: RecordedPlan) -> Tensor:
        """The forecast of the first view, (F, 3, S, S) in [0, 1]."""
        now = self._pictures([plan.observation["rgb_obs"][self.key]])
        return self.gfdm.generate(now * 2 - 1, [plan.instruction], steps=self.steps, seed=self.model.imagine_seed)[0]

    @torch.no_grad()
    def score(self, plan: RecordedPlan, expert: Mapping[str, Any]) -> dict[str, float]:
        """Forecast in dB of squared error above that of copying the present, in pixels and in visual tokens; action as
        in `action_errors`.

        A policy without inverse model (VPP) has no visual tokens. Present and truth go through the VAE, too: its blur
        is not the forecast's fault.
        """
        pictures = self._pictures([plan.observation["rgb_obs"][self.key], expert["frames"][-1][self.key]])
        now, truth = self.gfdm.latent_space.decode(self.gfdm.encode_image(pictures * 2 - 1)[:, None])[:, 0]
        three = torch.stack([self.imagine(plan)[-1], truth, now])
        tokens = (
            {"forecast_tokens": error_over_copy_db(*self.model.gidm.embed(three))}
            if "forecast_tokens" in self.errors
            else {}
        )
        return {"forecast": error_over_copy_db(*three), **tokens, **action_metrics(plan.actions, expert["actions"])}

    def _pictures(self, pictures: list[np.ndarray]) -> Tensor:
        return resize(np.stack(pictures), self.model.image_size).to(self.model.device)


def error_over_copy_db(forecast: Tensor, truth: Tensor, now: Tensor) -> float:
    """Squared error of a forecast over that of the present in its place, in dB: negative where the forecast knows
    more."""
    own, copied = ((seen.float() - truth.float()).square().mean().clamp_min(1e-6) for seen in (forecast, now))
    return float(10 * torch.log10(own / copied))


def action_metrics(plan: np.ndarray, expert: np.ndarray) -> dict[str, float]:
    """Two chunks (A, 7) and (at least A, 7) from one state, in units of an action.

    action: root mean square over steps of the difference of the six pose entries. direction: cosine of the two
    displacements.
    gripper: share of the steps in which the commands differ.
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
    """Pictures (F, 3, S, S) in [0, 1] -> (F, size, size, 3) uint8, their pixels left to be seen."""
    return (F.interpolate(video.float().cpu(), (size, size)) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def check_criteria(*, forecast: str, action: str, quantile: float, errors: Sequence[str] = ERROR_METRICS) -> None:
    """ValueError unless both name errors, of those that a policy can be held to, and the quantile is one."""
    if unknown := {forecast, action} - set(errors):
        raise ValueError(f"criteria names {sorted(unknown)}: choose among {list(errors)}")
    if not 0 < quantile < 1:
        raise ValueError(f"quantile={quantile}: choose one between 0 and 1")


def assign_verdicts(subtasks: Sequence[Subtask], *, forecast: str, action: str, quantile: float) -> dict[str, float]:
    """Give each sub-task its verdict: an error is wrong where it is above this quantile of the sub-tasks that
    succeeded.

    `forecast` and `action` name the errors that decide. Returns both limits; ValueError where no sub-task succeeded.
    """
    solved = [subtask for subtask in subtasks if subtask.solved]
    if not solved:
        raise ValueError(
            "no sub-task of these sequences succeeded, so nothing says how wrong is too wrong; diagnose a longer run"
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


def split(subtasks: Sequence[Subtask]) -> dict[str, dict[str, Any]]:
    """{verdict: {"count", "total", "ci95"}}, Wilson intervals."""
    counts = {verdict: sum(subtask.verdict == verdict for subtask in subtasks) for verdict in VERDICTS}
    return {
        verdict: {"count": count, "total": len(subtasks), "ci95": wilson(count, len(subtasks))}
        for verdict, count in counts.items()
    }


def table(subtasks: Sequence[Subtask]) -> str:
    """Markdown: what was wrong in the sub-tasks that failed, by task and in all, and the same of those that
    succeeded."""
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
            f"| {task} | {len(group)} | " + " | ".join(str(cell["count"]) for cell in split(group).values()) + " |"
        )
    for name, group in (("**all failures**", failed), ("successes, for comparison", solved)):
        if group:
            cells = [
                f"{cell['count']} ({100 * cell['count'] / cell['total']:.0f} % [{100 * cell['ci95'][0]:.0f}, "
                f"{100 * cell['ci95'][1]:.0f}])"
                for cell in split(group).values()
            ]
            lines.append(f"| {name} | {len(group)} | " + " | ".join(cells) + " |")
    lines += ["", "| median over sub-tasks | failures | successes |", "|---|---|---|"]
    for name in (
        name for name in METRIC_LABELS if all(name in moment for subtask in subtasks for moment in subtask.moments)
    ):
        middles = [
            f"{np.median([subtask.score(name) for subtask in group]):.2f}" if group else ""
            for group in (failed, solved)
        ]
        lines.append(f"| {METRIC_LABELS[name]} | {middles[0]} | {middles[1]} |")
    return "\n".join(lines)
