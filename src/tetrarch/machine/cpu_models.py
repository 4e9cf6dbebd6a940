"""CPU models, and features by their names: what ``cpu_models.toml`` has."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from tetrarch.errors import ValueProblem

__all__ = [
    "CpuModel",
    "cpu_models",
    "feature_named",
    "feature_names",
    "model_named",
    "needing",
    "optional_features",
    "roots",
    "with_needs",
    "words_of",
]

_SEPARATORS = re.compile("[-_.]")
#: What AMD's leaf 0x8000_0001 repeats of leaf 1, EDX (AMD APM 3, appendix E).
_REPEATED = 0x0183_F3FF
_AMD = ("AuthenticAMD", "HygonGenuine")
_SIGNATURE = ("family", "model", "stepping")


@dataclass(frozen=True)
class CpuModel:
    """A processor that many hosts can show a guest."""

    name: str
    vendor: str | None
    """As CPUID's leaf 0 has it; None is of any, and then family, model and stepping are too."""
    signature: int | None
    """Family, model and stepping as EAX of CPUID's leaf 1 has them."""
    features: frozenset[str]


def cpu_models() -> Mapping[str, CpuModel]:
    """All models, in the order of the file: from the least to the most."""
    return _models()


def model_named(name: str) -> CpuModel:
    """Raises ValueProblem with the nearest where there is none."""
    models = _models()
    if name in models:
        return models[name]
    lower = {known.lower(): known for known in ("host", "portable", *models)}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    mend = f"did you mean {lower[near[0]]}?" if near else "tetrarch cpu-models lists them"
    raise ValueProblem(f"{name!r} is no CPU model", mend=mend)


def feature_named(text: str) -> str:
    """The name of a feature that somebody calls so. Raises ValueProblem with the nearest."""
    spelled = _spelled()
    plain = _plain(text)
    if plain in spelled:
        return spelled[plain]
    near = difflib.get_close_matches(plain, spelled, n=1)
    mend = f"did you mean {spelled[near[0]]}?" if near else "give names as in /proc/cpuinfo"
    raise ValueProblem(f"{text!r} is no feature of a CPU", mend=mend)


def with_needs(features: Iterable[str]) -> frozenset[str]:
    """With all that they are of no use without."""
    needs, found, left = _file()["needs"], set[str](), list(features)
    while left:
        if (feature := left.pop()) not in found:
            found.add(feature)
            left += needs.get(feature, "").split()
    return frozenset(found)


def needing(features: Iterable[str]) -> frozenset[str]:
    """With all that is of no use without one of them."""
    gone = frozenset(features)
    return gone | {name for name in _file()["needs"] if with_needs([name]) & gone}


def roots(features: Set[str]) -> list[str]:
    """Those of them that need none of the others: without them all are gone."""
    return sorted(name for name in features if not with_needs([name]) - {name} & features)


def optional_features() -> frozenset[str]:
    """What every model has where the engine has it."""
    return frozenset(_file()["optional"]["features"].split())


def words_of(features: Set[str], vendor: str) -> dict[str, int]:
    """The words of CPUID of a CPU that has these features and no others."""
    words = dict.fromkeys((*_file()["words"], "D.EAX", "D.1.ECX"), 0)
    for feature in features:
        word, bit = _bits()[feature]
        words[word] |= 1 << bit
    for feature, components in _file()["components"].items():
        if feature in features:
            words["D.EAX"] |= components
    if vendor in _AMD:
        words["80000001.EDX"] |= words["1.EDX"] & _REPEATED
    return words


def feature_names(words: Mapping[str, int]) -> Iterator[str]:
    """The features in words of CPUID; "7.EBX bit 6" for one without a name."""
    names = {bit: name for name, bit in _bits().items()}
    for word, bits in words.items():
        for bit in range(32):
            if bits >> bit & 1:
                yield names.get((word, bit), f"{word} bit {bit}")


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads((files("tetrarch.machine") / "cpu_models.toml").read_text())


@cache
def _bits() -> dict[str, tuple[str, int]]:
    """Word and bit of each feature."""
    return {
        name: (word, bit)
        for word, names in _file()["words"].items()
        for bit, name in enumerate(names.split())
        if name != "-"
    }


@cache
def _spelled() -> dict[str, str]:
    known = {_plain(name): name for name in _bits()}
    return known | {_plain(alias): name for alias, name in _file()["aliases"].items()}


def _plain(name: str) -> str:
    return _SEPARATORS.sub("", name.lower())


@cache
def _models() -> dict[str, CpuModel]:
    tables = _file()["models"]
    return {name: _model(name, tables) for name in tables}


def _model(name: str, tables: Mapping[str, Mapping[str, Any]]) -> CpuModel:
    table = _with_what_it_is_like(name, tables)
    of_any = "family" not in table
    signature = None if of_any else _signature(*(table[key] for key in _SIGNATURE))
    return CpuModel(name, table.get("vendor"), signature, frozenset(table["features"].split()))


def _with_what_it_is_like(name: str, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    table = dict(tables[name])
    like = table.pop("like", None)
    below = {"features": ""} if like is None else _with_what_it_is_like(like, tables)
    return below | table | {"features": f"{below['features']} {table['features']}"}


def _signature(family: int, model: int, stepping: int) -> int:
    """Family and model in two fields each (Intel SDM 2A, "CPUID", figure 3-6)."""
    low, more = min(family, 15), max(family - 15, 0)
    return more << 20 | model >> 4 << 16 | low << 8 | (model & 15) << 4 | stepping
