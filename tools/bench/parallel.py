"""What a second virtual CPU gives, and what many cost: engine bt against itself.

A Debian on a disk does the same work with one virtual CPU and with two, and a small guest boots
with one, four and sixteen. The machines take turns. A second virtual CPU can be worth something
only on a host with two CPUs that are otherwise idle, and where these are threads of one core, as
much as that gives: the host itself does the work too, on one of its CPUs and on two.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.bench.installed import debian_disk
from tools.bench.report import BenchError, describe_host, table, write_section

from tetrarch import Machine, TetrarchError
from tetrarch.images.store import InstalledDisk

HELP = "the same work with one virtual CPU and with two, and boots with many"

#: How many times as fast each row is with two virtual CPUs, at least.
LEAST = 1.8
#: Virtual CPUs -> how many times the time of one CPU's boot, at most.
BOOTS = {4: 2.0, 16: 4.0}
#: An idle guest with so many virtual CPUs takes at most so much of one CPU of the host.
IDLE_CPUS, IDLE_MOST = 4, 0.05
_SETTLE_S, _IDLE_S = 10, 10

_LOOPS = Path(__file__).with_name("parallel_loops.c")
_FILES = 24
_FUNCTION = """int fN(const char *s, double *d)
{
	char b[64];
	double t = N;
	for (int i = 0; i < 64; i++) {
		t += d[i] * s[i];
		b[i] = (char)t;
		d[i] /= t + N;
	}
	return printf(s, b, t);
}
"""
_PROMPT = "root@tetrarch"
# What each row runs in the guest, in /root/work; its amount for a second or more on one CPU.
ROWS = {
    "stress-ng --matrix 2": "stress-ng --quiet --matrix 2 --matrix-ops 6000",
    "pthread spin lock, two threads": "./loops spin 1200000",
    "futex ping-pong, two pairs": "./loops futex 200000",
    f"make -j2, {_FILES} files of C": "make --silent clean && make --silent -j2",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, help="of each machine; medians [3]")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one answer [600]")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    if len(os.sched_getaffinity(0)) < 2:
        raise BenchError("two virtual CPUs need two CPUs of the host")
    for tool, package in (("gcc", "gcc libc6-dev"), ("stress-ng", "stress-ng")):
        if shutil.which(tool) is None:
            raise BenchError(f"no {tool}; install it: apt-get install {package}")
    disk = debian_disk("bench-c", ("gcc", "libc6-dev", "make", "stress-ng"))
    work: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    host: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    boots: dict[int, list[float]] = {cpus: [] for cpus in (1, *BOOTS)}
    idle: list[float] = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        project = Path(scratch, "work")
        _write_project(project)
        for number in range(1, arguments.rounds + 1):
            print(f"bench: round {number} of {arguments.rounds}", file=sys.stderr)
            try:
                for cpus, rounds in work.items():
                    rounds.append(_work(disk, cpus, project, arguments.timeout))
                for cpus, rounds in host.items():
                    rounds.append(_on_host(cpus, project, arguments.timeout))
                for cpus, seconds in boots.items():
                    seconds.append(_boot(cpus, arguments.timeout))
                idle.append(_idle(arguments.timeout))
            except TetrarchError as error:
                raise BenchError(str(error)) from error
    taken = _medians(work)
    native = _medians(host)
    booted = {cpus: statistics.median(seconds) for cpus, seconds in boots.items()}
    gains = {row: taken[1][row] / taken[2][row] for row in ROWS}
    hosts = {row: native[1][row] / native[2][row] for row in ROWS}
    costs = {cpus: booted[cpus] / booted[1] for cpus in BOOTS}
    share = statistics.median(idle)
    if arguments.json:
        print(json.dumps({"gains": gains, "host": hosts, "boots": costs, "idle": share}, indent=2))
    else:
        text = _report(taken, gains, hosts, booted, share, arguments)
        print(text)
        write_section("parallel", text)
    kept = all(costs[cpus] <= most for cpus, most in BOOTS.items()) and share <= IDLE_MOST
    return 0 if kept and min(gains.values()) >= LEAST else 1


def _write_project(project: Path) -> None:
    """What the guest works on: the loops, built here as they run there, and files to compile."""
    project.mkdir()
    command = ["gcc", "-O2", "-pthread", "-static", "-o", str(project / "loops"), str(_LOOPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}")
    objects = " ".join(f"part{n}.o" for n in range(_FILES))
    (project / "Makefile").write_text(
        f"CFLAGS = -O2\nall: {objects}\nclean:\n\trm -f {objects}\n.PHONY: all clean\n"
    )
    body = "".join(_FUNCTION.replace("N", str(n)) for n in range(40))
    for n in range(_FILES):
        (project / f"part{n}.c").write_text(f"#include <stdio.h>\n{body}")


def _work(disk: InstalledDisk, cpus: int, project: Path, timeout: float) -> dict[str, float]:
    """Seconds for each row in a Debian with so many virtual CPUs."""
    with Machine(
        engine="bt",
        kernel=disk.kernel,
        initrd=disk.initrd,
        append=disk.manifest.append,
        disk=f"{disk.disk},snapshot=on",
        cpus=cpus,
        memory="1G",
        agent=True,
    ) as vm:
        vm.start()
        vm.exec(["systemctl", "is-system-running", "--wait"], timeout=timeout)
        vm.copy_in(project, "/root/work")
        return {row: _timed(vm, command, timeout) for row, command in ROWS.items()}


def _medians(done: dict[int, list[dict[str, float]]]) -> dict[int, dict[str, float]]:
    return {
        cpus: {row: statistics.median(one[row] for one in rounds) for row in ROWS}
        for cpus, rounds in done.items()
    }


def _on_host(cpus: int, project: Path, timeout: float) -> dict[str, float]:
    """The same on so many CPUs of the host."""
    mine = sorted(os.sched_getaffinity(0))[:cpus]
    found = {}
    for row, command in ROWS.items():
        begun = time.monotonic()
        done = subprocess.run(
            ["taskset", "-c", ",".join(map(str, mine)), "sh", "-c", command],
            cwd=project,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise BenchError(f"{command} ended with {done.returncode}: {done.stderr.strip()}")
        found[row] = time.monotonic() - begun
    return found


def _timed(vm: Machine, command: str, timeout: float) -> float:
    begun = time.monotonic()
    done = vm.exec(["sh", "-c", f"cd /root/work && {command}"], timeout=timeout)
    if done.code:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise BenchError(f"{command} ended with {done.code}: {said}")
    return time.monotonic() - begun


def _boot(cpus: int, timeout: float) -> float:
    """Seconds from a machine's start to its guest's shell."""
    with Machine(engine="bt", cpus=cpus) as vm:
        begun = time.monotonic()
        vm.start()
        vm.console.expect(_PROMPT, timeout)
        return time.monotonic() - begun


def _idle(timeout: float) -> float:
    """What an idle guest takes, of one CPU of the host."""
    with Machine(engine="bt", cpus=IDLE_CPUS) as vm:
        vm.start()
        vm.console.expect(_PROMPT, timeout)
        time.sleep(_SETTLE_S)
        # This process is the machine; of itself it sleeps.
        before = time.process_time()
        time.sleep(_IDLE_S)
        return (time.process_time() - before) / _IDLE_S


def _report(
    taken: dict[int, dict[str, float]],
    gains: dict[str, float],
    hosts: dict[str, float],
    booted: dict[int, float],
    share: float,
    arguments: argparse.Namespace,
) -> str:
    rows: list[Sequence[str]] = [
        (row, f"{taken[1][row]:.2f}", f"{taken[2][row]:.2f}", f"{gain:.2f}", f"{hosts[row]:.2f}")
        for row, gain in gains.items()
    ]
    boots: list[Sequence[str]] = [
        (str(cpus), f"{seconds:.2f}", f"{seconds / booted[1]:.2f}", _most(cpus))
        for cpus, seconds in booted.items()
    ]
    return "\n\n".join(
        [
            "## Several virtual CPUs",
            f"`python -m tools.bench parallel`: engine bt, medians of {arguments.rounds} "
            f"interleaved rounds. The work is the same with one virtual CPU and with two; promised "
            f"is that each row runs at least {LEAST:g} times as fast.",
            table(("", ""), describe_host()),
            table(("seconds", "1 virtual CPU", "2", "gain", "the host's own"), rows),
            "From a machine's start to the shell of Debian's cloud kernel:",
            table(("virtual CPUs", "seconds", "ratio", "promised"), boots),
            f"An idle guest with {IDLE_CPUS} virtual CPUs takes {share:.1%} of one CPU of the "
            f"host; promised are at most {IDLE_MOST:.0%}.",
        ]
    )


def _most(cpus: int) -> str:
    return f"≤ {BOOTS[cpus]:g}" if cpus in BOOTS else ""
