"""The guest benchmark: natively, under QEMU's TCG, and under engine bt.

The three take turns, run by run, so that whatever else the host does meets all
of them. Every check value must be the one that native execution computes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench import compare
from tools.bench.compare import Median
from tools.bench.process import Run, run_once
from tools.bench.report import (
    ROOT,
    BenchError,
    describe_host,
    table,
    version_of,
    write_section,
)

HELP = "the guest benchmark against QEMU's TCG and native execution"

SOURCES = ROOT / "bench" / "guest"
BUILT = ROOT / "build" / "bench" / "guest"
MEMORY_MIB = 512
QEMU = "qemu-system-x86_64"

NATIVE, TCG, BT = "native", "QEMU TCG", "bt"
# Above it, a run's figures say as much about the neighbours as about us: with one
# CPU of two taken, native figures doubled and engine bt looked faster than native.
NOISY_CPUS = 0.1
# A guest whose clock is further off measures something else than time.
CLOCK_ERROR_MAX = 0.05


@dataclass(frozen=True)
class Guest:
    kernel: Path
    initrd: Path
    append: str
    name: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs = os.environ.get("RUNS", "3")
    parser.add_argument(
        "--runs",
        type=int,
        default=int(runs) if runs.isdecimal() else 3,
        help="runs of each program; figures are medians [default: RUNS, or 3]",
    )
    parser.add_argument("--quick", action="store_true", help="about a tenth of the work")
    parser.add_argument("--only", metavar="PREFIX[,PREFIX...]", help="the benchmarks to run")
    parser.add_argument("--kernel", type=Path, metavar="FILE", help="[default: Debian's cloud]")
    parser.add_argument("--cpu", metavar="MODEL", help="QEMU's -cpu [default: QEMU's own]")
    parser.add_argument(
        "--timeout", type=float, default=1800, metavar="SECONDS", help="for one run [1800]"
    )
    parser.add_argument("--echo", action="store_true", help="show the consoles")
    parser.add_argument(
        "--write",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="write docs/benchmarks.md [default: unless --quick, --only or disturbed]",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.runs < 1:
        raise BenchError(f"--runs {arguments.runs} is no number of runs; give 1 or more")
    build()
    guest = find_guest(arguments)
    commands = {NATIVE: native_command(arguments)}
    if shutil.which(QEMU):
        commands[TCG] = qemu_command(guest, arguments.cpu)
    else:
        print(f"bench: no {QEMU}: its rows are left out; apt-get install qemu-system-x86")
    commands[BT] = tetrarch_command(guest)

    runs: dict[str, list[Run]] = {program: [] for program in commands}
    for number in range(1, arguments.runs + 1):
        for program, command in commands.items():
            print(f"bench: run {number} of {arguments.runs}: {program}", flush=True)
            done = run_once(command, arguments.timeout, arguments.echo)
            if not done.finished:
                why = "; ".join(done.remarks[-2:]) or "it ended early"
                tail = "\n".join(done.tail)
                raise BenchError(f"run {number} of {program} did not finish: {why}\n{tail}")
            runs[program].append(done)

    results = {program: compare.medians(done) for program, done in runs.items()}
    wrong = [
        f"{program}: {name} computed {got or 'nothing'}, native {expected}"
        for program in results
        if program != NATIVE
        for name, expected, got in compare.wrong_checks(results[NATIVE], results[program])
    ]
    text = report(results, runs, commands, guest, arguments)
    print(f"\n{text}")
    write = arguments.write
    if write is None:
        write = not (arguments.quick or arguments.only)
    if wrong:
        for line in wrong:
            print(f"bench: wrong result: {line}", file=sys.stderr)
        raise BenchError(f"{len(wrong)} check values differ from native's; nothing is written")
    doubts = disturbances(runs)
    for line in doubts:
        print(f"bench: do not trust these figures: {line}", file=sys.stderr)
    if write and doubts and not arguments.write:
        raise BenchError("docs/benchmarks.md stays as it is; repeat on an idle machine")
    if write:
        write_section("guest", text)
    return 0


def disturbances(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """What makes the figures no measure of the programs; empty if nothing does."""
    found = []
    for program, done in runs.items():
        load = max(values_of(done, "host.other_load"), default=0.0)
        if load > NOISY_CPUS:
            found.append(f"{load:.2f} CPUs were busy with something else while {program} ran")
        clock = worst_clock(done)
        if clock is not None and abs(clock - 1) > CLOCK_ERROR_MAX:
            found.append(f"the clock of {program} ran {clock:.3f} times as fast as the host's")
    return found


def values_of(runs: Sequence[Run], name: str) -> list[float]:
    return [run.results[name].value for run in runs if name in run.results]


def worst_clock(runs: Sequence[Run]) -> float | None:
    return max(values_of(runs, "host.clock_ratio"), key=lambda ratio: abs(ratio - 1), default=None)


# What is run.


def build() -> None:
    for tool, package in (
        ("gcc", "gcc"),
        ("make", "make"),
        ("cpio", "cpio"),
        ("busybox", "busybox-static"),
    ):
        if shutil.which(tool) is None:
            raise BenchError(f"no {tool}; install it: apt-get install {package}")
    BUILT.mkdir(parents=True, exist_ok=True)
    command = ["make", "-s", "-C", str(BUILT), "-f", str(SOURCES / "Makefile")]
    done = subprocess.run(
        [*command, "guestbench", "initramfs.gz"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"the guest benchmark does not build:\n{done.stderr.strip()}")


def find_guest(arguments: argparse.Namespace) -> Guest:
    append = "console=ttyS0 quiet reboot=t panic=-1"
    append += f" gb.mode={'quick' if arguments.quick else 'full'}"
    if arguments.only:
        append += f" gb.only={arguments.only}"
    kernel, name = arguments.kernel, str(arguments.kernel)
    if kernel is None:
        from tetrarch import images
        from tetrarch.errors import TetrarchError

        try:
            cached = images.ensure(images.Cache(), images.DEFAULT_IMAGE, images.TerminalReporter())
        except TetrarchError as error:
            raise BenchError(f"{error}, or give --kernel") from error
        kernel, name = cached.kernel, f"{cached.manifest.package} {cached.manifest.version}"
    return Guest(kernel, BUILT / "initramfs.gz", append, name)


def native_command(arguments: argparse.Namespace) -> list[str]:
    command = [str(BUILT / "guestbench"), "--tmp", "/dev/shm"]
    command += ["--busybox", shutil.which("busybox") or "busybox"]
    if (tcc := shutil.which("tcc")) is not None:
        command += ["--tcc", tcc]
    if arguments.quick:
        command.append("--quick")
    if arguments.only:
        command += ["--only", arguments.only]
    return command


def qemu_command(guest: Guest, cpu: str | None) -> list[str]:
    command = [QEMU, "-M", "q35", "-accel", "tcg,thread=single", "-smp", "1"]
    command += ["-m", str(MEMORY_MIB)]
    if cpu:
        command += ["-cpu", cpu]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
    command += ["-no-reboot", "-kernel", str(guest.kernel), "-initrd", str(guest.initrd)]
    return [*command, "-append", guest.append]


def tetrarch_command(guest: Guest) -> list[str]:
    command = [str(Path(sys.executable).with_name("tetrarch")), "run", "--engine", "bt"]
    command += ["--no-reboot", "--kernel", str(guest.kernel), "--initrd", str(guest.initrd)]
    return [*command, "--append", guest.append, "--memory", f"{MEMORY_MIB}M"]


# What is said about it.


def report(
    results: Mapping[str, Mapping[str, Median]],
    runs: Mapping[str, Sequence[Run]],
    commands: Mapping[str, Sequence[str]],
    guest: Guest,
    arguments: argparse.Namespace,
) -> str:
    others = [program for program in results if program != BT]
    parts = [
        "## Guest benchmark: engine bt",
        f"One virtual CPU, {MEMORY_MIB} MiB, {arguments.runs} runs of each program, medians; "
        f"{'quick' if arguments.quick else 'full'} mode. A ratio is how many times as fast "
        "engine bt is as the other program: above 1 it is faster. Every check value is native's.",
        table(("", ""), facts(guest, runs)),
        "### Boot",
        table(("", "unit", *_programs(results), *_ratios(others[1:])), boot_rows(results)),
        "### Families",
        "The geometric mean of the ratios in a family, and their median.",
        table(("family", "benchmarks", *_family_header(others)), family_rows(results, others)),
        "### Benchmarks",
        table(("benchmark", "unit", *results, *_ratios(others)), rows(results, others)),
        "### Commands",
        "```\n" + "\n".join(_shown(command) for command in commands.values()) + "\n```",
    ]
    return "\n\n".join(parts)


def facts(guest: Guest, runs: Mapping[str, Sequence[Run]]) -> list[tuple[str, str]]:
    found = describe_host()
    found.append(("Guest kernel", guest.name))
    found.append(("QEMU", version_of(QEMU, "--version")))
    found.append(("Compiler of the benchmark", version_of("gcc", "--version")))
    loads = {program: max(values_of(done, "host.other_load")) for program, done in runs.items()}
    clocks = {program: worst_clock(done) for program, done in runs.items()}
    found.append(
        ("CPUs busy with something else", ", ".join(f"{p} {v:.2f}" for p, v in loads.items()))
    )
    found.append(
        (
            "Guest's clock over the host's",
            ", ".join(f"{p} {v:.3f}" for p, v in clocks.items() if v is not None),
        )
    )
    if doubts := disturbances(runs):
        found.append(("**Not to be trusted**", "; ".join(doubts)))
    return found


def boot_rows(results: Mapping[str, Mapping[str, Median]]) -> list[list[str]]:
    found = []
    programs = _programs(results)
    for name, what in (
        ("boot.wall_to_init", "from the program's start to init"),
        ("boot.kernel_uptime_at_init", "of which the kernel, by its own clock"),
        ("host.rss_at_init", "resident memory at init"),
        ("host.rss_peak", "largest resident memory"),
    ):
        medians = [results[program].get(name) for program in programs]
        unit = next((median.unit for median in medians if median), "")
        row = [what, unit, *(_show(median) for median in medians)]
        if TCG in results:
            row.append(_ratio(results[BT].get(name), results[TCG].get(name)))
        found.append(row)
    return found


def family_rows(
    results: Mapping[str, Mapping[str, Median]], others: Sequence[str]
) -> list[list[str]]:
    found = []
    groups = compare.families(results[BT])
    for family, names in [*groups.items(), ("all", [n for g in groups.values() for n in g])]:
        row = [family, str(len(names))]
        for other in others:
            ratios = [
                ratio
                for name in names
                if name in results[other]
                and (ratio := compare.speed_ratio(results[BT][name], results[other][name]))
            ]
            mean = compare.geometric_mean(ratios)
            row.append("-" if mean is None else f"{mean:.2f}")
            row.append(f"{statistics.median(ratios):.2f}" if ratios else "-")
        found.append(row)
    return found


def rows(results: Mapping[str, Mapping[str, Median]], others: Sequence[str]) -> list[list[str]]:
    names = dict.fromkeys(name for medians in results.values() for name in medians)
    found = []
    for family in compare.families(names).values():
        for name in family:
            medians = [results[program].get(name) for program in results]
            unit = next(median.unit for median in medians if median)
            ratios = [_ratio(results[BT].get(name), results[other].get(name)) for other in others]
            found.append([name, unit, *(_show(median) for median in medians), *ratios])
    return found


def _programs(results: Mapping[str, object]) -> list[str]:
    return [program for program in results if program != NATIVE]


def _ratios(others: Sequence[str]) -> list[str]:
    return [f"{BT} / {other}" for other in others]


def _family_header(others: Sequence[str]) -> list[str]:
    return [f"{BT} / {other}{what}" for other in others for what in ("", ", median")]


def _show(median: Median | None) -> str:
    if median is None:
        return "-"
    return f"{median.value:.0f}" if median.value >= 1000 else f"{median.value:.4g}"


def _ratio(ours: Median | None, other: Median | None) -> str:
    ratio = compare.speed_ratio(ours, other) if ours and other else None
    return "-" if ratio is None else f"{ratio:.2f}"


def _shown(command: Sequence[str]) -> str:
    """A command with the paths of this machine cut to their names."""
    words = [Path(word).name if word.startswith("/") else word for word in command]
    return shlex.join(words)
