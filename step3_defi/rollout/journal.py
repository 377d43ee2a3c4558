"""The journal of a rollout: one line a sequence, on disk before the next begins, so that a killed run goes on (DESIGN
6).

rollouts.jsonl     {"index", "initial_state", "tasks", "steps_to_success", "clipped", "seed"} a line
rollouts.<r>.jsonl the part of process r while several processes share the work
.claims/<index>    which sequences of a run under way are taken, by whichever process
settings.json      what the lines were made with; lines of other settings are never mixed in
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

from filelock import FileLock, Timeout

from common.files import write_text

NAME = "rollouts.jsonl"
SETTINGS = "settings.json"
UNKNOWN = {"clipped": None}  # what journals older than a key say


class JournalError(ValueError):
    """A journal that cannot be read, or that belongs to another evaluation."""


class Record(TypedDict):
    """One sequence. A chain ends at its first failure, so `steps_to_success` may be shorter than `tasks`."""

    index: int
    initial_state: dict
    tasks: list[str]
    steps_to_success: list[int | None]  # None where the longest horizon was not enough
    clipped: int | None  # control steps whose action left [-1, 1]; None in journals that did not count them
    seed: int


def read(path: str | Path) -> dict[int, Record]:
    """Journal file -> records by index, in order; a last line without its newline was never finished and is left out.

    Raises FileNotFoundError, and JournalError naming the line that is no record.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no journal; step3_defi.eval writes one")
    records: dict[int, Record] = {}
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            record = {**UNKNOWN, **json.loads(line)}
            records[int(record["index"])] = {key: record[key] for key in Record.__annotations__}
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(
                f"{path}, line {number}: no rollout record ({error!r}); remove the line or the file"
            ) from error
    return dict(sorted(records.items()))


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings that a folder's journal was made with."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no settings; step3_defi.eval writes them beside the journal")
    return json.loads(path.read_text())


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold a folder for one run. Raises JournalError where another one has it; a run that was killed has none."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise JournalError(
            f"{folder}: another run is writing its journal; wait for its end, or choose another out="
        ) from error


class Journal:
    """Append-only, for one process. Opening it cuts a torn last line off."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")  # noqa: SIM115  (closed by __exit__)
        self.file.seek(0)
        content = self.file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self.file.truncate(whole)
            self._sync()
        self.records = read(self.path)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def append(self, record: Record) -> None:
        """On disk when this returns."""
        self.file.write(_line(record))
        self._sync()
        self.records[record["index"]] = record

    def _sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


class Claims:
    """Who works on which sequence, where several processes share a folder: a sequence is theirs who make its file
    first."""

    def __init__(self, folder: Path):
        self.folder = folder / ".claims"

    def clear(self) -> None:
        """Before the work begins, for a run that was killed leaves its claims, and after it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def acquire(self, index: int) -> bool:
        """Whether the sequence is the caller's from now on."""
        self.folder.mkdir(exist_ok=True)
        try:
            (self.folder / str(index)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def taken(self) -> int:
        """How many sequences are somebody's."""
        return len(os.listdir(self.folder))


def part(folder: Path, rank: int, world: int) -> Path:
    """Where process `rank` of `world` writes."""
    return folder / (NAME if world == 1 else f"rollouts.{rank}.jsonl")


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Bind a folder to settings. Raises JournalError where it already holds rollouts of others."""
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        if any(folder.glob("rollouts*.jsonl")):
            raise JournalError(f"{folder} holds rollouts without {SETTINGS}: choose another out= or delete it")
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    there = json.loads(path.read_text())
    for key in sorted(set(there) | set(settings)):
        if there.get(key) != settings.get(key):
            raise JournalError(
                f"{folder} holds rollouts of other settings ({key}: {_short(there.get(key))} there, "
                f"{_short(settings.get(key))} asked): choose another out= or delete it"
            )


def merge(folder: Path) -> dict[int, Record]:
    """Bring the parts of all processes into one sorted `rollouts.jsonl` and return its records."""
    parts = sorted(folder.glob("rollouts.*.jsonl"))
    records: dict[int, Record] = {}
    for path in [folder / NAME, *parts]:
        if path.is_file():
            records.update(read(path))
    records = dict(sorted(records.items()))
    write_text(folder / NAME, b"".join(map(_line, records.values())).decode())
    for path in parts:
        path.unlink()
    return records


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
