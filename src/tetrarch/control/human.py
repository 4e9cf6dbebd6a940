"""Commands of QEMU's monitor for people (hmp-commands-info.hx), as text like its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from tetrarch._native import GuestMemoryError, Vm
from tetrarch.machine.machine import Machine
from tetrarch.machine.page_map import USER, WRITE, TooManyTables, mapped_ranges, table_levels
from tetrarch.net.mac import format_mac
from tetrarch.net.spec import NET_DRIVERS
from tetrarch.pci.bus import SLOTS
from tetrarch.virtio.net import NetKind
from tetrarch.virtio.vhost_user import VhostUserNet

__all__ = ["human_command"]

_LINEAR_MAX: Final = (1 << 64) - 1
_EXAMINE = re.compile(r"xp\s*/\s*([0-9]{1,6})?x?([bhwg])?\s+(0x[0-9a-fA-F]{1,16}|[0-9]{1,20})")
_SIZES = {"b": 1, "h": 2, "w": 4, "g": 8}
_CLASSES = {
    0x0101: "IDE controller",
    0x0106: "SATA controller",
    0x0107: "SAS controller",
    0x0108: "NVMe controller",
    0x0180: "SCSI controller",
    0x0200: "Ethernet controller",
    0x0600: "Host bridge",
    0x0780: "Communication controller",
}


def human_command(machine: Machine, line: str, vcpu: int) -> str:
    """What a person would read; also that there is no such command."""
    words = line.split()
    if match := _EXAMINE.fullmatch(line.strip()):
        count, unit, address = match.groups()
        return _examine(machine, int(count or 1), _SIZES[unit or "w"], int(address, 0))
    command = _COMMANDS.get(" ".join(words))
    if command is None:
        return f"unknown command: '{line}'\r\n"
    return command(machine, vcpu).replace("\n", "\r\n")


def _registers(machine: Machine, vcpu: int) -> str:
    return f"\nCPU#{vcpu}\n{machine.vcpu(vcpu).dump()}"


def _all_registers(machine: Machine, vcpu: int) -> str:
    return "".join(_registers(machine, vcpu.number) for vcpu in machine.vcpus)


def _mem(machine: Machine, vcpu: int) -> str:
    """Ranges of linear addresses that are mapped: first, behind the last, bytes, rights."""
    regs = machine.vcpu(vcpu).regs
    levels = table_levels(regs)
    if levels == 0:
        return "PG disabled\n"
    text, last = "", None
    try:
        for mapped in mapped_ranges(machine.read_memory, regs["cr3"], levels):
            if last is not None and (last[1], last[2]) == (mapped.linear, mapped.rights):
                last = last[0], mapped.end, mapped.rights
                continue
            text += _mem_line(last)
            last = mapped.linear, mapped.end, mapped.rights
        return text + _mem_line(last)
    except TooManyTables:
        return f"{text}{_mem_line(last)}and more: the guest has too many tables\n"


def _mem_line(mapped: tuple[int, int, int] | None) -> str:
    if mapped is None:
        return ""
    start, end, rights = mapped
    shown = f"{'u' if rights & USER else '-'}r{'w' if rights & WRITE else '-'}"
    return f"{start:016x}-{end & _LINEAR_MAX:016x} {end - start:016x} {shown}\n"


def _mtree(machine: Machine, vcpu: int) -> str:
    """Who answers where, as QEMU's flat views have it."""
    vm = machine.engine_vm
    ports, mmio = (vm.port_regions(), vm.mmio_regions()) if isinstance(vm, Vm) else ([], [])
    memory = [(first, last, "i/o", who) for first, last, who in mmio]
    memory += [(base, base + size - 1, "ram", "pc.ram") for base, size in vm.ram]
    views = [
        ("I/O", "io", [(first, last, "i/o", who) for first, last, who in ports]),
        ("memory", "system", sorted(memory)),
    ]
    text = ""
    for number, (space, root, regions) in enumerate(views):
        text += f'FlatView #{number}\n AS "{space}", root: {root}\n Root memory region: {root}\n'
        for first, last, kind, who in regions:
            text += f"  {first:016x}-{last:016x} (prio 0, {kind}): {who}\n"
        text += "\n"
    return text


