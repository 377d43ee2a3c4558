"""The journal of a rollout: one line for each sequence, on disk before the next line, so that a killed run resumes.

rollouts.jsonl      one Record for each finished sequence
rollouts.<r>.jsonl  the part of process r, while several processes share the work
.claims/<index>     which sequences a process of the current run has claimed
settings.json       what the records were made with; records of other settings are never mixed in
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

from common.errors import UserError
from common.files import write_json, write_text

JOURNAL_FILE = "rollouts.jsonl"
SETTINGS_FILE = "settings.json"
FORMAT = 2  # of the settings and of the keys in them; a folder of another format is refused


class JournalError(UserError):
    """A journal that is missing, cannot be read, or belongs to another evaluation."""


class Record(TypedDict):
    """One finished sequence. It ends at its first failure, so `steps_to_success` may be shorter than `tasks`."""

    index: int
    initial_state: dict
    tasks: list[str]
    steps_to_success: list[int | None]  # None for a sub-task that was not done within the horizon
    clipped: int  # control steps whose action left [-1, 1]
    seed: int


def read(path: str | Path) -> dict[int, Record]:
    """The records of a journal file, by index and in its order. An unfinished last line is ignored.

    Raises JournalError where there is no file, or a line that is no record.
    """
    path = Path(path)
    if not path.is_file():
        raise JournalError(f"{path}: there is no journal; step3_defi.eval writes one")
    records: dict[int, Record] = {}
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[int(record["index"])] = {key: record[key] for key in Record.__annotations__}
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(
                f"{path}, line {number}: this is no rollout record ({error!r}); remove the line or the file"
            ) from error
    return dict(sorted(records.items()))


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings that a folder's journal was made with. Raises JournalError where they are missing or outdated."""
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise JournalError(f"{path}: there are no settings; step3_defi.eval writes them next to the journal")
    try:
        settings = json.loads(path.read_text())
        found = settings.get("format")
    except (ValueError, AttributeError) as error:
        raise JournalError(f"{path}: these are no settings ({error}); roll out again with another out=") from error
    if found != FORMAT:
        raise JournalError(
            f"{folder} holds rollouts of another version of this program (format {found}, format {FORMAT} is needed): "
            "choose another out= or delete it, and roll out again"
        )
    return settings


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Lock a folder for one run. Raises JournalError where another run holds it. A killed run releases its lock."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise JournalError(
            f"{folder}: another run is writing its journal; wait until it ends, or choose another out="
        ) from error


class Journal:
    """A journal file that one process appends to. Opening it removes an unfinished last line."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")  # noqa: SIM115  (closed by __exit__)
        self.file.seek(0)
        content = self.file.read()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            self.file.truncate(complete)
            self._sync()
        self.records = read(self.path)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def append(self, record: Record) -> None:
        """Add a record. It is on disk when this returns."""
        self.file.write(_line(record))
        self._sync()
        self.records[record["index"]] = record

    def _sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


class Claims:
    """Divides sequences among processes that share a folder: the process that creates a sequence's file owns it."""

    def __init__(self, folder: Path):
        self.folder = folder / ".claims"

    def clear(self) -> None:
        """Remove all claims. Done before the work begins, because a killed run leaves its claims, and after it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def acquire(self, index: int) -> bool:
        """Claim a sequence; returns False where it is claimed already."""
        self.folder.mkdir(exist_ok=True)
        try:
            (self.folder / str(index)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def count(self) -> int:
        """How many sequences are claimed, by all processes together."""
        return len(os.listdir(self.folder))


def part_path(folder: Path, rank: int, num_processes: int) -> Path:
    """The file that process `rank` writes."""
    return folder / (JOURNAL_FILE if num_processes == 1 else f"rollouts.{rank}.jsonl")


def bind_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new folder, or check that an old folder has the same.

    Raises JournalError where the folder holds rollouts of other settings, or of another version of this program.
    """
    settings = json.loads(json.dumps({"format": FORMAT, **settings}))
    if not (folder / SETTINGS_FILE).is_file():
        if any(folder.glob("rollouts*.jsonl")):
            raise JournalError(f"{folder} holds rollouts without {SETTINGS_FILE}: choose another out= or delete it")
        write_json(folder / SETTINGS_FILE, settings)
        return
    recorded = read_settings(folder)
    for key in sorted(set(recorded) | set(settings)):
        if recorded.get(key) != settings.get(key):
            raise JournalError(
                f"{folder} holds rollouts of other settings ({key} is {_short(recorded.get(key))} there and "
                f"{_short(settings.get(key))} now): choose another out= or delete it"
            )


def merge(folder: Path) -> dict[int, Record]:
    """Bring the parts of all processes into one sorted `rollouts.jsonl` and return its records."""
    parts = sorted(folder.glob("rollouts.*.jsonl"))
    records: dict[int, Record] = {}
    for path in [folder / JOURNAL_FILE, *parts]:
        if path.is_file():
            records.update(read(path))
    records = dict(sorted(records.items()))
    write_text(folder / JOURNAL_FILE, b"".join(map(_line, records.values())).decode())
    for path in parts:
        path.unlink()
    return records


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
