"""The line that moves on a terminal."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """One line on a terminal that is written again and again; silent in a file or a pipe."""

    def __init__(self) -> None:
        self.moves = sys.stdout.isatty()
        self.length = 0
        self.due = 0.0

    def is_due(self) -> bool:
        """Whether it may be redrawn now: at most ten times a second."""
        return self.moves and time.monotonic() >= self.due

    def show(self, text: str, important: bool = False) -> None:
        """Replace the line, at most ten times a second unless it is important."""
        if self.is_due() or (important and self.moves):
            print("\r" + text.ljust(self.length), end="", flush=True)
            self.length, self.due = len(text), time.monotonic() + 0.1

    def clear(self) -> None:
        """Take the line away; in a file or a pipe there is none."""
        if self.length:
            print("\r" + " " * self.length, end="\r", flush=True)
        self.length = 0

    def end(self, text: str = "") -> None:
        """Replace the line for good; in a file or a pipe this is all that is printed."""
        if self.length or text:
            print(("\r" if self.length else "") + text.ljust(self.length), flush=True)
        self.length = 0
