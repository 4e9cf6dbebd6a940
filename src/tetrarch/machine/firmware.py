"""A machine's firmware: its image in memory, and the devices that firmware talks to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack

from tetrarch._native import GuestMemoryError, Vm
from tetrarch.boot import build_acpi
from tetrarch.boot.cpustate import reset_state
from tetrarch.boot.smbios import smbios_files
from tetrarch.devices.debug_console import DebugConsole
from tetrarch.devices.fw_cfg import FwCfg, FwCfgItem
from tetrarch.devices.pflash import PFlash
from tetrarch.devices.ramfb import RAMFB_FILE, Ramfb
from tetrarch.devices.uart16550 import PORT_BASE as SERIAL_PORT
from tetrarch.display.font import SVGA_BIOS, vga_bios
from tetrarch.firmware.acpi_files import acpi_files
from tetrarch.firmware.image import FirmwareImage
from tetrarch.firmware.items import cpu_items, kernel_items, memory_file
from tetrarch.firmware.linux_rom import linux_rom
from tetrarch.firmware.spec import FirmwareSpec
from tetrarch.firmware.variables import Variables
from tetrarch.machine.config import MachineConfig
from tetrarch.platforms.platform import SystemIdentity

__all__ = ["MachineFirmware"]


class MachineFirmware:
    """Made with the machine's devices; ``load`` puts the guest back to its first instruction."""

    def __init__(
        self,
        vm: Vm,
        spec: FirmwareSpec,
        identity: Callable[[], SystemIdentity],
        end: Callable[[BaseException], None],
    ) -> None:
        """``end`` is called where the host does not take what is to be kept."""
        self._vm = vm
        self._image = FirmwareImage.read(spec)
        self._ram = vm.ram
        self._identity = identity
        self._kernel_files = ExitStack()
        self.fw_cfg = FwCfg(vm, GuestMemoryError)
        self.debug_console = DebugConsole()
        self.ramfb = None if self._image.is_seabios else Ramfb()
        """The frame buffer of UEFI firmware."""
        vm.add_memory(self._image.base, len(self._image.data))
        self.variables = Variables.open(spec, self._image, end)
        """Where the flash with them is, which is there with them alone."""
        self.flash: PFlash | None = None
        if self.variables is not None:
            self.flash = PFlash(self.variables.content, self.variables.keep)

    def close(self) -> None:
        self._kernel_files.close()
        if self.variables is not None:
            self.variables.close()

    def load(
        self,
        config: MachineConfig,
        cmdline: str,
        dsdt: Sequence[bytes],
        there: Collection[int] | None,
    ) -> dict[str, int]:
        """The registers to start the first vCPU with. Raises BootError."""
        self.tell(config, cmdline, dsdt, there)
        self._vm.write_memory(self._image.base, self._image.data)
        self._vm.write_memory(*self._image.low)
        return reset_state()

    def tell(
        self,
        config: MachineConfig,
        cmdline: str,
        dsdt: Sequence[bytes],
        there: Collection[int] | None,
    ) -> None:
        """Lets fw_cfg say what the machine is; ``there`` as ``build_acpi`` has it."""
        with ExitStack() as opened:
            self.fw_cfg.core.provide(*self._told(config, cmdline, dsdt, there, opened))
            self._kernel_files.close()
            self._kernel_files = opened.pop_all()

    def _told(
        self,
        config: MachineConfig,
        cmdline: str,
        dsdt: Sequence[bytes],
        there: Collection[int] | None,
        opened: ExitStack,
    ) -> tuple[dict[int, bytes | FwCfgItem], dict[str, bytes | FwCfgItem]]:
        """Items and files."""
        cpus = config.cpus.count if there is None else len(there)
        items: dict[int, bytes | FwCfgItem] = {**cpu_items(cpus, config.cpus.max)}
        kernel_files: dict[str, bytes] = {}
        if config.kernel is not None and self._image.is_seabios:
            kernel, kernel_files = linux_rom(
                self._vm, config.kernel, config.initrd, cmdline, opened
            )
            items |= kernel
        elif config.kernel is not None:
            items |= kernel_items(config.kernel, config.initrd, cmdline, opened)
        tables = build_acpi(
            config.cpus.apic_ids,
            self._ram,
            dsdt,
            there=there,
            firmware=True,
            vga=config.vga,
            timers=config.hpet,
        )
        files: dict[str, bytes | FwCfgItem] = {
            "etc/e820": memory_file(self._ram),
            **acpi_files(*tables),
            **smbios_files(config.memory, self._identity()),
            **kernel_files,
        }
        if config.vga:
            if self.ramfb is None and config.drawn_by == "svga":
                # By this name it is the program of the PCI device, which looks for its memory.
                files["pci15ad,0405.rom"] = vga_bios(SVGA_BIOS)
            elif self.ramfb is None:
                files["vgaroms/vgabios.bin"] = vga_bios()
            else:
                files[RAMFB_FILE] = self.ramfb
        else:
            # Without a screen SeaBIOS's is the serial line.
            files["etc/sercon-port"] = SERIAL_PORT.to_bytes(2, "little")
        return items, files
