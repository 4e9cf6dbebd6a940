"""``python -m tools.bench [BENCHMARK] [OPTIONS]``; the default benchmark is ``guest``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

from tools.bench.report import BenchError

DEFAULT = "guest"
NAMES = ("guest", "exits")


@dataclass(frozen=True)
class Benchmark:
    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def find() -> dict[str, Benchmark]:
    """The benchmarks of this checkout, by name."""
    found = {}
    for name in NAMES:
        module_name = f"tools.bench.{name}"
        if importlib.util.find_spec(module_name) is None:
            continue
        module = importlib.import_module(module_name)
        found[name] = Benchmark(name, module.HELP, module.add_arguments, module.run)
    return found


def main(arguments: list[str]) -> int:
    benchmarks = find()
    parser = argparse.ArgumentParser(
        prog="tools.bench", description=f"Measurements; without a name, {DEFAULT}."
    )
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for benchmark in benchmarks.values():
        benchmark.add_arguments(
            commands.add_parser(benchmark.name, help=benchmark.help, description=benchmark.help)
        )
    if not arguments or arguments[0] not in (*benchmarks, "-h", "--help"):
        arguments = [DEFAULT, *arguments]
    parsed = parser.parse_args(arguments)
    try:
        return benchmarks[parsed.benchmark].run(parsed)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
