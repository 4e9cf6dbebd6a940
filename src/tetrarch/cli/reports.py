"""What commands that report print: for people, or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tetrarch.cli.options import CommandOptions
    from tetrarch.machine.machine import Machine
    from tetrarch.machine.selection import EngineInfo
    from tetrarch.machine.status import ExitStatus

__all__ = ["report_end", "show_engines"]


def show_engines(as_json: bool) -> None:
    from tetrarch.machine.selection import engines

    found = engines()
    if as_json:
        rows = [{**asdict(info), "available": info.available} for info in found]
        print(json.dumps(rows, indent=2))
        return
    for info in found:
        print(f"{info.name:<4} {_state(info)}")
        print(f"     {info.description}")
        if info.mend:
            print(f"     -> {info.mend}")
        if info.note is not None:
            print(f"     {info.note}")
        for lack in info.lacks:
            print(f"     without {lack.name}: {lack.lost}")


def _state(info: EngineInfo) -> str:
    if info.reason is not None:
        return f"not available: {info.reason}"
    return "works, but slowly; bt is faster here" if info.slow else "available"


def report_end(
    machine: Machine, status: ExitStatus, options: CommandOptions, code: int | None = None
) -> None:
    """What --stats and --json ask for, on standard error: standard output is the guest's.

    ``code`` is that of a command in the guest; else the machine's end has one.
    """
    stats, uptime = machine.stats(), machine.uptime
    if options.stats:
        _show_stats(stats, uptime)
    if options.report:
        report = {
            "name": machine.config.name,
            "engine": machine.engine,
            "status": status.reason.value,
            "detail": status.detail,
            "exit_code": status.code if code is None else code,
            "resets": machine.resets,
            "uptime_s": round(uptime, 6),
            "stats": stats,
        }
        print(json.dumps(report), file=sys.stderr, flush=True)


def _show_stats(stats: Mapping[str, Mapping[str, int]], uptime: float) -> None:
    """Counters by group."""
    lines = [f"ran for {uptime:.3f} s"]
    for group, counters in stats.items():
        # Times are counted in ns and shown in seconds.
        lines.append(group.removesuffix("_ns"))
        for name, value in sorted(counters.items(), key=lambda item: -item[1]):
            if group.endswith("time_ns"):
                lines.append(f"  {name:<28} {value / 1e9:>16.3f} s")
            else:
                lines.append(f"  {name:<28} {value:>16,}")
    print("\n".join(lines), file=sys.stderr, flush=True)
