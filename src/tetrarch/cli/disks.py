"""``tetrarch disk``: images from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tetrarch.block import tools
from tetrarch.block.spec import FORMATS, DiskFormat, parse_bytes
from tetrarch.errors import ConfigError, ValueProblem
from tetrarch.images.progress import TerminalReporter

if TYPE_CHECKING:
    from tetrarch._native import DiskInfo

__all__ = ["check", "convert", "create", "resize", "show"]


def create(
    path: Path,
    size: str | None,
    image_format: str | None,
    backing: str | None,
    backing_format: str | None,
    cluster_size: str | None,
) -> None:
    made = tools.create(
        path,
        _size("SIZE", size) if size is not None else None,
        image_format=_format("--format", image_format),
        backing=backing,
        backing_format=_format("--backing-format", backing_format),
        cluster_size=_size("--cluster-size", cluster_size) if cluster_size is not None else None,
    )
    print(f"{path}: a disk of {_shown(made)}")


def show(path: Path, image_format: str | None, as_json: bool) -> None:
    info = tools.info(path, _format("--format", image_format))
    if as_json:
        print(json.dumps(info, indent=2))
    else:
        print("\n".join(f"{name:<15} {value}" for name, value in _rows(path, info)))


def _rows(path: Path, info: DiskInfo) -> list[tuple[str, str]]:
    subformat = f" ({info['subformat']})" if "subformat" in info else ""
    rows = [
        ("image", str(path)),
        ("format", info["format"] + subformat),
        ("disk", f"{_shown(info['size'])} ({info['size']} bytes)"),
        ("on the host", _shown(info["allocated"])),
    ]
    if "cluster_size" in info:
        rows.append(("clusters", _shown(info["cluster_size"])))
    if backing := info.get("backing"):
        rows.append(("backing file", f"{backing} ({info.get('backing_format') or 'no format'})"))
    if info.get("snapshots"):
        rows.append(("snapshots", str(info["snapshots"])))
    if info.get("dirty"):
        rows.append(("not closed", "run: tetrarch disk check --repair"))
    return rows


def check(path: Path, repair: bool, as_json: bool) -> int:
    """The exit code is that of qemu-img check: 2 damaged, 3 space is lost, 0 neither."""
    report = tools.check(path, repair=repair)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        for problem in report["problems"]:
            print(problem)
        if report["repaired"]:
            print(f"{path}: repaired {report['repaired']} refcounts and flags")
        if report["errors"]:
            print(f"{path}: {report['errors']} errors; data may be lost")
        if report["leaks"]:
            print(f"{path}: {report['leaks']} clusters are lost space; --repair gives them back")
        if not report["errors"] and not report["leaks"]:
            print(f"{path}: no errors; {report['clusters']} clusters are in use")
    return 2 if report["errors"] else 3 if report["leaks"] else 0


def convert(
    source: Path,
    target: Path,
    image_format: str | None,
    source_format: str | None,
    subformat: str | None,
) -> None:
    # What cannot be done is said before there is progress to show.
    with ExitStack() as shown:
        bar: list[Callable[[int, int], None]] = []

        def advance(done: int, total: int) -> None:
            if not bar:
                transfer = TerminalReporter().transfer(target.name, total, verb="Writing")
                bar.append(shown.enter_context(transfer))
            bar[0](done, total)

        tools.convert(
            source,
            target,
            image_format=_format("--format", image_format),
            source_format=_format("--source-format", source_format),
            subformat=_subformat(subformat),
            progress=advance,
        )


def resize(path: Path, size: str, image_format: str | None, shrink: bool) -> None:
    kind = _format("--format", image_format)
    more = size.startswith("+")
    wanted = _size("SIZE", size.removeprefix("+")) + (tools.info(path, kind)["size"] if more else 0)
    before = tools.resize(path, wanted, shrink=shrink, image_format=kind)
    print(f"{path}: {_shown(before)} before, {_shown(wanted)} now")


def _format(option: str, name: str | None) -> DiskFormat | None:
    for known in FORMATS:
        if name == known:
            return known
    if name is None:
        return None
    raise ConfigError(f"{option}: {name!r} is no format", mend=f"there are {', '.join(FORMATS)}")


def _subformat(name: str | None) -> tools.Subformat | None:
    for known in tools.SUBFORMATS:
        if name == known:
            return known
    if name is None:
        return None
    raise ConfigError(
        f"--subformat: {name!r} is none", mend=f"there are {', '.join(tools.SUBFORMATS)}"
    )


def _size(option: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueProblem as problem:
        raise ConfigError(f"{option}: {problem.cause}", mend=problem.mend) from None


def _shown(size: float) -> str:
    """In the largest unit of which there is one: as it would be typed."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:g} {unit}" if size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:g} TiB" if size == int(size) else f"{size:.1f} TiB"
