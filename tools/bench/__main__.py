"""``python -m tools.bench [BENCHMARK] [OPTIONS]``; without a name, all of them in turn.

Options without a name are those of ``guest``.
"""

from __future__ import annotations

import argparse
import sys

from tools.bench import (
    buses,
    cards,
    debian,
    disk,
    exits,
    guest,
    parallel,
    record,
    screen,
    start,
)
from tools.bench.report import BenchError

BENCHMARKS = {
    "guest": guest,
    "exits": exits,
    "disk": disk,
    "buses": buses,
    "cards": cards,
    "screen": screen,
    "debian": debian,
    "start": start,
    "record": record,
    "parallel": parallel,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.bench", description="Measurements; without a name, all in turn."
    )
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, benchmark in BENCHMARKS.items():
        benchmark.add_arguments(
            commands.add_parser(name, help=benchmark.HELP, description=benchmark.HELP)
        )
    if not arguments:
        chosen = [[name] for name in BENCHMARKS]
    elif arguments[0] in (*BENCHMARKS, "-h", "--help"):
        chosen = [arguments]
    else:
        chosen = [["guest", *arguments]]
    worst = 0
    for words in chosen:
        parsed = parser.parse_args(words)
        try:
            worst = max(worst, BENCHMARKS[parsed.benchmark].run(parsed))
        except BenchError as error:
            print(f"bench: {error}", file=sys.stderr)
            worst = max(worst, 1)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
