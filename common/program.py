"""How a program starts: Hydra reads its config, and bad input ends it with one clear line instead of a traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from common.loop import NonFiniteLoss
from common.mixture import TooManyUnreadable

CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")
EXPECTED = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NonFiniteLoss,
    TooManyUnreadable,
)  # what our own checks raise: their messages say it all


def program(config_name: str, *also: type[Exception]) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorate `main(cfg)`. HYDRA_FULL_ERROR=1 brings the traceback of an expected error back."""

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @hydra.main(version_base=None, config_path=CONFIGS, config_name=config_name)
        @functools.wraps(main)
        def run(cfg: DictConfig) -> None:
            try:
                main(cfg)
            except (*EXPECTED, *also) as error:
                if os.environ.get("HYDRA_FULL_ERROR") == "1":
                    raise
                sys.exit(f"error: {_said(error)}")
            except InstantiationException as error:
                if os.environ.get("HYDRA_FULL_ERROR") == "1" or not isinstance(error.__cause__, EXPECTED):
                    raise
                sys.exit(f"error: {error.__cause__}")

        return run

    return decorate


def _said(error: Exception) -> str:
    """Its message; where a worker of a loader raised it, torch writes that worker's traceback before it."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if "\nOriginal Traceback" in text else text
