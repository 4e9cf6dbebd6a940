"""docs/benchmarks.md: one section for each benchmark, and what it ran on."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["ROOT", "BenchError", "describe_host", "table", "version_of", "write_section"]

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "benchmarks.md"

_HEAD = """# Benchmarks

Written by `make bench`; each section by the benchmark of its name. All figures of a section are
from one run of it, with the programs it compares taking turns, so that what else happens on the
machine meets all of them. They hold for that machine: compare ratios.
"""


class BenchError(Exception):
    """A benchmark cannot run, or what it ran computed something wrong: one line."""


def write_section(name: str, text: str, document: Path = DOCUMENT) -> None:
    """Replaces the section of benchmark ``name``, or adds it."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n{text.strip()}\n{end}\n"
    old = document.read_text() if document.exists() else _HEAD
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end) + r"\n", re.DOTALL)
    new, replaced = pattern.subn(lambda _: section, old)
    if not replaced:
        new = f"{old.rstrip()}\n\n{section}"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(new)


def describe_host() -> list[tuple[str, str]]:
    """What a figure depends on: (what, which)."""
    return [
        ("Date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("Host CPU", f"{_cpu_model()}, {_cpu_count()}"),
        ("Host kernel", f"{platform.system()} {platform.release()}"),
        ("Tetrarch", _tetrarch_version()),
        ("Python", platform.python_version()),
        ("Rust", version_of("rustc", "--version").removeprefix("rustc ")),
    ]


def version_of(program: str, option: str) -> str:
    """The first line of what ``program option`` prints; "not there" without it."""
    path = shutil.which(program)
    if path is None:
        return "not there"
    done = subprocess.run([path, option], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return lines[0].strip() if lines else "unknown"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well as text; first column left, others right."""
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def _cpu_model() -> str:
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _cpu_count() -> str:
    count = sum(
        text.startswith("processor") for text in Path("/proc/cpuinfo").read_text().splitlines()
    )
    return f"{count} CPU" + "s" * (count != 1)


def _tetrarch_version() -> str:
    from tetrarch import __version__

    git = shutil.which("git")
    if git is None:
        return __version__
    done = subprocess.run(
        [git, "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    commit = done.stdout.strip()
    return f"{__version__} ({commit})" if done.returncode == 0 and commit else __version__
