"""Tells the user how far a download is, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Reporter", "TerminalReporter"]


class Reporter:
    """Says nothing: for use from a program."""

    @contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        """What it gives takes the detail that is being done."""
        yield lambda detail: None

    @contextmanager
    def transfer(
        self, title: str, size: int, verb: str = "Fetching"
    ) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: None


class TerminalReporter(Reporter):
    """Progress bars on a terminal; one line for each step elsewhere."""

    def __init__(self) -> None:
        self._interactive = sys.stderr.isatty()

    @contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        if not self._interactive:
            print(title, file=sys.stderr, flush=True)
            yield lambda detail: None
            return
        # Said before the library that draws is there: that takes a while.
        print(f"{title} ...", end="\r", file=sys.stderr, flush=True)
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(title) as status:
            yield lambda detail: status.update(f"{title}: {escape(detail)}")

    @contextmanager
    def transfer(
        self, title: str, size: int, verb: str = "Fetching"
    ) -> Iterator[Callable[[int, int], None]]:
        if not self._interactive:
            print(f"{verb} {title} ({size / 1e6:.1f} MB)", file=sys.stderr, flush=True)
            yield lambda done, total: None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        ) as bar:
            task = bar.add_task(title, total=size)

            def advance(done: int, total: int) -> None:
                bar.update(task, completed=min(done, total), total=total)

            yield advance
