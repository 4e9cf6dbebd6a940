"""Which guest a machine runs, and how it gets into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tetrarch._native import disk_info
from tetrarch.block.disk import disk_errors
from tetrarch.block.spec import DiskSpec
from tetrarch.boot.cmdline import TERMINAL, with_terminal
from tetrarch.boot.cpustate import EFER_LMA
from tetrarch.boot.initrd import initrd_files
from tetrarch.boot.source import Source
from tetrarch.errors import ConfigError
from tetrarch.machine.config import MachineConfig
from tetrarch.machine.cpu_spec import CpuSpec
from tetrarch.machine.disks import check_images
from tetrarch.machine.engine_vm import EngineVm
from tetrarch.platforms.platform import Platform
from tetrarch.share.spec import share_tags

if TYPE_CHECKING:
    from tetrarch.console import ConsoleBackend
    from tetrarch.images import Reporter
    from tetrarch.machine.pc import Pc

__all__ = ["check_files", "load_guest", "resolve_guest", "with_installed_disk"]

_RESET_IDT_LIMIT = 0xFFFF
_SECTOR = 2048
_DESCRIPTOR = 16 * _SECTOR


def check_files(config: MachineConfig) -> None:
    """Raises BootError for a kernel or initrd that is no file which can be read, and
    ImageError for a disk that is no image."""
    files = [(file.path, "initrd") for file in initrd_files(config.initrd)]
    if config.kernel is not None:
        files.insert(0, (config.kernel, "kernel"))
    for path, what in files:
        with Source.open(path, what):
            pass
    if config.firmware is not None:
        from tetrarch.firmware.image import FirmwareImage
        from tetrarch.firmware.variables import check_variables

        check_variables(config.firmware, FirmwareImage.read(config.firmware))
        for cd in config.cdrom:
            _check_disc(cd.path)
    if config.floppy:
        from tetrarch.machine.floppies import drive_types

        drive_types(config.floppy)
    check_images(config)
    with disk_errors():
        images = (disk for disk in config.disk if not disk.vhost_user)
        discs = (cd.disk for cd in config.cdrom)
        for disk in (*images, *discs, *(floppy.disk for floppy in config.floppy)):
            disk_info(disk.path, disk.format)


def _check_mode(cpu: CpuSpec, registers: Mapping[str, int]) -> None:
    """Raises ConfigError for a kernel that starts in long mode, which its CPU has not."""
    if not registers["efer"] & EFER_LMA or not cpu.removed:
        return
    from tetrarch.machine.cpu_models import needing

    for feature in cpu.removed:
        if "lm" in needing([feature]):
            raise ConfigError(
                f"cpu {cpu}: the kernel starts in 64-bit mode, which no CPU without {feature} has",
                mend=f"leave -{feature} out, or give a 32-bit kernel",
            )


def _check_disc(path: Path) -> None:
    """Raises BootError for what firmware would find nothing on: a disc has a volume descriptor in
    its sector 16 (ECMA-119, 8.1; ECMA-167 2/9.1)."""
    with Source.open(path, "CD-ROM") as source:
        begins = source.size >= _DESCRIPTOR + _SECTOR
        identifier = source.read(_DESCRIPTOR + 1, 5) if begins else b""
        if identifier not in (b"CD001", b"BEA01"):
            raise source.error(
                "is no image of a disc: it has no volume descriptor",
                mend="name an ISO image, or give it as --disk",
            )


def with_installed_disk(config: MachineConfig) -> MachineConfig:
    """``config`` with the disk that was built under its image's name, and what boots it."""
    if config.kernel is not None or config.image is None:
        return config
    from tetrarch.images.store import DiskStore

    found = DiskStore().find(config.image)
    if found is None:
        return config
    changes = {
        "image": None,
        "kernel": found.kernel,
        "initrd": config.initrd or found.initrd,
        "append": f"{found.manifest.append} {TERMINAL}" if config.append is None else config.append,
        "disk": (DiskSpec(found.disk, format="raw"), *config.disk),
    }
    return config.model_copy(update=changes)


def resolve_guest(config: MachineConfig, reporter: Reporter | None = None) -> MachineConfig:
    """``config`` with a kernel: its own, else that of its image, which is fetched if need be.

    Firmware finds its own where none is named. Raises ImageError where there is none and none can
    be fetched.
    """
    if config.kernel is not None or (config.firmware is not None and config.image is None):
        return config
    if config.replay is not None:
        return config  # its memory is in the recording
    from tetrarch import images
    from tetrarch.images.store import DiskStore

    name = images.DEFAULT_IMAGE if config.image is None else config.image
    images.package_of(name, lambda: [disk.manifest.name for disk in DiskStore().list()])
    guest = images.ensure(images.Cache(), name, reporter or images.Reporter())
    files = {"image": None, "kernel": guest.kernel, "initrd": config.initrd or guest.initrd}
    return config.model_copy(update=files)


def load_guest(
    vm: EngineVm,
    config: MachineConfig,
    console: ConsoleBackend,
    platform: Platform,
    pc: Pc,
) -> None:
    """Puts a resolved guest into memory and its entry into the first vCPU's registers.

    Raises BootError for files that cannot be booted.
    """
    append = config.append
    if append is None and config.kernel is not None:
        from tetrarch.boot.unified import embedded_cmdline

        append = embedded_cmdline(config.kernel)
    if append is None:
        from tetrarch.boot.cmdline import DEFAULT_APPEND

        append = f"{DEFAULT_APPEND} {TERMINAL}"
    append = with_terminal(append, getattr(console, "guest_terminal", ""))
    # For images/guest/shares; Linux leaves words with a dot in them alone.
    shares = [f"tetrarch.share={tag}" for tag in share_tags(config.share)]
    append = " ".join(filter(None, (append, *shares, config.append_extra)))
    if pc.firmware is not None:
        registers = pc.firmware.load(config, append, pc.dsdt, pc.vcpus.there)
    elif config.kernel is not None:
        from tetrarch.boot import build_acpi, load_kernel
        from tetrarch.boot.generation import first_generation
        from tetrarch.boot.smbios import place_smbios

        first_generation(vm)
        place_smbios(vm, config.memory, platform.identity())
        rsdp, tables = build_acpi(
            config.cpus.apic_ids,
            vm.ram,
            pc.dsdt,
            there=pc.vcpus.there,
            vga=config.vga,
            timers=config.hpet,
        )
        for address, data in tables:
            vm.write_memory(address, data)
        registers = load_kernel(
            vm,
            config.kernel,
            config.initrd,
            append,
            rsdp,
            vga=config.vga,
            pvh=platform.xen is not None,
        )
        _check_mode(config.cpu, registers)
    else:
        raise ValueError("the guest has not been resolved")
    # Boot protocols leave the IDT open. With the limit of a CPU after RESET (SDM
    # Vol. 3A, table 10-1), an IDT of limit 0 is always the guest's own doing.
    vcpu = vm.vcpu(0)
    vcpu.set_regs({**registers, "idtr_limit": _RESET_IDT_LIMIT})
    if platform.start is not None:
        vcpu.set_regs(platform.start(vm, vcpu.regs()))
