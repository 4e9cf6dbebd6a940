"""``tetrarch cpu-models``: the CPU models, and what each engine of this host lacks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from textwrap import wrap

from tetrarch.machine.cpu import Lacking, lacking, maker
from tetrarch.machine.cpu_models import CpuModel, cpu_models
from tetrarch.machine.cpu_spec import CpuSpec
from tetrarch.machine.kvm import engine_unusable
from tetrarch.machine.selection import ENGINES
from tetrarch.platforms.pc import PC

__all__ = ["show_cpu_models"]

_WIDTH = 100


def show_cpu_models(as_json: bool) -> None:
    engines = [name for name in ENGINES if engine_unusable(name) is None]
    rows = {
        model: {engine: lacking(CpuSpec(model.name), engine, PC) for engine in engines}
        for model in cpu_models().values()
    }
    if as_json:
        print(json.dumps([_row(model, lacks) for model, lacks in rows.items()], indent=2))
        return
    width = max(len(model.name) for model in rows)
    for model, lacks in rows.items():
        first = f"{model.name:<{width}}  "
        for line in _lines(model, lacks):
            print(
                "\n".join(
                    wrap(line, _WIDTH, initial_indent=first, subsequent_indent=" " * (width + 4))
                )
            )
            first = " " * len(first)


def _row(model: CpuModel, lacks: dict[str, Lacking]) -> dict[str, object]:
    return {
        "name": model.name,
        "vendor": model.vendor,
        "features": sorted(model.features),
        "lacks": {
            engine: None if one.other_vendor else sorted((*one.host, *one.engine))
            for engine, one in lacks.items()
        },
    }


def _lines(model: CpuModel, lacks: dict[str, Lacking]) -> Iterator[str]:
    if model.vendor is not None and any(one.other_vendor for one in lacks.values()):
        yield f"for hosts with a CPU of {maker(model.vendor)}'s"
        return
    if whole := [engine for engine, one in lacks.items() if not one]:
        yield f"engine{'s' if len(whole) > 1 else ''} {' and '.join(whole)}"
    for engine, one in lacks.items():
        if one:
            yield f"engine {engine} lacks {', '.join(sorted((*one.host, *one.engine)))}"
