"""The devices of a small PC, each a register core and an adapter to a machine."""

from typing import TYPE_CHECKING

from tetrarch._lazy import lazy_names

if TYPE_CHECKING:
    from tetrarch.devices.acpi_pm import AcpiPm, AcpiPmCore
    from tetrarch.devices.debug_console import DebugConsole
    from tetrarch.devices.debug_exit import DebugExit
    from tetrarch.devices.fw_cfg import FwCfg, FwCfgCore
    from tetrarch.devices.hpet import Hpet, HpetCore
    from tetrarch.devices.i8042 import I8042, I8042Core
    from tetrarch.devices.pflash import PFlash, PFlashCore
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
    "Hpet",
    "HpetCore",
    "I8042Core",
    "PFlash",
    "PFlashCore",
    "Port92",
    "PvPanic",
    "ResetCf9",
    "RtcCmos",
    "RtcCmosCore",
    "Uart16550",
    "Vga",
    "VgaCore",
]

_HOMES = {
    "I8042": "tetrarch.devices.i8042",
    "AcpiPm": "tetrarch.devices.acpi_pm",
    "AcpiPmCore": "tetrarch.devices.acpi_pm",
    "DebugConsole": "tetrarch.devices.debug_console",
    "DebugExit": "tetrarch.devices.debug_exit",
    "FwCfg": "tetrarch.devices.fw_cfg",
    "FwCfgCore": "tetrarch.devices.fw_cfg",
    "Hpet": "tetrarch.devices.hpet",
    "HpetCore": "tetrarch.devices.hpet",
    "I8042Core": "tetrarch.devices.i8042",
    "PFlash": "tetrarch.devices.pflash",
    "PFlashCore": "tetrarch.devices.pflash",
    "Port92": "tetrarch.devices.port_92",
    "PvPanic": "tetrarch.devices.pvpanic",
    "ResetCf9": "tetrarch.devices.reset_cf9",
    "RtcCmos": "tetrarch.devices.rtc_cmos",
    "RtcCmosCore": "tetrarch.devices.rtc_cmos",
    "Uart16550": "tetrarch.devices.uart16550",
    "Vga": "tetrarch.devices.vga",
    "VgaCore": "tetrarch.devices.vga",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())
