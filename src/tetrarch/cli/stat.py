"""``tetrarch stat``: what a machine does, once or again and again."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetrarch.errors import TetrarchError
from tetrarch.remote import RemoteMachine, connect
from tetrarch.remote.process import MachineProcess

__all__ = ["show_stat"]

_CLEAR = "\x1b[H\x1b[J"
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGESIZE")
#: What a machine that has hung up may take to end.
_END_S = 5.0


@dataclass(frozen=True)
class _Sample:
    moment: float
    """Of the host's clock, in seconds."""
    about: dict[str, Any]
    """What the machine says."""
    cpu_s: float
    """What its process has used."""
    resident: int
    """What of the host's memory it has, in bytes."""


def show_stat(name: str, as_json: bool, every: float | None) -> None:
    """Prints counters; with ``every`` until the machine ends, what came about in that time too."""
    machine = connect(name)
    last = None
    while True:
        try:
            sample = _sample(machine)
        except TetrarchError:
            if last is None or not _has_ended(machine):
                raise
            return
        report = _report(machine.name, sample, last)
        if as_json:
            print(json.dumps(report), flush=True)
        else:
            clear = _CLEAR if every is not None and sys.stdout.isatty() else ""
            print(clear + _text(report), flush=True)
        if every is None:
            return
        last = sample
        time.sleep(every)


def _has_ended(machine: RemoteMachine) -> bool:
    """A machine that ends hangs up before its process is gone."""
    with MachineProcess(machine.about) as process:
        return process.wait(_END_S)


def _sample(machine: RemoteMachine) -> _Sample:
    about = machine.execute("x-stats", timeout=10)
    cpu_s, resident = _process(machine.about.pid)
    return _Sample(time.monotonic(), about, cpu_s, resident)


def _process(pid: int) -> tuple[float, int]:
    """CPU time and resident memory (proc(5))."""
    try:
        # The second field, a name in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0
    return (int(fields[11]) + int(fields[12])) / _TICKS, int(fields[21]) * _PAGE


def _report(name: str, sample: _Sample, last: _Sample | None) -> dict[str, Any]:
    report = {
        "name": name,
        **sample.about,
        "host": {"cpu_s": round(sample.cpu_s, 2), "resident_bytes": sample.resident},
    }
    if last is None:
        return report
    passed = sample.moment - last.moment
    report["host"]["cpu_percent"] = round(100 * (sample.cpu_s - last.cpu_s) / passed, 1)
    before = last.about["stats"]
    report["per_s"] = {
        group: {
            # A counter that is less than before began anew, with a reset.
            counter: round(max(0, value - before.get(group, {}).get(counter, 0)) / passed, 1)
            for counter, value in counters.items()
        }
        for group, counters in sample.about["stats"].items()
    }
    return report


def _text(report: dict[str, Any]) -> str:
    host = report["host"]
    cpu = f"{host['cpu_percent']} %" if "cpu_percent" in host else f"{host['cpu_s']} s"
    lines = [
        f"{report['name']}: {report['status']}, ran for {report['uptime_s']:.1f} s on "
        f"{report['engine']}; CPU {cpu}, {host['resident_bytes'] >> 20} MiB of the host's memory"
    ]
    rates = report.get("per_s", {})
    for group, counters in report["stats"].items():
        lines.append(group.removesuffix("_ns"))
        for counter, value in sorted(counters.items(), key=lambda item: -item[1]):
            # Times are counted in ns and shown in seconds.
            shown = f"{value / 1e9:>16.3f} s" if group.endswith("time_ns") else f"{value:>16,}"
            rate = rates.get(group, {}).get(counter)
            if rate is None:
                more = ""
            elif group.endswith("time_ns"):
                more = f"  {rate / 1e9:>12.3f} s/s"
            else:
                more = f"  {rate:>12,.0f} /s"
            lines.append(f"  {counter:<28} {shown}{more}")
    return "\n".join(lines)
