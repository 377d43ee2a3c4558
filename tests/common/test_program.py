"""Programs: one line for bad input, a traceback for a bug, and a help that can be read before anything is run."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from common.errors import MissingFileError, UnreadableSample, UserError
from common.program import CONFIGS, help_text, program, split_docstring

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = '''"""Sums two numbers.

Examples:
    python -m sums a=1
"""
import torch
from common.program import program

@program("missing")
def main(cfg):
    torch.cat([torch.ones(1), torch.ones(1, 1)])

main()
'''


def refuse(message: str) -> None:
    raise UserError(message)


def started(body: Callable[[DictConfig], Any], *expected: type[Exception]) -> Callable[[DictConfig], None]:
    """`body` as the main function of a program, called with a config that is composed already."""
    return program("missing", *expected)(functools.wraps(body)(lambda cfg: body(cfg))).__wrapped__


def fails(error: Exception) -> Callable[[DictConfig], None]:
    def body(cfg: DictConfig) -> None:
        raise error

    return body


IN_A_TARGET = {"_target_": f"{__name__}.refuse", "message": "models: two are too many"}
CFG = OmegaConf.create({"models": "???"})


@pytest.mark.parametrize(
    "body, line",
    [
        (fails(UserError("models: two are too many")), "models: two are too many"),
        (fails(MissingFileError("x.json: no such file")), "x.json: no such file"),
        (lambda cfg: instantiate(IN_A_TARGET), "models: two are too many"),
        (lambda cfg: cfg.models, "models is not given; add models=<value> (--help lists the keys)"),
        (fails(UserError("Caught.\nOriginal Traceback\ncommon.errors.UserError: x: torn")), "x: torn"),
    ],
)
def test_bad_input_is_one_line(body: Callable, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=f"^error: {re.escape(line)}$"):
        started(body)(CFG)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises((UserError, MissingMandatoryValue)):
        started(body)(CFG)


@pytest.mark.parametrize(
    "body, kind",
    [
        (fails(ValueError("internal")), ValueError),
        (lambda cfg: torch.softmax(torch.ones(1), "x"), TypeError),
        (lambda cfg: torch.distributions.Normal(0.0, -1.0), ValueError),
        (fails(FileNotFoundError("a bug of ours")), FileNotFoundError),
        (lambda cfg: instantiate({"_target_": "builtins.int", "_args_": ["x"]}), ValueError),
        (lambda cfg: instantiate({"_target_": "nowhere.Nothing"}), ImportError),
    ],
)
def test_a_bug_is_raised_as_it_is(body: Callable, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        started(body)(CFG)


def test_a_program_declares_what_else_it_expects() -> None:
    with pytest.raises(SystemExit, match="^error: the disk is full$"):
        started(fails(OSError("the disk is full")), OSError)(CFG)


def test_hydra_shows_the_traceback_of_a_bug_and_the_help_opens_with_the_purpose(tmp_path: Path) -> None:
    (tmp_path / "sums.py").write_text(PROGRAM)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "sums.py", *words]
        return subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, text=True, capture_output=True)

    failed, helped = run("scale=tiny", "models=[]"), run("--help")
    assert failed.returncode == 1 and "Traceback" in failed.stderr and "torch.cat" in failed.stderr
    assert helped.returncode == 0 and helped.stdout.startswith("Sums two numbers.\n\nUsage: python -m ")
    order = [helped.stdout.index(part) for part in ("Keys:", "models=", "Examples:", "python -m sums a=1")]
    assert order == sorted(order)


def test_user_errors_are_subclasses_of_the_builtin_errors() -> None:
    assert issubclass(MissingFileError, FileNotFoundError) and str(MissingFileError("x: gone")) == "x: gone"
    assert str(UnreadableSample("a/1", "torn")) == "a/1: torn"


def test_the_docstring_is_split_into_purpose_and_examples() -> None:
    doc = "Does this\nand that.\n\nMore.\n\nExamples:\n    python -m a b=1\n    python -m a c=2\n\nNotes.\n"
    assert split_docstring(doc) == ("Does this and that.", ["python -m a b=1", "python -m a c=2"])
    assert split_docstring("Only this.") == ("Only this.", [])


def programs() -> list[tuple[str, str]]:
    found = []
    for room in ("common", "envs", "step1_gfdm", "step2_gidm", "step3_defi"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if name := re.search(r'^@program\("(\w+)"', path.read_text(), flags=re.MULTILINE):
                found.append((path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."), name[1]))
    return found


@pytest.mark.parametrize("module, config", programs())
def test_every_program_has_a_help_with_keys_and_two_examples(module: str, config: str) -> None:
    doc = ast.get_docstring(ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text()))
    purpose, examples = split_docstring(doc)
    assert purpose.endswith(".") and "python -m" not in purpose, "the first paragraph says what the program does"
    assert len(examples) >= 2 and all(module in line or "scripts/" in line for line in examples)
    text = help_text({"__doc__": doc, "__name__": module}, config)
    assert "Keys:" in text and max(map(len, text.splitlines())) <= 120
    assert Path(CONFIGS, f"{config}.yaml").is_file()
