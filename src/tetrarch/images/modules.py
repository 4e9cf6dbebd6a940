"""The kernel modules that go into a guest, and the index files modprobe reads.

Debian's kernel package holds modules but no modules.dep: depmod writes that on
installation. A module carries what depmod reads in its ELF section .modinfo,
as "key=value" strings with a NUL between them: the modules it depends on, the
hardware aliases it serves, what should be loaded before it.
"""

from __future__ import annotations

import gzip
import lzma
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Module",
    "ModuleFormatError",
    "ModuleTree",
    "canonical_name",
    "modinfo",
    "modules_alias",
    "modules_dep",
]

_SUFFIXES = (".ko", ".ko.xz", ".ko.gz")


class ModuleFormatError(ValueError):
    """A file that should be a kernel module and is none."""


@dataclass(frozen=True)
class Module:
    name: str
    path: str
    """Under /lib/modules/VERSION."""
    data: bytes
    depends: tuple[str, ...]
    soft_depends: tuple[str, ...]
    aliases: tuple[str, ...]


class ModuleTree:
    """The modules of one kernel, as unpacked under /lib/modules/VERSION."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._paths: dict[str, Path] = {}
        for path in sorted((root / "kernel").rglob("*.ko*")):
            if path.name.endswith(_SUFFIXES):
                self._paths[canonical_name(path.name)] = path

    def __contains__(self, name: str) -> bool:
        return canonical_name(name) in self._paths

    def load(self, name: str) -> Module:
        path = self._paths[canonical_name(name)]
        data = _unpacked(path)
        info = modinfo(data)
        relative = path.relative_to(self._root).as_posix()
        return Module(
            name=canonical_name(path.name),
            path=relative[: relative.index(".ko")] + ".ko",
            data=data,
            depends=_names(info.get("depends", [])),
            soft_depends=_soft_names(info.get("softdep", [])),
            aliases=tuple(info.get("alias", [])),
        )

    def closure(self, names: Iterable[str]) -> list[Module]:
        """The named modules that exist, with all they depend on, sorted by path.

        A name that is missing is built into this kernel, or not configured.
        """
        found: dict[str, Module] = {}
        todo = [canonical_name(name) for name in names]
        while todo:
            name = todo.pop()
            if name in found or name not in self._paths:
                continue
            module = self.load(name)
            found[name] = module
            todo += [*module.depends, *module.soft_depends]
        return sorted(found.values(), key=lambda module: module.path)


def modules_dep(modules: Iterable[Module]) -> str:
    """modules.dep: each module's path and those it needs, nearest first.

    modprobe loads a line's modules from the end, so a module must stand before
    what it depends on (modules.dep(5)).
    """
    by_name = {module.name: module for module in modules}

    def all_depends(name: str) -> list[str]:
        order: list[str] = []
        # Not `order`: damaged modules may depend on each other in a circle.
        seen = {name}

        def visit(current: str) -> None:
            for other in by_name[current].depends:
                if other in by_name and other not in seen:
                    seen.add(other)
                    visit(other)
                    order.append(other)

        visit(name)
        return order[::-1]

    return "".join(
        f"{module.path}:"
        + "".join(f" {by_name[other].path}" for other in all_depends(module.name))
        + "\n"
        for module in by_name.values()
    )


def modules_alias(modules: Iterable[Module]) -> str:
    """modules.alias: hardware identifiers to module names."""
    return "".join(
        f"alias {alias} {module.name}\n" for module in modules for alias in module.aliases
    )


def canonical_name(name: str) -> str:
    """The kernel's name for a module: without suffix, "-" as "_"."""
    return name.partition(".ko")[0].replace("-", "_")


def modinfo(data: bytes) -> dict[str, list[str]]:
    """The .modinfo section of a 64-bit little-endian ELF file."""
    try:
        section = _elf_section(data, b".modinfo")
    except (struct.error, IndexError, OverflowError) as error:
        raise ModuleFormatError("truncated ELF file") from error
    info: dict[str, list[str]] = {}
    for item in section.split(b"\0"):
        key, equals, value = item.decode("utf-8", "replace").partition("=")
        if equals:
            info.setdefault(key, []).append(value)
    return info


def _elf_section(data: bytes, wanted: bytes) -> bytes:
    # ELF-64 object file format, "ELF header" and "Sections": e_shoff at 0x28,
    # e_shentsize, e_shnum, e_shstrndx from 0x3A.
    if data[:6] != b"\x7fELF\x02\x01":
        raise ModuleFormatError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)

    def header(index: int) -> tuple[int, int, int]:
        at = table + index * entry_size
        (name,) = struct.unpack_from("<I", data, at)
        offset, size = struct.unpack_from("<QQ", data, at + 0x18)
        return name, offset, size

    _, names_at, names_size = header(names_index)
    names = data[names_at : names_at + names_size]
    for index in range(count):
        name, offset, size = header(index)
        if names[name : names.index(b"\0", name) if b"\0" in names[name:] else None] == wanted:
            return data[offset : offset + size]
    return b""


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        if path.name.endswith(".xz"):
            return lzma.decompress(data)
        if path.name.endswith(".gz"):
            return gzip.decompress(data)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ModuleFormatError(f"{path.name} cannot be unpacked") from error
    return data


def _names(values: list[str]) -> tuple[str, ...]:
    return tuple(canonical_name(name) for value in values for name in value.split(",") if name)


def _soft_names(values: list[str]) -> tuple[str, ...]:
    # "pre: a b post: c" (modprobe.d(5), softdep).
    return tuple(
        canonical_name(word)
        for value in values
        for word in value.split()
        if not word.endswith(":") and word != "platform"
    )
