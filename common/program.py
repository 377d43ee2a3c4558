"""How a program starts: Hydra reads its config, `--help` explains it, and bad input ends it with one line.

A program is a module with `@program("<config>") def main(cfg)`. Its docstring is its help: the first paragraph says
what it does, and a section "Examples:" holds command lines. The keys and the config groups are read from the config.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from common import rows
from common.errors import NonFiniteLoss, UserError

CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")
EXPECTED = (UserError, NonFiniteLoss, MissingMandatoryValue)  # their message is enough without a traceback
WIDTH = 100  # columns of the help
rows.register()


def program(
    config_name: str, *expected: type[Exception]
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorate `main(cfg)`, the entry point of a program whose config is configs/<config_name>.yaml.

    `expected` are exceptions, besides EXPECTED, that end the program with one line and exit status 1. All others keep
    their traceback, and HYDRA_FULL_ERROR=1 keeps it for the expected ones as well.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run(cfg: DictConfig) -> None:
            try:
                main(cfg)
            except (*EXPECTED, *expected, InstantiationException) as error:
                cause = root_cause(error)
                if isinstance(cause, (*EXPECTED, *expected)) and os.environ.get("HYDRA_FULL_ERROR") != "1":
                    sys.exit(f"error: {_message(cause)}")
                raise cause from cause.__cause__  # Hydra would hide the traceback of an InstantiationException

        start = hydra.main(version_base=None, config_path=CONFIGS, config_name=config_name)(run)

        @functools.wraps(run)
        def start_or_help() -> None:
            if {"-h", "--help"} & set(sys.argv[1:]):
                sys.stdout.write(help_text(main.__globals__, config_name))
            else:
                start()

        return start_or_help

    return decorate


def root_cause(error: BaseException) -> BaseException:
    """`error`, or what made `hydra.utils.instantiate` fail where that raised it."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _message(error: Exception) -> str:
    """The message of an error. Where a worker of a DataLoader raised it, torch writes the worker's traceback first."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not given; add {error.full_key}=<value> (--help lists the keys)"
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if "\nOriginal Traceback" in text else text


def help_text(module: dict[str, object], config_name: str) -> str:
    """What `--help` prints: purpose, main keys, examples, config groups. `module` holds the globals of the program."""
    purpose, examples = split_docstring(str(module["__doc__"] or ""))
    spec = module.get("__spec__")
    name = getattr(spec, "name", None) or str(module["__name__"])
    sections = [
        "\n".join(textwrap.wrap(purpose, WIDTH)),
        f"Usage: python -m {name} [key=value ...] [group=option ...]",
        _table("Keys", list(_keys(config_name))),
        "Examples:\n" + "\n".join(f"  {line}" for line in examples) if examples else "",
        _table("Config groups", list(_groups(config_name))),
        "--cfg job prints the composed config and runs nothing; a key inside it is set by its path, as in a.b=value.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def split_docstring(doc: str) -> tuple[str, list[str]]:
    """(first paragraph on one line, lines of the section "Examples:") of a module docstring."""
    purpose = " ".join(doc.strip().split("\n\n")[0].split())
    section = re.search(r"^Examples:\n+((?:[ \t]+\S.*\n?)+)", doc, flags=re.MULTILINE)
    return purpose, [line.strip() for line in section[1].splitlines()] if section else []


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    indent = min(34, max(len(left) for left, _ in rows) + 4)
    lines = []
    for left, right in rows:
        first = f"  {left}".ljust(indent)
        if len(first) > indent:
            lines.append(first)
            first = " " * indent
        lines += textwrap.wrap(
            right, WIDTH, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
        ) or [first.rstrip()]
    return f"{title}:\n" + "\n".join(lines)


def _keys(config_name: str) -> Iterator[tuple[str, str]]:
    """key=default and the comment beside it, for every commented top-level key of a program's own config file."""
    for line in (Path(CONFIGS) / f"{config_name}.yaml").read_text().splitlines():
        found = re.match(r"(\w+):\s*(.*?)\s*#\s*(.+)$", line)
        if found and found[1] not in ("defaults", "hydra"):
            yield f"{found[1]}={found[2]}" if found[2] else found[1], found[3]


def _groups(config_name: str) -> Iterator[tuple[str, str]]:
    """Group=default and its options, for the groups in a program's defaults list and for the groups inside them."""
    config = OmegaConf.to_container(OmegaConf.load(Path(CONFIGS) / f"{config_name}.yaml"), resolve=False)
    for entry in config.get("defaults", []):
        for group, default in entry.items() if isinstance(entry, dict) else ():
            group = re.split(r"[ @]", group.removeprefix("override ").removeprefix("optional "))[0]
            if group == "experiment":
                step = config_name.partition("_")[2]  # of step1_gfdm, step2_gidm, step3_defi
                yield "experiment", " ".join(row for row in rows.load() if row.startswith(f"{step}/"))
            folder = Path(CONFIGS) / group.lstrip("/")
            for place in [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]:
                options = " ".join(sorted(path.stem for path in place.glob("*.yaml")))
                if options:
                    inner = place.relative_to(CONFIGS).as_posix()
                    yield f"{inner}={default}" if place == folder else inner, options
