"""The small PC: which devices there are, where they are, how they are wired.

The memory and the interrupt lines are in ``map.py``; the ports:

    0x020 0x0A0 0x4D0, 0x040 0x061      PICs, PIT: in the engine
    the rows of the table below         devices of ours

What nobody claims reads as ones, and writes to it are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tetrarch._native import Vm
from tetrarch.block.disk import OnStop
from tetrarch.devices import (
    I8042,
    AcpiPm,
    DebugExit,
    Port92,
    PvPanic,
    ResetCf9,
    RtcCmos,
    Uart16550,
    acpi_pm,
    debug_exit,
    i8042,
    port_92,
    pvpanic,
    reset_cf9,
    rtc_cmos,
    uart16550,
)
from tetrarch.devices import input_codes as codes
from tetrarch.devices._state import State
from tetrarch.devices.input_user import InputUser
from tetrarch.errors import StateError
from tetrarch.machine import map as machine_map
from tetrarch.machine.balloon import Balloon
from tetrarch.machine.blocks import BlockNodes
from tetrarch.machine.config import MachineConfig
from tetrarch.machine.disks import MachineDisk, machine_disks
from tetrarch.machine.engine_vm import EngineVm
from tetrarch.machine.events import Events
from tetrarch.machine.hotplug import HotPlug
from tetrarch.machine.netdevs import Netdevs
from tetrarch.machine.networks import MachineNet, machine_nets
from tetrarch.machine.plugged import PluggedDevices
from tetrarch.machine.shares import MachineShare, machine_shares
from tetrarch.machine.status import ExitStatus, StopReason
from tetrarch.machine.threads import VcpuThreads
from tetrarch.machine.vcpus import PluggedVcpus
from tetrarch.machine.virtio import VirtioSlots
from tetrarch.pci import PciBus, bus, hotplug
from tetrarch.platforms.platform import Platform
from tetrarch.virtio.balloon import BalloonKind
from tetrarch.virtio.blk import BlkKind
from tetrarch.virtio.console import ConsoleKind, ConsolePort
from tetrarch.virtio.input import InputKind
from tetrarch.virtio.kind import VirtioKind
from tetrarch.virtio.net import NetKind
from tetrarch.virtio.rng import RngKind
from tetrarch.virtio.vhost_user import VhostUserBlk, VhostUserNet
from tetrarch.virtio.vsock import VsockKind

if TYPE_CHECKING:  # Device is a protocol: of the stub file alone
    from tetrarch._native import Device
    from tetrarch.devices import Hpet, Vga
    from tetrarch.devices.svga2 import Svga2
    from tetrarch.devices.vbe_dispi import VbeDispi
    from tetrarch.machine.firmware import MachineFirmware
    from tetrarch.platforms.vmware.vmci import Vmci

__all__ = ["Pc", "PortRange", "SavedDevice", "assemble_pc", "check_names"]


class PortRange(NamedTuple):
    base: int
    length: int
    device: Device
    sizes: Sequence[int] | None = None
    """The widths of access that the device decodes; None: all."""


class SavedDevice(Protocol):
    """A device with a state."""

    def reset(self) -> None: ...
    def save(self) -> State: ...
    def load(self, state: State) -> None: ...


@dataclass(frozen=True)
class Pc:
    """The devices of one PC."""

    uart: Uart16550
    rtc: RtcCmos
    acpi: AcpiPm
    vcpus: PluggedVcpus
    """Which are in the machine."""
    pci: PciBus
    dsdt: Sequence[bytes]
    """Devices that the DSDT names beside those of every PC."""
    disks: Sequence[MachineDisk]
    nets: Sequence[MachineNet]
    shares: Sequence[MachineShare]
    virtio: VirtioSlots | None
    """Where further virtio devices go; a stand-in for the engine has no place for them."""
    vsock: VsockKind | Vmci | None
    """What has the guest's ports, if somebody listens for them."""
    balloon: Balloon | None
    inputs: Sequence[InputUser]
    """Those of virtio and at the keyboard controller, as they were asked for."""
    input_kinds: Sequence[InputKind]
    console_ports: Sequence[ConsolePort]
    """Of the virtio console."""
    devices: Mapping[str, SavedDevice]
    """Those that stay, by the name that their state is saved under."""
    plugged: PluggedDevices
    """Those on the PCI bus."""
    blocks: BlockNodes
    netdevs: Netdevs
    hotplug: HotPlug | None
    """A stand-in for the engine has none."""
    firmware: MachineFirmware | None = None
    vga: Vga | None = None
    hpet: Hpet | None = None
    svga: Svga2 | None = None
    vbe: VbeDispi | None = None
    """The modes of its BIOS."""

    def save(self) -> dict[str, State]:
        return {name: device.save() for name, device in self.devices.items()}

    def load(self, states: Mapping[str, State]) -> None:
        """Raises StateError where there is a state too many or too few, or one that is none."""
        check_names("device", states, self.devices)
        for name, device in self.devices.items():
            if not isinstance(states[name], Mapping):
                raise StateError(f"saved state of {name!r} is none", mend="save it again")
            device.load(states[name])

    def reset(self) -> None:
        self.vcpus.reset()
        for device in self.devices.values():
            device.reset()
        self.plugged.reset()
        self.pci.place()

    def close(self) -> None:
        """Ends what runs beside the vCPUs, and what waits for them."""
        self.plugged.close()
        self.vcpus.close()
        self.rtc.close()
        if self.hpet is not None:
            self.hpet.close()
        if self.svga is not None:
            self.svga.close()
        for disk in self.disks:
            disk.close()
        if self.hotplug is not None:
            self.hotplug.close()
        self.blocks.close()
        self.netdevs.close()
        for net in self.nets:
            net.close()
        for share in self.shares:
            share.close()
        if self.vsock is not None:
            self.vsock.close()
        for kind in self.input_kinds:
            kind.close()
        if self.firmware is not None:
            self.firmware.close()

    def resumed(self) -> None:
        """The machine goes on after a hold."""
        self.blocks.retry()


