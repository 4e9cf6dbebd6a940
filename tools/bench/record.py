"""What a recording costs: the guest benchmark on engine bt, recorded and not, in turns.

A recording keeps what came from outside, and where; the guest computes the same in both. What is
promised is of the time to init, and of a whole run's, each from the program's start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.bench import compare
from tools.bench.compare import Median
from tools.bench.guest import build, find_guest, tetrarch_command
from tools.bench.process import Run, run_once
from tools.bench.report import BenchError, describe_host, table, write_section

HELP = "the guest benchmark on engine bt, recorded against not recorded"

PLAIN, RECORDED = "bt", "bt, recorded"
#: At most so many times the time of a run that is not recorded.
MOST = 1.3

WHOLE = {
    "boot.wall_to_init": "from the program's start to init",
    "boot.wall_total": "from the program's start to its end",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, help="of each; medians [3]")
    parser.add_argument("--quick", action="store_true", help="about a tenth of the work")
    parser.add_argument("--only", metavar="PREFIX[,PREFIX...]", help="the benchmarks to run")
    parser.add_argument("--kernel", type=Path, metavar="FILE", help="[default: Debian's cloud]")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one run [1800]")
    parser.add_argument("--echo", action="store_true", help="show the consoles")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    build()
    command = tetrarch_command(find_guest(arguments))
    runs: dict[str, list[Run]] = {PLAIN: [], RECORDED: []}
    sizes: list[int] = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        recording = Path(scratch, "recording")
        for number in range(1, arguments.rounds + 1):
            for program, done in runs.items():
                print(f"bench: round {number} of {arguments.rounds}: {program}", file=sys.stderr)
                more = ["--record", str(recording)] if program == RECORDED else []
                done.append(run_once([*command, *more], arguments.timeout, arguments.echo))
                if not done[-1].finished:
                    tail = "\n".join(done[-1].tail)
                    raise BenchError(f"round {number} of {program} did not finish:\n{tail}")
            sizes.append(recording.stat().st_size)
            recording.unlink()
    results = {program: compare.medians(done) for program, done in runs.items()}
    if wrong := compare.wrong_checks(results[PLAIN], results[RECORDED]):
        raise BenchError(f"a recorded guest computes something else: {wrong}")
    cost = {name: results[RECORDED][name].value / results[PLAIN][name].value for name in WHOLE}
    if arguments.json:
        print(json.dumps({"cost": cost, "families": dict(family_costs(results))}, indent=2))
    else:
        text = _report(results, cost, statistics.median(sizes), arguments)
        print(text)
        if not (arguments.quick or arguments.only):
            write_section("record", text)
    return 0 if all(ratio <= MOST for ratio in cost.values()) else 1


def family_costs(results: Mapping[str, Mapping[str, Median]]) -> list[tuple[str, float]]:
    """How many times its time each family takes when recorded: geometric means."""
    plain, recorded = results[PLAIN], results[RECORDED]
    found = []
    for family, names in compare.families(recorded).items():
        ratios = [compare.speed_ratio(plain[name], recorded[name]) for name in names]
        if (mean := compare.geometric_mean(ratio for ratio in ratios if ratio)) is not None:
            found.append((family, mean))
    return found


def _report(
    results: Mapping[str, Mapping[str, Median]],
    cost: Mapping[str, float],
    size: float,
    arguments: argparse.Namespace,
) -> str:
    rows: list[Sequence[str]] = [
        (what, *(f"{results[program][name].value:.2f}" for program in results), f"{cost[name]:.2f}")
        for name, what in WHOLE.items()
    ]
    families = [(family, f"{ratio:.2f}") for family, ratio in family_costs(results)]
    return "\n\n".join(
        [
            "## Recording",
            f"`python -m tools.bench record`: the guest benchmark, recorded and not; medians of "
            f"{arguments.rounds} interleaved rounds. A ratio is the time recorded over the time "
            f"not recorded; promised is at most {MOST:g} for either. A recording of it takes "
            f"{size / 2**20:.1f} MiB.",
            table(("", ""), describe_host()),
            table(("s", *results, "ratio"), rows),
            table(("family", "time, recorded over not"), families),
        ]
    )
