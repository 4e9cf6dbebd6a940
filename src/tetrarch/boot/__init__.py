"""Starting a guest: boot protocols, memory map and ACPI tables."""

from tetrarch.boot.acpi import build_acpi
from tetrarch.boot.e820 import E820Entry, E820Type, memory_map
from tetrarch.boot.loader import load_kernel

__all__ = ["E820Entry", "E820Type", "build_acpi", "load_kernel", "memory_map"]
