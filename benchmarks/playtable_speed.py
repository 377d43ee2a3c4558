"""Speed of the play table on this machine, physics alone and with both cameras.

    python -m benchmarks.playtable_speed [--scene D] [--steps 600]

The gripper moves at random above the table and keeps closing on blocks, so that contacts are part of the measurement.
"""

from __future__ import annotations

import argparse
import logging
import time

import numpy as np

from envs.playtable import PlayTableEnv


def actions(count: int, seed: int = 0) -> np.ndarray:
    """(count, 7) smooth random actions; the gripper changes every second."""
    rng = np.random.default_rng(seed)
    knots = rng.uniform(-0.6, 0.6, (count // 10 + 2, 6))
    moves = np.stack([np.interp(np.arange(count) / 10, np.arange(len(knots)), column) for column in knots.T], axis=1)
    moves[:, 3:] *= 0.3
    return np.column_stack((moves, np.where(np.arange(count) // 30 % 2, -1.0, 1.0)))


def milliseconds(env: PlayTableEnv, count: int, render: bool) -> tuple[float, float]:
    """(wall-clock time, CPU time of all threads) of a control step in ms, on average."""
    env.reset()
    env.step(np.zeros(7), render=render)
    start, spent = time.perf_counter(), time.process_time()
    for index, action in enumerate(actions(count)):
        if index % 60 == 0:
            env.reset()
        env.step(action, render=render)
    return 1000 * (time.perf_counter() - start) / count, 1000 * (time.process_time() - spent) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scene", default="D")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    env = PlayTableEnv(options.scene)
    for label, render in (("physics and info", False), ("with both cameras", True)):
        wall, cpu = milliseconds(env, options.steps, render)
        logging.info("%-18s %6.2f ms a step, %4.0f steps/s; %6.2f ms of CPU time", label, wall, 1000 / wall, cpu)
    logging.info("%s, %s", env.name, ", ".join(f"{key} {value}" for key, value in env.versions().items()))
    env.close()


if __name__ == "__main__":
    main()
