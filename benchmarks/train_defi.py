"""Training speed of step 3 compared with a plain path: one view at a time, the whole UNet, no cached sentences.

    python -m benchmarks.train_defi [scale=tiny|small|full] [rounds=3] [steps=10] [batch_size=16] [windows=64] ...

All arms train one policy of random weights from one config with common.loop.Loop, on random windows in memory; every
arm of every round is a process of its own. "cached" trains from outputs of the frozen parts on disk
(step3_defi.data.features) and reports what they took to compute; it is left out at scale=full, where the features of
one window are 42 MB.

Alignment (policy.alignment) is switched off: the first `policy.alignment.steps` steps train on it alone and leave out
the action adapter, and a benchmark has fewer steps than that. All other arguments are overrides of the step 3 config.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor

from benchmarks.imagine import compose_config, machine, parse_command_line, peak, ratio, run_in_subprocess
from benchmarks.replan import SENTENCES, baseline_path, hub, random_policy
from benchmarks.train_gfdm import record_step_times, samples_per_second, timed_loop
from common.progress import tqdm
from step3_defi import DeFI
from step3_defi.data import features

NO_ALIGNMENT = ("policy.alignment.weight=0", "policy.alignment.steps=0")
log = logging.getLogger(__name__)


class RandomWindows:
    """Random windows in memory, as a sample set."""

    def __init__(self, model: DeFI, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pictures = {
            view: torch.rand(count, 3, model.image_size, model.image_size, generator=generator) * 2 - 1
            for view in model.views
        }
        shape = (count, model.adapter.action_horizon, model.adapter.action_dim)
        self.actions = torch.rand(shape, generator=generator) * 2 - 1

    def __len__(self) -> int:
        return len(self.actions)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        views = {view: pictures[index] for view, pictures in self.pictures.items()}
        return {"id": self.id(index), "views": views, "text": self.text(index), "actions": self.action_chunk(index)}

    def text(self, index: int) -> str:
        return SENTENCES[index % len(SENTENCES)]

    def id(self, index: int) -> str:
        return str(index)

    def action_chunk(self, index: int) -> Tensor:
        return self.actions[index]

    def fingerprint(self) -> str:
        return str(len(self))


def train(overrides: list[str], arm: str, steps: int, batch_size: int, windows: int) -> tuple[float, float, float]:
    """(samples a second, peak memory in GiB, seconds per window to compute the cache) of the training loop."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        scale = next(word.split("=")[1] for word in overrides if word.startswith("scale="))
        words = [*NO_ALIGNMENT, *overrides, *hub(Path(folder) / "hub", scale)]
        model = random_policy(words)
        loop = timed_loop(compose_config(words, "step3_defi").loop, folder, steps, batch_size)
        samples, start = RandomWindows(model, windows), time.perf_counter()
        if arm == "cached":
            samples = features.get_or_build_cache(
                samples, model.to("cuda" if torch.cuda.is_available() else "cpu"), folder, parents={}
            )
        cache, times = time.perf_counter() - start, record_step_times(model)
        with baseline_path(model) if arm == "plain" else ExitStack():
            loop.fit(model, samples)
    return samples_per_second(times, steps, batch_size), peak(), cache / windows


def main() -> None:
    options, overrides = parse_command_line(
        {"scale": "tiny", "rounds": 3, "steps": 10, "batch_size": 16, "windows": 64}
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found: dict[str, list[tuple[float, float, float]]] = {
        arm: [] for arm in ("plain", "ours", "cached")[: 2 if options.scale == "full" else 3]
    }
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for arm, runs in found.items():
            runs.append(run_in_subprocess(train, overrides, arm, options.steps, options.batch_size, options.windows))
    log.info("%s, batch %d, %s", options.scale, options.batch_size, machine())
    log.info(
        "| arm | samples/s | peak, GiB | rate over plain (quartiles) | memory over plain (quartiles) "
        "|\n|---|---|---|---|---|"
    )
    columns = {arm: list(zip(*runs)) for arm, runs in found.items()}
    for arm, (rates, memory, _) in columns.items():
        log.info(
            "| %s | %.1f | %.2f | %s | %s |",
            arm,
            statistics.median(rates),
            max(memory),
            ratio(rates, columns["plain"][0]),
            ratio(memory, columns["plain"][1]),
        )
    if "cached" in columns:
        log.info("computing the cache took %.0f ms a window, once", 1000 * statistics.median(columns["cached"][2]))


if __name__ == "__main__":
    main()
