"""Record demonstrations of the scripted expert in CALVIN's format, together with a video set for steps 1 and 2.

The expert carries out chains of tasks without a reset between them. Attempts that fail are dropped, so `episodes`
counts successful demonstrations. With env=playtable_hand the images show a person's hand instead of the robot: then
only the video set of the static camera is written, without actions, as a second source of human video. A recording that
was killed continues with the same command.

Examples:
    python -m envs.record scene=A tasks=eleven episodes=1400 out=data/playtable/A workers=2
    python -m envs.record env=playtable_hand 'scene=[A,B,C]' tasks=eleven episodes=600 out=data/playtable/hand
    python -m envs.record env=calvin scene=D tasks=all episodes=100 out=data/calvin_scripted/D
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from common.files import write_json
from common.program import program
from envs.recording.recorder import record

log = logging.getLogger(__name__)


@program("record")
def main(cfg: DictConfig) -> None:
    # SIGTERM has to end the workers as well, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    config = OmegaConf.to_container(cfg, resolve=True)
    out = Path(cfg.out)
    counts = record(
        scenes=[config["scene"]] if isinstance(config["scene"], str) else config["scene"],
        tasks=config["tasks"],
        episodes=cfg.episodes,
        out=out,
        env=config["env"],
        length=cfg.length,
        workers=cfg.workers,
        seed=cfg.seed,
        validation_fraction=cfg.validation_fraction,
        videos=cfg.videos,
        actions=cfg.actions,
    )
    summary = {**counts, "config": OmegaConf.to_container(cfg)}
    write_json(out / "recording.json", summary)
    log.info(
        "%d episodes, %d frames, %d failed attempts dropped; written to %s",
        counts["episodes"],
        counts["frames"],
        counts["failed"],
        out,
    )


if __name__ == "__main__":
    main()
