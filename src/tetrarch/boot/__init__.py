"""Starting a guest: boot protocols, memory map and ACPI tables."""

from typing import TYPE_CHECKING

from tetrarch._lazy import lazy_names

if TYPE_CHECKING:
    from tetrarch.boot.acpi import build_acpi
    from tetrarch.boot.e820 import E820Entry, E820Type, memory_map
    from tetrarch.boot.loader import load_kernel

__all__ = ["E820Entry", "E820Type", "build_acpi", "load_kernel", "memory_map"]

_HOMES = {
    "E820Entry": "tetrarch.boot.e820",
    "E820Type": "tetrarch.boot.e820",
    "build_acpi": "tetrarch.boot.acpi",
    "load_kernel": "tetrarch.boot.loader",
    "memory_map": "tetrarch.boot.e820",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())
