"""Success of the scripted expert per task and scene from random starts, as a Markdown table.

python -m benchmarks.expert_table [env=playtable|calvin] [starts=50] [workers=2] [scenes=ABCD] [sigma=0]
    [tasks=<part of a name>,...]
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np

from common.progress import tqdm
from envs.calvin.env import CalvinEnv, TabletopEnv
from envs.expert.expert import add_action_noise
from envs.playtable.env import PlayTableEnv
from envs.recording.starts import sample_env_state
from envs.tasks import TASKS

MAX_STEPS = 360
WORLDS = {"playtable": PlayTableEnv, "calvin": partial(CalvinEnv, renderer="cpu")}
log = logging.getLogger("benchmarks.expert_table")


def attempt(env: TabletopEnv, task: str, *, seed: int, sigma: float) -> tuple[int | None, str]:
    """(steps to success or None, what failed) from one random start."""
    rng = np.random.default_rng(seed)
    start = sample_env_state(task, env.scene, rng)
    env.reset(robot_obs=start.robot_obs, scene_obs=start.scene_obs)
    expert = env.expert(seed)
    for _ in range(4):
        env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]), render=False)
    for goal in [start.setup_task, task] if start.setup_task else [task]:
        before, steps = env.get_info(), 0
        expert.reset(goal)
        while True:
            action = add_action_noise(expert.act(), rng, sigma, noise_allowed=expert.noise_allowed)
            _, info = env.step(action, render=False)
            steps += 1
            if env.check_success(goal, before, info):
                break
            if steps == MAX_STEPS:
                return None, "task" if goal == task else "lift before"
    return steps, ""


def row(
    world: str, scene: str, task: str, starts: int, sigma: float
) -> tuple[str, str, list[tuple[int | None, str]], float]:
    """(scene, task, all attempts, seconds they took) of one task in one scene."""
    env, begin = WORLDS[world](scene), time.perf_counter()
    results = [attempt(env, task, seed=seed, sigma=sigma) for seed in range(starts)]
    env.close()
    return scene, task, results, time.perf_counter() - begin


def main() -> None:
    options = {"env": "playtable", "starts": "50", "workers": "2", "scenes": "ABCD", "tasks": "", "sigma": "0"}
    options.update(argument.split("=", 1) for argument in sys.argv[1:])
    starts, sigma = int(options["starts"]), float(options["sigma"])
    tasks = [task for task in TASKS if any(part in task for part in options["tasks"].split(","))]
    table: dict[str, dict[str, str]] = {task: {} for task in tasks}
    with ProcessPoolExecutor(int(options["workers"]), mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(row, options["env"], scene, task, starts, sigma)
            for task in tasks
            for scene in options["scenes"]
        ]
        for job in tqdm(jobs, disable=None):
            scene, task, results, seconds = job.result()
            steps = [steps for steps, _ in results if steps is not None]
            failed = [seed for seed, (steps, _) in enumerate(results) if steps is None]
            mark = f"{100 * len(steps) / starts:.0f} % ({np.mean(steps) if steps else 0:.0f})"
            table[task][scene] = mark
            log.info("%s %s %s, %.1f s, failed seeds %s", scene, task, mark, seconds, failed[:12])
    lines = ["| task | " + " | ".join(options["scenes"]) + " |", "|---" * (1 + len(options["scenes"])) + "|"]
    lines += [f"| {task} | " + " | ".join(cells[s] for s in options["scenes"]) + " |" for task, cells in table.items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    main()