def _pci(machine: Machine, vcpu: int) -> str:
    text, names = "", machine.pc.plugged.slots
    for slot in range(SLOTS):
        function = machine.pc.pci.function(slot)
        if function is None:
            continue
        get = function.config.get
        kind = get(0x0A, 2)
        what = _CLASSES.get(kind, f"Class {kind:04d}")
        text += f"  Bus  0, device {slot:3}, function 0:\n"
        text += f"    {what}: PCI device {get(0, 2):04x}:{get(2, 2):04x}\n"
        text += f"      PCI subsystem {get(0x2C, 2):04x}:{get(0x2E, 2):04x}\n"
        for bar in function.bars:
            at = function.address(bar)
            width = "I/O" if bar.io else f"{64 if bar.wide else 32} bit memory"
            text += f"      BAR{bar.index}: {width} at {at:#x} [{at + bar.size - 1:#x}].\n"
        text += f'      id "{names.get(slot, "")}"\n'
    return text


def _block(machine: Machine, vcpu: int) -> str:
    text = ""
    for node in machine.pc.blocks.all():
        readonly = ", read-only" if node.spec.readonly else ""
        text += f"{node.name}: {node.spec.path} ({node.spec.format or 'auto'}{readonly})\n"
        text += f"    Attached to:      {node.device or '(nothing)'}\n"
        direct = ", direct" if node.spec.cache == "none" else ""
        text += f"    Cache mode:       writeback{direct}\n\n"
    return text


def _network(machine: Machine, vcpu: int) -> str:
    text = ""
    for net, spec in zip(machine.pc.nets, machine.config.net, strict=True):
        mac = format_mac(net.config[:6] if isinstance(net, (NetKind, VhostUserNet)) else net.mac)
        model = NET_DRIVERS[spec.model]
        text += f"{net.name}: index=0,type=nic,model={model},macaddr={mac}\n"
        text += f" \\ {net.name}: index=0,type={spec.kind},{spec}\n"
    added = machine.pc.hotplug.added if machine.pc.hotplug is not None else {}
    for netdev in machine.pc.netdevs.all():
        if netdev.device is not None:
            model = added[netdev.device].driver if netdev.device in added else "none"
            text += f"{netdev.device}: index=0,type=nic,model={model}\n \\ "
        text += f"{netdev.name}: index=0,type={netdev.spec.kind},{netdev.spec}\n"
    return text


def _examine(machine: Machine, count: int, size: int, address: int) -> str:
    """Physical memory, 16 bytes a line, or 8 of single bytes."""
    each = 8 if size == 1 else 16 // size
    text = ""
    for at in range(0, count, each):
        start = address + at * size
        wanted = min(each, count - at)
        try:
            data = machine.read_memory(start, wanted * size)
        except (GuestMemoryError, OverflowError):
            return f"{text}{start:016x}: Cannot access memory\r\n"
        values = (
            int.from_bytes(data[i : i + size], "little") for i in range(0, wanted * size, size)
        )
        shown = " ".join(f"0x{value:0{2 * size}x}" for value in values)
        text += f"{start:016x}: {shown}\r\n"
    return text


def _help(machine: Machine, vcpu: int) -> str:
    return "".join(f"{name}\n" for name in (*_COMMANDS, "xp /COUNTxSIZE ADDRESS"))


_COMMANDS: dict[str, Callable[[Machine, int], str]] = {
    "help": _help,
    "info registers": _registers,
    "info registers -a": _all_registers,
    "info mem": _mem,
    "info mtree": _mtree,
    "info mtree -f": _mtree,
    "info pci": _pci,
    "info block": _block,
    "info network": _network,
}
