"""Medians over runs, and ratios between the programs that ran them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tools.bench.process import Run

__all__ = [
    "INFO",
    "Median",
    "families",
    "geometric_mean",
    "medians",
    "speed_ratio",
    "wrong_checks",
]

INFO = ("boot", "host")
"""Families that describe the run and are no benchmarks."""


@dataclass(frozen=True)
class Median:
    value: float
    unit: str
    runs: int
    checks: frozenset[str]


def medians(runs: Sequence[Run]) -> dict[str, Median]:
    """One median for each name that any of the runs has."""
    names = dict.fromkeys(name for run in runs for name in run.results)
    found = {}
    for name in names:
        got = [run.results[name] for run in runs if name in run.results]
        found[name] = Median(
            statistics.median(result.value for result in got),
            got[0].unit,
            len(got),
            frozenset(result.check for result in got if result.check),
        )
    return found


def speed_ratio(ours: Median, other: Median) -> float | None:
    """How many times as fast ``ours`` is as ``other``: above 1 is better."""
    if ours.value <= 0 or other.value <= 0 or ours.unit != other.unit:
        return None
    if ours.unit == "MB/s":
        return ours.value / other.value
    return other.value / ours.value


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def families(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by family, in the order in which they come; without those of INFO."""
    found: dict[str, list[str]] = {}
    for name in names:
        family = name.partition(".")[0]
        if family not in INFO:
            found.setdefault(family, []).append(name)
    return found


def wrong_checks(
    native: Mapping[str, Median], other: Mapping[str, Median]
) -> list[tuple[str, str, str]]:
    """(name, native's check value, the other's) where any run of the other differs."""
    wrong = []
    for name, median in other.items():
        expected = native[name].checks if name in native else frozenset()
        if expected and median.checks != expected:
            wrong.append((name, ",".join(sorted(expected)), ",".join(sorted(median.checks))))
    return wrong
