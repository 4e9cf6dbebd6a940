"""The devices of a small PC, each a register core and an adapter to a machine."""

from tetrarch.devices.acpi_pm import AcpiPm, AcpiPmCore
from tetrarch.devices.debug_console import DebugConsole
from tetrarch.devices.debug_exit import DebugExit
from tetrarch.devices.fw_cfg import FwCfg, FwCfgCore
from tetrarch.devices.i8042 import I8042, I8042Core
from tetrarch.devices.port_92 import Port92
from tetrarch.devices.pvpanic import PvPanic
from tetrarch.devices.reset_cf9 import ResetCf9
from tetrarch.devices.rtc_cmos import RtcCmos, RtcCmosCore
from tetrarch.devices.uart16550 import Uart16550
from tetrarch.devices.vga import Vga, VgaCore

__all__ = [
    "I8042",
    "AcpiPm",
    "AcpiPmCore",
    "DebugConsole",
    "DebugExit",
    "FwCfg",
    "FwCfgCore",
    "I8042Core",
    "Port92",
    "PvPanic",
    "ResetCf9",
    "RtcCmos",
    "RtcCmosCore",
    "Uart16550",
    "Vga",
    "VgaCore",
]
