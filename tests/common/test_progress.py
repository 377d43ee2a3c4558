"""Progress: whole lines where the stream is no terminal or two programs share one, tqdm's bar elsewhere."""

from __future__ import annotations

import io

import pytest

from common import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, **options: object) -> str:
    bar = progress.tqdm(total=6, desc="toy", file=stream, **options)
    for step in range(6):
        bar.update()
        bar.set_postfix(loss=step)
    bar.close()
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_plain_progress_is_lines(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFI_PLAIN_PROGRESS", "1" if terminal else "")
    written = run(Terminal() if terminal else io.StringIO())
    (line,) = written.splitlines()
    assert "\r" not in written and written.endswith("\n") and line.startswith("toy: 100% 6/6 [") and "loss=5" in line
    assert run(io.StringIO(), leave=False) == "", "a bar that would be erased prints nothing while it is short"


def test_a_long_run_prints_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 8))
    monkeypatch.setattr("common.progress.time.monotonic", lambda: next(clock))
    lines = run(io.StringIO()).splitlines()
    assert 2 < len(lines) < 8 and all(line.startswith("toy:") for line in lines)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEFI_PLAIN_PROGRESS", raising=False)
    written = run(Terminal(), mininterval=0.0)
    assert written.count("\r") > 3 and "100%|" in written


def test_messages_are_lines_of_their_own() -> None:
    stream = io.StringIO()
    bar = progress.tqdm(total=2, file=stream)
    progress.tqdm.write("skipped: a.mp4", file=stream)
    bar.update(2)
    bar.close()
    assert stream.getvalue().splitlines()[0] == "skipped: a.mp4" and "\r" not in stream.getvalue()
