"""One run of the guest benchmark: a process whose standard output is the console."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Result", "Run", "parse_line", "run_once"]

_RESULT = re.compile(r"^([a-z0-9]+\.\w+) (-?[0-9.]+(?:e[-+]?\d+)?) (\S+)(?: ([0-9a-f]{8}))?$")
# Firmware may leave terminal escapes in front of the first line.
_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|c)")
_AT_INIT = "boot.kernel_uptime_at_init"


@dataclass(frozen=True)
class Result:
    value: float
    unit: str
    check: str = ""
    """Folds what was computed: the same on every machine."""


@dataclass
class Run:
    """What one run printed, and what it cost the host.

    Beside the benchmark's own lines, ``results`` has

    boot.wall_to_init  s     from the start of the process to the first line of init
    boot.wall_total    s     from its start to its end
    host.cpu_time      s     processor time of the process, all threads
    host.other_load    CPUs  processor time that everything else used, per second:
                             above a few hundredths the run shared the machine
    host.rss_at_init   MiB   resident memory of the process when init starts
    host.rss_peak      MiB   the largest resident memory
    host.clock_ratio   x     guest-measured over host-measured benchmark time: far
                             from 1, the guest's clock and so its figures are wrong
    """

    results: dict[str, Result] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    finished: bool = False
    tail: list[str] = field(default_factory=list)
    """The last lines of the console, for a run that did not finish."""


def parse_line(text: str) -> tuple[str, Result] | None:
    match = _RESULT.match(text)
    if match is None:
        return None
    name, value, unit, check = match.groups()
    return name, Result(float(value), unit, check or "")


def run_once(command: Sequence[str], timeout: float, echo: bool = False) -> Run:
    """Runs ``command`` to its end, or for ``timeout`` seconds."""
    run = Run()
    begun_at: float | None = None
    start, busy = time.monotonic(), _busy_seconds()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        process.kill()

    timer = threading.Timer(timeout, stop)
    timer.start()
    try:
        for raw in process.stdout or ():
            at = time.monotonic()
            text = _ESCAPE.sub("", raw.decode("utf-8", "replace").strip("\r\n")).strip()
            if echo:
                print(text, file=sys.stderr, flush=True)
            run.tail = [*run.tail[-19:], text]
            if (result := parse_line(text)) is not None:
                run.results[result[0]] = result[1]
                if result[0] == _AT_INIT:
                    run.results["boot.wall_to_init"] = Result(at - start, "s")
                    if (rss := _rss_mib(process.pid)) is not None:
                        run.results["host.rss_at_init"] = Result(rss, "MiB")
            elif text.startswith("# "):
                run.remarks.append(text[2:])
                if text.startswith("# begin "):
                    begun_at = at
                run.finished |= text.startswith(("# end elapsed=", "# guest exit"))
                if text.startswith("# end elapsed=") and begun_at is not None:
                    ratio = float(text.partition("=")[2]) / max(at - begun_at, 1e-9)
                    run.results["host.clock_ratio"] = Result(ratio, "x")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        timer.cancel()
        if process.returncode is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    wall, cpu = time.monotonic() - start, usage.ru_utime + usage.ru_stime
    run.results["boot.wall_total"] = Result(wall, "s")
    run.results["host.cpu_time"] = Result(cpu, "s")
    other = max(0.0, _busy_seconds() - busy - cpu) / wall
    run.results["host.other_load"] = Result(other, "CPUs")
    run.results["host.rss_peak"] = Result(usage.ru_maxrss / 1024, "MiB")
    if timed_out.is_set():
        run.finished = False
        run.remarks.append(f"stopped after {timeout:g} s")
    elif process.returncode:
        run.finished = False
        run.remarks.append(f"exit code {process.returncode}")
    return run


def _rss_mib(pid: int) -> float | None:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def _busy_seconds() -> float:
    """Processor time used on this host since it started, idle time left out."""
    with open("/proc/stat") as file:
        fields = [int(word) for word in file.readline().split()[1:]]
    idle = fields[3] + fields[4]
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")
