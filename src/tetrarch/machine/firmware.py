"""A machine's firmware: its image in memory, and the devices that firmware talks to."""

from __future__ import annotations

from collections.abc import Sequence

from tetrarch._native import GuestMemoryError, Vm
from tetrarch.boot import build_acpi
from tetrarch.boot.cpustate import reset_state
from tetrarch.devices.debug_console import DebugConsole
from tetrarch.devices.fw_cfg import FwCfg, FwCfgItem
from tetrarch.devices.uart16550 import PORT_BASE as SERIAL_PORT
from tetrarch.display.font import vga_bios
from tetrarch.errors import BootError
from tetrarch.firmware.acpi_files import acpi_files
from tetrarch.firmware.image import FirmwareImage
from tetrarch.firmware.items import cpu_items, kernel_items, memory_file
from tetrarch.firmware.smbios import smbios_files
from tetrarch.firmware.spec import FirmwareSpec
from tetrarch.machine.config import MachineConfig

__all__ = ["MachineFirmware"]


class MachineFirmware:
    """Made with the machine's devices; ``load`` puts the guest back to its first instruction."""

    def __init__(self, vm: Vm, spec: FirmwareSpec) -> None:
        self._vm = vm
        self._name = spec.name
        self._image = FirmwareImage.read(spec)
        self._ram = vm.ram
        self.fw_cfg = FwCfg(vm, GuestMemoryError)
        self.debug_console = DebugConsole()
        vm.add_memory(self._image.base, len(self._image.data))

    def load(self, config: MachineConfig, cmdline: str, dsdt: Sequence[bytes]) -> dict[str, int]:
        """The registers to start the first vCPU with. Raises BootError."""
        self.tell(config, cmdline, dsdt)
        self._vm.write_memory(self._image.base, self._image.data)
        self._vm.write_memory(*self._image.low)
        return reset_state()

    def tell(self, config: MachineConfig, cmdline: str, dsdt: Sequence[bytes]) -> None:
        """Lets fw_cfg say what the machine is."""
        items: dict[int, bytes | FwCfgItem] = {**cpu_items(config.cpus.count)}
        if config.kernel is not None:
            if self._name == "seabios":
                raise BootError(
                    "SeaBIOS starts no kernel from a file by itself",
                    mend="leave --firmware or the kernel out, or take ovmf",
                )
            items |= kernel_items(config.kernel, config.initrd, cmdline)
        tables = build_acpi(
            config.cpus.apic_ids,
            self._ram,
            dsdt,
            firmware=True,
            vga=config.vga,
            timers=config.hpet,
        )
        files: dict[str, bytes | FwCfgItem] = {
            "etc/e820": memory_file(self._ram),
            **acpi_files(*tables),
            **smbios_files(config.memory),
        }
        if config.vga:
            files["vgaroms/vgabios.bin"] = vga_bios()
        else:
            # Without a screen SeaBIOS's is the serial line.
            files["etc/sercon-port"] = SERIAL_PORT.to_bytes(2, "little")
        self.fw_cfg.core.provide(items, files)
