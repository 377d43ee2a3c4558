"""Roll a policy out in a simulator and report its success on sequences of tasks, as in the paper's Table 1 (Sec. 4.2).

A run that was killed resumes with the same command. It leaves rollouts.jsonl, results.json, table.md and videos/ in
`out`. A sequence whose simulator fails twice enters no journal, and no result is written without it: the run ends with
an error that names it, and the same command tries it again. On several GPUs, start the program with
`accelerate launch -m step3_defi.eval ...`.

Examples:
    python -m step3_defi.eval policy=ckpts/defi/tiny scene=D tasks=eleven sequences=100 out=outputs/eval
    python -m step3_defi.eval policy=expert scene=A tasks=lifts length=1 out=outputs/expert
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from common import artifact
from common.contracts import ChunkPolicy
from common.distributed import SLOWEST, processes
from common.errors import check_at_least_one
from common.files import write_json, write_text
from common.program import program
from common.progress import tqdm
from common.video import write_mp4
from envs import resolve_tasks
from step3_defi.policy import resolve_source
from step3_defi.rollout import film, journal, stats
from step3_defi.rollout.handle import RolloutError
from step3_defi.rollout.journal import Claims, Journal, Record
from step3_defi.rollout.messages import Chain, ChainFailure, SequencesRequest
from step3_defi.rollout.simulators import SimulatorPool, check_same_versions

LOG = logging.getLogger(__name__)
WITHOUT_MODEL = ("random", "expert")
FILM_FPS = 15


def evaluate(
    *,
    env_config: dict[str, Any],
    policy: str,
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
    """Roll out `policy` (a folder, a hub id, "random" or "expert") and return the content of results.json.

    The other arguments are the keys of configs/step3_eval.yaml. Processes other than the main one return {}. Raises
    UserError where an argument or the folder `out` does not fit, and RolloutError where a simulator does not start or
    sequences could not be rolled out.
    """
    check_at_least_one(
        sequences=sequences,
        length=length,
        horizon=horizon,
        workers=workers,
        response_timeout=response_timeout,
    )
    folder = None if policy in WITHOUT_MODEL else _policy_folder(policy)
    sha256 = None if folder is None else artifact.sha256(folder)
    state, claims = processes(SLOWEST), Claims(out)
    with journal.exclusive_lock(out) if state.is_main_process else nullcontext():
        with SimulatorPool(
            env_config,
            count=workers,
            response_timeout=response_timeout,
            check_rendering=bool(sha256 or films["candidates"]),
        ) as simulators:
            check_same_versions(
                {f"process {rank}": versions for rank, versions in enumerate(gather_object([simulators.versions]))}
            )
            answer = simulators.get_sequences(SequencesRequest(sequences, tasks, length, seed))
            settings = {
                "world": answer.world,
                "versions": simulators.versions,
                "env": env_config,
                "policy": policy if sha256 is None else "artifact",
                "policy_sha256": sha256,
                "planner": None if sha256 is None else OmegaConf.to_container(planner, resolve=True),
                "tasks": tasks,
                "sequences": sequences,
                "sequences_sha256": _sha256(answer.sequences),
                "length": length,
                "horizon": horizon,
                "seed": seed,
            }
            if state.is_main_process:
                journal.bind_settings(out, settings)
                journal.merge(out)
                claims.clear()
            state.wait_for_everyone()
            done = journal.read(out / journal.JOURNAL_FILE)
            chains = [
                Chain(
                    index,
                    initial_state,
                    list(chain),
                    "policy" if sha256 else policy,
                    horizon,
                    seed,
                    slot=index % workers,
                    film_every=films["every"] if index < films["candidates"] else 0,
                )
                for index, (initial_state, chain) in enumerate(answer.sequences)
                if index not in done
            ]
            if chains:
                _roll_out(
                    simulators,
                    chains,
                    instantiate(planner, str(folder), device=str(state.device)) if sha256 else None,
                    out,
                    claims,
                    part=journal.part_path(out, state.process_index, state.num_processes),
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
    """Roll out the chains that this process claims. Writes their records to the journal `part`, and their films."""
    by_index = {chain.index: chain for chain in chains}
    with (
        Journal(part) as lines,
        tqdm(total=len(chains), desc=f"rollout of {total}", unit="sequence", disable=not show) as bar,
    ):
        for result in simulators.rollout(chains, policy, claims.acquire):
            bar.update(claims.count() - bar.n)  # the sequences of all processes
            if isinstance(result, ChainFailure):
                continue
            chain = by_index[result.index]
            record = Record(
                index=chain.index,
                initial_state=chain.initial_state,
                tasks=chain.tasks,
                steps_to_success=result.steps_to_success,
                clipped=result.clipped,
                seed=chain.seed,
            )
            if result.film:
                solved = stats.chain_length(record, chain.horizon)
                # Written before the journal's line, so that a sequence that counts as finished has its film.
                path = out / "videos" / film.file_name(chain.index, solved, len(chain.tasks))
                write_mp4(path, np.stack(result.film), FILM_FPS)
            lines.append(record)
            lengths = stats.chain_lengths(lines.records.values(), chain.horizon)
            rates = " ".join(f"{100 * (lengths >= k).mean():.0f}" for k in range(1, length + 1))
            bar.set_postfix_str(f"1-{length}: {rates} %, avg {lengths.mean():.2f}")


def _report(out: Path, settings: dict[str, Any], keep: int) -> dict[str, Any]:
    """Merge the journals, write results.json and table.md, delete surplus films.

    Raises RolloutError where sequences are missing.
    """
    finished = journal.merge(out)
    if missing := [index for index in range(settings["sequences"]) if index not in finished]:
        raise RolloutError(
            f"{len(missing)} of {settings['sequences']} sequences could not be rolled out because their simulators "
            f"failed twice (see above): {', '.join(map(str, missing))}; the others are in "
            f"{out / journal.JOURNAL_FILE}, and the same command tries these again"
        )
    records = list(finished.values())
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
    write_json(out / "results.json", results)
    rows = {f"{settings['policy']}, {world}, {h} steps": row for h, row in horizons.items()}
    chains = stats.chain_table(rows, length=length, paper=stats.paper_label(world))
    clipped = "{clipped:,} of {steps:,} actions left [-1, 1] and were clipped.".format_map(results["actions"])
    note = f"{len(records)} sequences of {length} in {world}; 95 % bootstrap intervals over sequences. {clipped}"
    note = f"{note} {stats.caveat(world, settings['tasks'])}".rstrip()
    tasks = f"Sub-tasks within {longest} steps (Wilson intervals):\n\n{stats.task_table(results['tasks'])}"
    write_text(out / "table.md", f"{chains}\n\n{note}\n\n{tasks}\n")
    film.prune(out / "videos", keep)
    LOG.info("%s\n\n%s", chains, note)
    LOG.info("results in %s", out)
    return results


def _policy_folder(policy: str) -> Path:
    try:
        return resolve_source(policy)
    except artifact.ArtifactError as error:
        raise artifact.ArtifactError(
            f"policy={policy} is not random, not expert, and {error}; python -m step3_defi.train makes a policy"
        ) from error


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@program("step3_eval", RolloutError)
def main(cfg: DictConfig) -> None:
    env_config = OmegaConf.to_container(cfg.env, resolve=True)
    if cfg.scene is not None:
        env_config["scene"] = cfg.scene
    evaluate(
        env_config=env_config,
        policy=str(cfg.policy),
        planner=cfg.planner,
        tasks=list(resolve_tasks(cfg.tasks)),
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
    main()
