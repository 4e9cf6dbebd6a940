"""Measurements, run by ``make bench``.

Each benchmark is a module of this package with

    HELP: str                                     one line for --help
    add_arguments(parser: ArgumentParser) -> None
    run(arguments: Namespace) -> int              the exit code

and writes what it found into its own section of docs/benchmarks.md
(:func:`tools.bench.report.write_section`). ``__main__`` finds them by name.
"""
