"""Roll a policy out and report it as the paper's Table 1 does (Sec. 4.2, DESIGN 6).

    python -m step3_defi.eval env=playtable scene=D policy=ckpts/defi/tiny tasks=eleven sequences=100 out=outputs/eval
    python -m step3_defi.eval policy=random|expert ...      accelerate launch -m step3_defi.eval ... on several GPUs

A killed run goes on with the same command. Leaves rollouts.jsonl, results.json, table.md and videos/ in `out`. A
sequence whose
simulator fails twice is in no journal and no result is written without it: the run ends naming it, the same command
tries it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from common import artifact
from common.contracts import ChunkPolicy
from common.distributed import SLOWEST, processes
from common.files import write_text
from common.program import program
from common.video import write_mp4
from step3_defi.policy import resolve_source
from step3_defi.rollout import film, journal, stats
from step3_defi.rollout.journal import Claims, Journal, Record
from step3_defi.rollout.simulators import RolloutError, SimulatorPool, check_same_versions
from step3_defi.rollout.worker import Chain, SequencesRequest

LOG = logging.getLogger(__name__)
WITHOUT_MODEL = ("random", "expert")
FILM_FPS = 15


def evaluate(
    *,
    env_config: dict[str, Any],
    agent: str,
    planner: DictConfig,
    tasks: list[str] | None,
    sequences: int,
    length: int,
    horizon: int,
    workers: int,
    seed: int,
    out: Path,
    films: dict[str, int],
    response_timeout: float = 300,
) -> dict[str, Any]:
    """Roll out `agent` (a policy's folder or hub id, "random" or "expert") and return what stands in results.json.

    Raises ValueError where the arguments or the folder `out` do not fit, RolloutError where a simulator does not start
    or sequences
    could not be judged.
    """
    for key, value in {
        "sequences": sequences,
        "length": length,
        "horizon": horizon,
        "workers": workers,
        "patience": response_timeout,
    }.items():
        if value < 1:
            raise ValueError(f"{key}={value}: must be at least 1")
    folder = None if agent in WITHOUT_MODEL else _policy_folder(agent)
    sha256 = None if folder is None else artifact.sha256(folder)
    state, claims = processes(SLOWEST), Claims(out)
    with journal.exclusive_lock(out) if state.is_main_process else nullcontext():
        with SimulatorPool(
            env_config, count=workers, response_timeout=response_timeout, pictures=bool(sha256 or films["candidates"])
        ) as simulators:
            check_same_versions(
                {f"process {rank}": versions for rank, versions in enumerate(gather_object([simulators.versions]))}
            )
            world = simulators.survey(SequencesRequest(sequences, tasks, length, seed))
            settings = {
                "world": world["world"],
                "versions": simulators.versions,
                "env": env_config,
                "policy": agent if sha256 is None else "artifact",
                "policy_sha256": sha256,
                "planner": None if sha256 is None else OmegaConf.to_container(planner, resolve=True),
                "tasks": tasks,
                "sequences": sequences,
                "sequences_sha256": _sha256(world["sequences"]),
                "length": length,
                "horizon": horizon,
                "seed": seed,
            }
            if state.is_main_process:
                journal.claim(out, settings)
                journal.merge(out)
                claims.clear()
            state.wait_for_everyone()
            done = journal.read(out / journal.NAME)
            chains = [
                Chain(
                    index,
                    initial_state,
                    list(chain),
                    "policy" if sha256 else agent,
                    horizon,
                    seed,
                    slot=index % workers,
                    film_every=films["every"] if index < films["candidates"] else 0,
                )
                for index, (initial_state, chain) in enumerate(world["sequences"])
                if index not in done
            ]
            policy = instantiate(planner, str(folder), device=str(state.device)) if sha256 and chains else None
            _roll_out(
                simulators,
                chains,
                policy,
                out,
                claims,
                part=journal.part(out, state.process_index, state.num_processes),
                total=sequences,
                show=state.is_main_process,
                length=length,
            )
        state.wait_for_everyone()
        if not state.is_main_process:
            return {}
        claims.clear()
        return _report(out, settings, films["keep"])


def _roll_out(
    simulators: SimulatorPool,
    chains: list[Chain],
    policy: ChunkPolicy | None,
    out: Path,
    claims: Claims,
    *,
    part: Path,
    total: int,
    show: bool,
    length: int,
) -> None:
    by_index = {chain.index: chain for chain in chains}
    if not chains:
        return
    with (
        Journal(part) as lines,
        tqdm(total=len(chains), desc=f"rollout of {total}", unit="chain", disable=not show) as bar,
    ):
        for result in simulators.rollout(chains, policy, claims.acquire):
            bar.update(claims.taken() - bar.n)  # by all processes
            if "failure" in result:
                continue
            chain = by_index[result["index"]]
            record = Record(
                index=chain.index,
                initial_state=chain.initial_state,
                tasks=chain.tasks,
                steps_to_success=result["steps_to_success"],
                clipped=result["clipped"],
                seed=chain.seed,
            )
            if result["film"]:
                solved = stats.chain_length(record, chain.horizon)
                # before the journal's line: a sequence that counts as done has its film
                write_mp4(
                    out / "videos" / film.name(chain.index, solved, len(chain.tasks)),
                    np.stack(result["film"]),
                    FILM_FPS,
                )
            lines.append(record)
            lengths = stats.chain_lengths(lines.records.values(), chain.horizon)
            rates = " ".join(f"{100 * (lengths >= k).mean():.0f}" for k in range(1, length + 1))
            bar.set_postfix_str(f"1-{length}: {rates} %, avg {lengths.mean():.2f}")


def _report(out: Path, settings: dict[str, Any], keep: int) -> dict[str, Any]:
    """Merge the journal, write results.json and table.md, thin the films out. RolloutError: sequences are missing."""
    judged = journal.merge(out)
    if missing := [index for index in range(settings["sequences"]) if index not in judged]:
        raise RolloutError(
            f"{len(missing)} of {settings['sequences']} sequences could not be judged, their simulators failed twice "
            "(see above): "
            f"{', '.join(map(str, missing))}; the others are in {out / journal.NAME}, the same command tries these "
            "again"
        )
    records = list(judged.values())
    length, world, longest = settings["length"], settings["world"], settings["horizon"]
    horizons = {str(h): stats.chain_stats(records, h, length=length) for h in stats.reported_horizons(longest)}
    results = {
        "world": world,
        "renderer": settings["versions"].get("renderer"),
        "versions": settings["versions"],
        "policy": settings["policy"],
        "policy_sha256": settings["policy_sha256"],
        "vocabulary": settings["tasks"],
        "sequences": len(records),
        "length": length,
        "seed": settings["seed"],
        "horizons": horizons,
        "tasks": stats.task_stats(records, longest),
        "tasks_horizon": longest,
        "actions": stats.action_stats(records, longest),
    }
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    rows = {f"{settings['policy']}, {world}, {h} steps": row for h, row in horizons.items()}
    chains = stats.chain_table(rows, length=length, paper=stats.paper_label(world))
    note = f"{len(records)} sequences of {length} in {world}; 95 % bootstrap intervals over sequences."
    if results["actions"]["clipped"] is not None:
        note += " {clipped:,} of {steps:,} actions left [-1, 1] and were clipped.".format_map(results["actions"])
    note = f"{note} {stats.caveat(world, settings['tasks'])}".rstrip()
    table = f"{chains}\n\n{note}\n\nSub-tasks within {longest} steps (Wilson intervals):\n\n{stats.task_table(results['tasks'])}\n"
    write_text(out / "table.md", table)
    film.prune(out / "videos", keep)
    LOG.info("%s\n\n%s", chains, note)
    LOG.info("results in %s", out)
    return results


def _policy_folder(agent: str) -> Path:
    try:
        return resolve_source(agent)
    except artifact.ArtifactError as error:
        raise artifact.ArtifactError(
            f"policy={agent}: not random, not expert, and {error}; python -m step3_defi.train makes a policy"
        ) from error


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def plain_keys(arguments: list[str]) -> list[str]:
    """`policy` and `tasks` are also config groups, whose values Hydra would look up as files: a policy's folder and a
    list of tasks are put where they mean themselves."""
    rules = ((r"^policy=", "agent="), (r"^tasks=\[", "tasks.tasks=["))
    for pattern, replacement in rules:
        arguments = [re.sub(pattern, replacement, argument) for argument in arguments]
    return arguments


@program("step3_eval", RolloutError)
def main(cfg: DictConfig) -> None:
    env_config = OmegaConf.to_container(cfg.env, resolve=True)
    if cfg.scene is not None:
        env_config["scene"] = cfg.scene
    evaluate(
        env_config=env_config,
        agent=str(cfg.agent),
        planner=cfg.planner,
        tasks=list(cfg.tasks.tasks) if cfg.tasks.tasks else None,
        sequences=cfg.sequences,
        length=cfg.length,
        horizon=cfg.horizon,
        workers=cfg.workers,
        seed=cfg.seed,
        out=Path(cfg.out),
        films=OmegaConf.to_container(cfg.films),
        response_timeout=cfg.response_timeout,
    )


if __name__ == "__main__":
    sys.argv[1:] = plain_keys(sys.argv[1:])
    main()