def check_names(what: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    for name in set(found) ^ set(wanted):
        lacks, has = ("machine", "saved state") if name in found else ("saved state", "machine")
        raise StateError(
            f"the {lacks} has no {what} {name!r}, which the {has} has",
            mend="make the machine as it was when it was saved",
        )


def assemble_pc(
    vm: EngineVm,
    config: MachineConfig,
    platform: Platform,
    end: Callable[[ExitStatus | BaseException], None],
    stop: OnStop,
    events: Events,
    panicked: Callable[[], None],
    vcpus: PluggedVcpus,
    threads: VcpuThreads,
) -> Pc:
    """Makes the devices and attaches them to ``vm``.

    ``end`` is called, on a vCPU's thread, when the guest switches the machine off or resets it,
    and with what a filter of a network raises; ``stop`` where the machine is to be held for a
    disk. ``events`` hears of disks, of the balloon and of devices that are out; ``panicked`` is
    called when the guest says that it has. ``threads`` run the vCPUs.
    """

    def line(gsi: int) -> Callable[[bool], None]:
        return vm.irq_source(gsi).set

    def power_off() -> None:
        end(ExitStatus(StopReason.POWERED_OFF, "by ACPI"))

    def power_off_by_xen() -> None:
        end(ExitStatus(StopReason.POWERED_OFF, "by Xen's shutdown"))

    def reset(by: str) -> Callable[[], None]:
        return lambda: end(ExitStatus(StopReason.RESET, f"by {by}"))

    def leave(value: int) -> None:
        end(ExitStatus(StopReason.DEBUG_EXIT, value=value))

    uart = Uart16550(vm.irq_source(uart16550.GSI))
    floppy_types: list[int] = []
    if config.floppy:
        from tetrarch.machine.floppies import drive_types

        floppy_types = drive_types(config.floppy)
    rtc = RtcCmos(line(rtc_cmos.GSI), vm.clock_ns, vm.ram, floppy_types)
    keyboard = I8042(
        line(i8042.GSI),
        reset("the keyboard controller"),
        line(i8042.AUX_GSI),
        keyboard="ps2-keyboard" in config.input,
        mouse="ps2-mouse" in config.input,
    )
    with_firmware = config.firmware is not None
    acpi = AcpiPm(line(acpi_pm.GSI), vm.clock_ns, power_off, firmware=with_firmware)
    control_a = Port92(reset("port 0x92"))
    reset_control = ResetCf9(reset("port 0xCF9"))
    panic_port = PvPanic(panicked, lambda: events.tell("guest-crashloaded", action="run"))
    pci = PciBus(vm, chipset=with_firmware)
    blocks = BlockNodes(stop, events)
    netdevs = Netdevs(config.name, end)
    hot_plug: HotPlug | None = None

    def released(name: str) -> None:
        if hot_plug is not None:
            hot_plug.released(name)

    def deleted(name: str) -> None:
        events.tell("device-deleted", device=name, path=f"/machine/peripheral/{name}")

    def balloon_changed(actual: int) -> None:
        events.tell("balloon-change", actual=config.memory - actual)

    plugged = PluggedDevices(pci, acpi, released, deleted)
    vcpus.connect(threads, acpi)
    devices: dict[str, SavedDevice] = {
        "i8042": keyboard,
        "rtc": rtc,
        "com1": uart,
        "acpi-pm": acpi,
        "pci-config": pci,
        "pci-hotplug": plugged.hotplug,
        "port-92": control_a,
        "reset": reset_control,
        **platform.devices,
    }

    ports = [
        PortRange(i8042.DATA_PORT, 1, keyboard.data),  # GSI 1, and 12 with a mouse
        PortRange(i8042.STATUS_PORT, 1, keyboard.status),
        PortRange(rtc_cmos.PORT_BASE, rtc_cmos.PORTS, rtc),  # GSI 8
        PortRange(port_92.PORT_BASE, port_92.PORTS, control_a),
        PortRange(uart16550.PORT_BASE, uart16550.PORTS, uart),  # GSI 4
        PortRange(pvpanic.PORT_BASE, pvpanic.PORTS, panic_port),
        PortRange(acpi_pm.PORT_BASE, acpi_pm.PORTS, acpi),  # GSI 9, level
        PortRange(machine_map.PCI_HOTPLUG, hotplug.PORTS, plugged.hotplug, sizes=(4,)),
        PortRange(bus.ADDRESS_PORT, 4, pci.address_port, sizes=(4,)),
        PortRange(reset_cf9.PORT_BASE, reset_cf9.PORTS, reset_control),
        PortRange(bus.DATA_PORT, bus.DATA_PORTS, pci.data_ports),
    ]
    if vcpus.hotplug is not None:
        devices["cpu-hotplug"] = vcpus.hotplug
        ports.append(PortRange(machine_map.CPU_HOTPLUG, config.cpus.max, vcpus.hotplug, sizes=(1,)))
    if config.debug_exit:
        devices["debug-exit"] = ender = DebugExit(leave)
        ports.append(PortRange(debug_exit.PORT_BASE, debug_exit.PORTS, ender))

    screen: Vga | None = None
    if config.vga:
        from tetrarch.devices import vga

        devices["vga"] = screen = vga.Vga()
        ports.append(PortRange(vga.PORT_BASE, vga.PORTS, screen))
    firmware: MachineFirmware | None = None
    if config.firmware is not None and isinstance(vm, Vm):
        from tetrarch.devices import debug_console, fw_cfg
        from tetrarch.machine.firmware import MachineFirmware

        firmware = MachineFirmware(vm, config.firmware, platform.identity, end)
        devices |= {"fw-cfg": firmware.fw_cfg, "debug-console": firmware.debug_console}
        if config.vga and firmware.ramfb is not None:
            devices["ramfb"] = firmware.ramfb
        ports += [
            PortRange(fw_cfg.SELECTOR_PORT, 2, firmware.fw_cfg.ports),
            PortRange(fw_cfg.DMA_PORT, fw_cfg.DMA_PORTS, firmware.fw_cfg.dma),
            *(PortRange(port, 1, firmware.debug_console) for port in debug_console.PORTS),
            # Where OVMF switches off, whatever the chipset says (BaseResetSystemAcpiGetLib).
            PortRange(machine_map.PIIX4_PM, acpi_pm.PORTS, acpi),
        ]
        if firmware.variables is not None and firmware.flash is not None:
            devices["flash"] = firmware.flash
            length = len(firmware.variables.content)
            vm.attach_mmio(firmware.variables.base, length, firmware.flash)

    for base, length, device, sizes in ports:
        vm.attach_ports(base, length, device, sizes=sizes)
    ecam, ecam_end = machine_map.ECAM
    vm.attach_mmio(ecam, ecam_end - ecam, pci.ecam)
    dsdt: list[bytes] = []
    timers: Hpet | None = None
    if config.hpet:
        from tetrarch.boot.acpi import hpet_device
        from tetrarch.devices import hpet

        wires = [hpet.Wire(line(gsi), vm.irq_source(gsi).pulse) for gsi in hpet.GSIS]
        devices["hpet"] = timers = hpet.Hpet(wires, vm.clock_ns)
        vm.attach_mmio(hpet.BASE, hpet.BYTES, timers)
        dsdt.append(hpet_device())
    slots: VirtioSlots | None = None
    disks: list[MachineDisk] = []
    nets: list[MachineNet] = []
    shares: list[MachineShare] = []
    vsock: VsockKind | Vmci | None = None
    balloon: Balloon | None = None
    svga: Svga2 | None = None
    vbe: VbeDispi | None = None
    if keyboard.mouse is not None:
        from tetrarch.boot.acpi import mouse_device

        dsdt.append(mouse_device())
        if platform.vmware is not None:
            # A packet without a movement: its driver then asks by the backdoor.
            nothing = (codes.EV_REL, codes.REL_X, 0)
            platform.vmware.mouse.connect(partial(keyboard.mouse.send, nothing))
    inputs: dict[int, InputUser] = {}
    input_kinds: list[InputKind] = []
    for index, model in enumerate(config.input):
        at_controller = {"ps2-keyboard": keyboard.keyboard, "ps2-mouse": keyboard.mouse}.get(model)
        if at_controller is not None:
            inputs[index] = at_controller
    console_ports: Sequence[ConsolePort] = ()
    if isinstance(vm, Vm):  # a stand-in has no I/O thread
        slots = VirtioSlots(vm, plugged, config.virtio, dsdt)
        hot_plug = HotPlug(vm, plugged, blocks, netdevs)

        def plug_virtio(kind: VirtioKind, slots: VirtioSlots = slots) -> None:
            if (on_page := slots.plug(kind)) is not None:
                devices[kind.name] = on_page

        with ExitStack() as undo:
            if firmware is not None:
                undo.callback(firmware.close)
            if config.vsock is not None and config.vsock_at == "virtio":
                vsock = VsockKind(vm, config.vsock)
                undo.callback(vsock.close)
            undo.callback(blocks.close)
            if config.floppy:
                from tetrarch.boot.acpi import floppy_device
                from tetrarch.devices import dma8237, fdc82077
                from tetrarch.machine.floppies import MachineFloppies

                floppies = MachineFloppies(vm, config.floppy, blocks)
                undo.callback(floppies.close)
                disks.append(floppies)
                dma, controller = floppies.dma, floppies.controller
                devices |= {"dma": dma, "fdc": controller}
                dsdt.append(floppy_device())
                vm.attach_ports(dma8237.PORT_BASE, dma8237.PORTS, dma)
                for channel, port in enumerate(dma8237.PAGE_PORTS):
                    vm.attach_ports(port, 1, dma.page(channel))
                vm.attach_ports(fdc82077.PORT_BASE, fdc82077.PORTS, controller)
                vm.attach_ports(fdc82077.DIR_PORT, 1, controller.dir)
            for disk in machine_disks(vm, config, blocks):
                disks.append(disk)
                if isinstance(disk, (BlkKind, VhostUserBlk)):
                    plug_virtio(disk)
                else:
                    plugged.plug(disk.name, disk)
            for net in machine_nets(vm, config, end):
                undo.callback(net.close)
                nets.append(net)
                if isinstance(net, (NetKind, VhostUserNet)):
                    plug_virtio(net)
                else:
                    plugged.plug(net.name, net)
            for share in machine_shares(vm, config):
                undo.callback(share.close)
                shares.append(share)
                plug_virtio(share.kind)
            if isinstance(vsock, VsockKind):
                plug_virtio(vsock)
            if config.rng:
                plug_virtio(RngKind(vm))
            if config.drawn_by == "svga":
                from tetrarch.devices import vbe_dispi
                from tetrarch.devices.svga2 import Svga2

                svga = Svga2(vm)
                undo.callback(svga.close)
                plugged.plug("svga", svga)
                devices["vbe-dispi"] = vbe = vbe_dispi.VbeDispi(svga.vram)
                vm.attach_ports(vbe_dispi.PORT_BASE, vbe_dispi.PORTS, vbe)
            vmci: Vmci | None = None
            if platform.vmware is not None and config.record is not None:
                # The host writes to memory by itself then, which is in no recording.
                platform.vmware.channels.high_bandwidth = False
            elif platform.vmware is not None:
                platform.vmware.stolen.connect(vm)
            # Linux has one way for its sockets to the host, and takes VMCI's where it is there:
            # those of virtio's device would be without a way.
            if vsock is None and (platform.vmware is not None or config.vsock_at == "vmci"):
                from tetrarch.platforms.vmware.vmci import Vmci

                vmci = Vmci(vm, notifications=config.record is None, sockets=config.vsock)
                undo.callback(vmci.close)
                plugged.plug("vmci", vmci)
                vsock = vmci if config.vsock is not None else None
            if platform.xen is not None:
                spec = config.cpus
                platform.xen.connect(
                    vm,
                    (spec.sockets, spec.cores, spec.threads),
                    {0: power_off_by_xen, 1: reset("Xen's shutdown"), 3: panicked},
                )
            if config.balloon and platform.vmware is not None:
                balloon = platform.vmware.balloon
                rings = None if vmci is None or not vmci.notifications else vmci.ring
                platform.vmware.balloon.connect(config.memory, balloon_changed, rings)
            elif config.balloon:
                virtio_balloon = BalloonKind(vm, config.memory, balloon_changed)
                plug_virtio(virtio_balloon)
                balloon = virtio_balloon
            for index, model in enumerate(config.input):
                if index in inputs:
                    continue
                input_kind = InputKind(vm, model, f"input{index}", end)
                undo.callback(input_kind.close)
                input_kinds.append(input_kind)
                inputs[index] = input_kind.device
                plug_virtio(input_kind)
            if config.virtio_console:
                console = ConsoleKind(vm, [port.name for port in config.virtio_console])
                console_ports = console.ports
                plug_virtio(console)
            undo.pop_all()
    return Pc(
        uart,
        rtc,
        acpi,
        vcpus,
        pci,
        dsdt,
        disks,
        nets,
        shares,
        slots,
        vsock,
        balloon,
        [inputs[index] for index in sorted(inputs)],
        input_kinds,
        console_ports,
        devices,
        plugged,
        blocks,
        netdevs,
        hot_plug,
        firmware,
        screen,
        timers,
        svga,
        vbe,
    )
