"""Metrics of a training: always to metrics.jsonl, and to wandb where the user is logged in or asks for it."""

from __future__ import annotations

import json
import netrc
import os
import time
from pathlib import Path
from typing import Any

import wandb

from common.errors import UserError
from common.files import write_text


class Tracker:
    """Writes metrics, on the main process only. Lines of steps that a resumed run will repeat are removed first."""

    def __init__(self, folder: Path, step: int, options: dict[str, Any] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "metrics.jsonl"
        if file.exists():
            kept = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
            write_text(file, "".join(line + "\n" for line in kept))
        self.stream = file.open("a")
        self.run = None
        options = dict(options or {})
        mode = options.pop("mode", "auto")
        if mode not in ("auto", "online", "offline", "disabled"):
            raise UserError(f"wandb.mode is {mode!r}; use auto, online, offline or disabled")
        if mode == "auto":
            mode = "online" if logged_in() else "disabled"
        if mode != "disabled":
            self.run = wandb.init(mode=mode, name=folder.name, dir=str(folder), resume="allow", **options)

    def log(self, step: int, row: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and flush it."""
        self.stream.write(json.dumps({"step": step, "time": round(time.time(), 2), **row}) + "\n")
        self.stream.flush()
        if self.run:
            self.run.log(row, step=step)

    def close(self) -> None:
        self.stream.close()
        if self.run:
            self.run.finish()


def logged_in() -> bool:
    """Whether a wandb key is in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # an incomplete last line
