"""Sequences per hour: many simulators and one batched policy, compared with one process that plans for one robot.

    python -m benchmarks.rollout [scene=D] [workers=4] [sequences=8] [horizon=60] [rounds=3] [scale=tiny]
        [policy=<folder of step3_defi.train>]

Ours: step3_defi.rollout.simulators, with pictures where the policy looks. Plain: the same chains in this process one
after the other, batch 1, with pictures at every step as CALVIN's evaluation draws them; "plain, pictures when looked
at" leaves those out. Without `policy` its weights are random: then nothing succeeds and a sequence is one sub-task of
`horizon` steps. Rounds take turns; starting the simulators is not counted.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from benchmarks.imagine import compose_config, machine, parse_command_line, ratio
from benchmarks.replan import hub, random_policy
from common.contracts import ChunkPolicy
from common.progress import tqdm
from envs.protocol import Env
from step3_defi import policy as robots
from step3_defi.action_chunk import ActionChunkBroker
from step3_defi.rollout.messages import Chain
from step3_defi.rollout.simulators import SimulatorPool
from step3_defi.rollout.worker import run_chain

log = logging.getLogger(__name__)


class SingleController:
    """A controller that plans for one simulator, batch 1."""

    def __init__(self, env: Env, chain: Chain, policy: ChunkPolicy) -> None:
        self.env, self.chain, self.policy = env, chain, policy
        self.broker = ActionChunkBroker(self._predict_chunk)

    def start_task(self, number: int, task: str) -> None:
        self.instruction = self.env.instruction(task)
        self.broker.reset()

    def act(self) -> np.ndarray:
        return self.broker.next_action()

    def _predict_chunk(self) -> np.ndarray:
        chunk = self.policy.predict_action_chunk([self.env.get_obs()], [self.instruction])[0]
        return chunk[: self.policy.execute]


class RenderEveryStep:
    """An environment that renders at every step."""

    def __init__(self, env: Env) -> None:
        self.env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def step(self, action: np.ndarray, *, render: bool = True) -> tuple[dict, dict]:
        return self.env.step(action, render=True)


def one_by_one(env: Env, chains: list[Chain], policy: ChunkPolicy) -> int:
    """Run chains one after the other; returns the number of control steps."""
    return sum(
        steps if steps is not None else chain.horizon
        for chain in chains
        for steps in run_chain(env, chain, SingleController(env, chain, policy))
    )


def together(simulators: SimulatorPool, chains: list[Chain], policy: ChunkPolicy) -> int:
    """Run chains in the simulators; returns the number of control steps."""
    horizon = chains[0].horizon
    return sum(
        steps if steps is not None else horizon
        for result in simulators.rollout(chains, policy)
        for steps in result.steps_to_success
    )


def main() -> None:
    options, overrides = parse_command_line(
        {"scale": "tiny", "scene": "D", "workers": 4, "sequences": 8, "horizon": 60, "rounds": 3, "policy": None}
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.policy:
        policy = robots.load(options.policy, device=device)
    else:
        with tempfile.TemporaryDirectory() as folder:
            policy = robots.DeFIPolicy(random_policy([*overrides, *hub(Path(folder), options.scale)]).to(device))
    config = {**OmegaConf.to_container(compose_config([], "step3_eval").env, resolve=True), "scene": options.scene}
    env = instantiate(config)
    chains = [
        Chain(index, state, list(tasks), "policy", options.horizon, 0, slot=index % options.workers)
        for index, (state, tasks) in enumerate(env.get_sequences(options.sequences, seed=0))
    ]
    taken: dict[str, list[float]] = {}
    with SimulatorPool(config, count=options.workers) as simulators:
        arms = {
            "plain": lambda some: one_by_one(RenderEveryStep(env), some, policy),
            "plain, pictures when looked at": lambda some: one_by_one(env, some, policy),
            "ours": lambda some: together(simulators, some, policy),
        }
        for run in arms.values():  # warm up
            run(chains[: options.workers])
        for _ in tqdm(range(options.rounds), desc="rounds"):
            for name, run in arms.items():
                start = time.perf_counter()
                steps = run(chains)
                taken.setdefault(name, []).append(time.perf_counter() - start)
                tqdm.write(f"{name}: {steps} steps")
    env.close()
    log.info(
        "%d sequences of at most %d steps a sub-task, %d workers, %s",
        options.sequences,
        options.horizon,
        options.workers,
        machine(),
    )
    log.info("| arm | sequences an hour | times plain (quartiles) |\n|---|---|---|")
    for name, times in taken.items():
        log.info(
            "| %s | %.0f | %s |",
            name,
            3600 * options.sequences / statistics.median(times),
            ratio(taken["plain"], times),
        )


if __name__ == "__main__":
    main()
