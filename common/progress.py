"""Progress bars: tqdm's in a terminal, plain lines everywhere else.

Import `tqdm` from here. Programs that run side by side in one terminal overwrite each other's bars, so scripts set
DEFI_PLAIN_PROGRESS=1 for them. Plain progress is one line every PLAIN_SECONDS and one at the end.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm import tqdm as _tqdm

PLAIN_SECONDS = 15.0


class tqdm(_tqdm):  # noqa: N801 (it is used exactly as tqdm's own class)
    """tqdm's bar, with the same arguments, which prints whole lines where the stream is no terminal."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        stream = options.get("file") or sys.stderr
        self.plain = bool(os.environ.get("DEFI_PLAIN_PROGRESS")) or not stream.isatty()
        self.last_line = time.monotonic()
        if self.plain:  # no bar, only numbers, and the time is looked at in every update
            options |= {"file": stream, "ncols": 0, "miniters": 0, "mininterval": 1.0}
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar; in plain mode print a line, unless the last one is recent."""
        if not self.plain:
            return super().display(msg, pos)
        # An empty message erases a bar. tqdm sets `disable` when it closes one, and ends its line itself afterwards.
        now = time.monotonic()
        early = now - self.last_line < PLAIN_SECONDS or self.n == self.total  # the last line is printed on closing
        if msg == "" or (early and not self.disable):
            return False
        self.last_line = now
        self.fp.write(self.format_meter(**self.format_dict) if msg is None else msg)
        self.fp.write("" if self.disable else "\n")
        self.fp.flush()
        return False

    def clear(self, nolock: bool = False) -> None:
        """Erase the bar to print something else; lines that are printed stay."""
        if not self.plain:
            super().clear(nolock=nolock)
