"""PCI: the bus, and what a device has that sits on it."""

from tetrarch.pci.bus import PciBus
from tetrarch.pci.function import Bar, BarPart, Identity, PciFunction

__all__ = ["Bar", "BarPart", "Identity", "PciBus", "PciFunction"]
