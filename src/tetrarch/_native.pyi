"""Types of the native module: the Rust core behind one machine."""

from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from os import PathLike
from typing import (
    Any,
    ClassVar,
    Literal,
    NotRequired,
    Protocol,
    Self,
    TypedDict,
    final,
    type_check_only,
)

from typing_extensions import disjoint_base

from tetrarch.platforms.platform import Platform

__all__ = [
    "BT_MAX_VCPUS",
    "LOW_RAM_END",
    "AhciPorts",
    "DeviceMemory",
    "Disk",
    "DiskBytes",
    "DiskError",
    "DiskSource",
    "E1000Rings",
    "EngineError",
    "GuestCall",
    "GuestFault",
    "GuestMemoryError",
    "GuestTrap",
    "IdeChannels",
    "Interrupt",
    "Intx",
    "IrqSource",
    "IsrStatus",
    "Latch",
    "MsiVectors",
    "MsixTable",
    "Network",
    "NullPort",
    "NvmeQueues",
    "PixelFormat",
    "PvscsiRings",
    "Region",
    "RegisterPortAccess",
    "Replay",
    "RustDevice",
    "SerialPort",
    "Vcpu",
    "VhostUserBackEnd",
    "VhostUserDevice",
    "VirtioBalloon",
    "VirtioBlk",
    "VirtioChain",
    "VirtioConsole",
    "VirtioDevice",
    "VirtioNet",
    "VirtioRng",
    "VirtioServed",
    "VirtioVsock",
    "Vm",
    "VmciDevice",
    "Vmxnet3Causes",
    "Vmxnet3Rings",
    "XenDomain",
    "__version__",
    "confine_control",
    "confine_prepare",
    "disk_check",
    "disk_create",
    "disk_info",
    "engine_available",
    "host_cpu_features",
    "kvm_capabilities",
    "kvm_probe",
    "landlock_version",
    "own_user_namespace",
    "recorded_configuration",
    "unpack_lz4_block",
    "vnc_answer",
]

__version__: str

BT_MAX_VCPUS: int
"""Of a machine on engine bt."""

LOW_RAM_END: int
"""Where RAM stops below 4 GiB; what does not fit goes on there."""

@type_check_only
class Device(Protocol):
    """What can be attached to a port or memory range.

    ``offset`` counts from the start of the range, ``size`` is the width of the
    access in bytes (1, 2, 4 or 8). An exception stops the machine and comes
    out of ``Vcpu.run``.
    """

    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...

class EngineError(Exception):
    """The engine cannot do what was asked: a host limit or a bad request.

    ``cause`` and ``mend`` are those of ``tetrarch.TetrarchError``; ``mend`` is empty where
    the engine knows none.
    """

    cause: str
    mend: str

class GuestFault(Exception):
    """An exception for the guest: ``GuestFault(vector, error=None, address=0)``.

    Raised by a handler of a platform; the guest's instruction then raises it. An error code is
    for vectors that have one, and 0 if not given; ``address`` goes to CR2 with a page fault.
    """

    def __init__(self, vector: int, error: int | None = None, address: int = 0, /) -> None: ...

class GuestMemoryError(Exception):
    """A guest physical range that is not RAM of this machine."""

    address: int
    length: int

@disjoint_base
class RustDevice:
    """A device written in Rust: the base of each. No access of a guest enters Python."""

    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...

@final
class NullPort(RustDevice):
    """A device in Rust that reads as 0 and loses writes."""

    def __new__(cls) -> Self: ...

@final
class Latch(RustDevice):
    """A register in Rust that reads as what was written last, at any offset."""

    def __new__(cls) -> Self: ...
    @property
    def value(self) -> int: ...
    @property
    def writes(self) -> int:
        """How often it was written."""

@type_check_only
class Wire(Protocol):
    """What a device drives an interrupt line by: an ``IrqSource``, or a stand-in for one."""

    def set(self, level: bool) -> None: ...

@disjoint_base
class SerialPort(RustDevice):
    """A 16550A UART in Rust: no byte of a guest's enters Python by itself.

    What the guest sends is collected, and given to whoever waits for it: when a millisecond
    has passed since the first byte, or with 4 KiB. With 16 KiB the vCPU waits for the reader.
    A wire that is not an ``IrqSource`` must not refer to the port.
    """

    def __new__(cls, wire: Wire) -> Self: ...
    def receive(self, data: bytes) -> None:
        """Input. Never blocks: it comes as the guest takes it, and nothing is lost."""
    @property
    def queued(self) -> int:
        """Input bytes that the guest has not taken into its FIFO."""
    def take_output(self) -> bytes:
        """What the guest has sent since it was asked last, maybe nothing."""
    def wait_output(self) -> bytes:
        """The next bytes that the guest sends, for one thread that asks again and again.

        Asking again says that the last ones are delivered. Empty after ``end_output``,
        when all bytes were given.
        """
    def flush_output(self, timeout: float) -> bool:
        """Waits until all that was sent is delivered; false if it is not in that time."""
    def end_output(self) -> None:
        """Says that the guest sends no more, and that no vCPU waits any longer."""
    def registers(self) -> dict[str, Any]:
        """The state; see ``tetrarch.devices.uart16550.UartState``."""
    def set_registers(self, values: Mapping[str, Any]) -> None: ...

@final
class Region:
    """A range of ports or memory where a device answers.

    It can be changed at any time, from any thread and from devices. An access
    that began before a change ends as it began. Forgetting the object leaves
    the region where it is. All but ``detach`` raise EngineError when detached.
    """

    @property
    def base(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def mapped(self) -> bool: ...
    def move(self, base: int) -> None:
        """Sets the base; a mapped region answers there from now on.

        Moved onto others, as a guest may do, it answers what they leave: of two
        the one that was placed there first. EngineError past the last address.
        """
    def map(self) -> None:
        """Lets the device answer at the base; as after ``attach_ports``."""
    def unmap(self) -> None:
        """Lets no access reach the device until the region is mapped again."""
    def detach(self) -> None:
        """Removes the region for good, and lets go of the device."""

@final
class XenDomain:
    """What a guest of Xen's calls per event or per tick, and the ports of its event channels.

    Results are those of hypercalls: an error is a negative number of xen/include/public/errno.h.
    EngineError before ``connect``.
    """

    PORTS: ClassVar[int]
    def __new__(cls) -> Self: ...
    def connect(self, vm: Vm, domid: int, topology: tuple[int, int, int]) -> None:
        """``topology``: sockets, cores of each, threads of each. Once."""
    def reset(self) -> None:
        """As a domain is built: no ports, no timers, nothing in memory."""
    def now_ns(self) -> int:
        """What the guest's clock says."""
    def place_shared_info(self, address: int) -> int: ...
    def register_vcpu_info(self, vcpu: int, address: int) -> int: ...
    def register_time(self, vcpu: int, address: int) -> int: ...
    def set_upcall_vector(self, vcpu: int, vector: int) -> int: ...
    def allocate_unbound(self, remote: int) -> int:
        """The new port, as those below."""
    def bind_own(self, domid: int, port: int) -> int:
        """To a port of the domain's own, which waits for it."""
    def bind_virq(self, virq: int, vcpu: int) -> int: ...
    def bind_ipi(self, vcpu: int) -> int: ...
    def bind_vcpu(self, port: int, vcpu: int) -> int: ...
    def close(self, port: int) -> int: ...
    def status(self, port: int) -> tuple[int, int, int]:
        """What it is bound to, as EVTCHNOP_status numbers it; the vCPU; and the other end's domain
        or port, or the VIRQ."""
    def open_ports(self) -> list[int]: ...
    def save(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any], tsc: int) -> None:
        """Of a machine that stands; ``tsc`` is that of its vCPUs."""

@final
class IrqSource:
    """One device's wire to an interrupt line: the line is high while any wire is.

    A source that is collected is low.
    """

    @property
    def gsi(self) -> int: ...
    def set(self, level: bool) -> None: ...
    def pulse(self) -> None:
        """High and low: an edge where no other source holds the line high."""

@final
class Interrupt:
    """An interrupt that is an event: a message, or a bit of a status."""

    def trigger(self) -> None:
        """Raises it; from any thread."""

@final
class Intx:
    """A PCI function's interrupt line, between its device and the wire of its slot."""

    def __new__(cls) -> Self: ...
    def set(self, level: bool) -> None:
        """What the device wants; from any thread."""
    def set_disabled(self, disabled: bool) -> None:
        """Interrupt Disable of the command register."""
    def connect(self, wire: Wire | None) -> None:
        """Puts the function into a slot, or takes it out of one."""
    @property
    def level(self) -> bool:
        """What the device wants, also where it is disabled."""

@final
class IsrStatus:
    """The interrupt status of a virtio transport without messages, and its line, which is
    high while a bit is set: 1 for queues, 2 for the configuration (virtio 1.2, 4.1.4.5)."""

    def __new__(cls, wire: Wire) -> Self: ...
    @property
    def status(self) -> int: ...
    def set(self, bits: int) -> None:
        """Sets all bits, as from a saved state."""
    def acknowledge(self, bits: int) -> int:
        """Clears bits; gives what was set before."""
    def interrupt(self, bit: int) -> Interrupt:
        """An interrupt that sets the bit."""

@final
class MsiVectors:
    """The vectors of a PCI function's MSI capability (PCI Local Bus 3.0, 6.8.1)."""

    def __new__(cls, vm: Vm, vectors: int) -> Self:
        """EngineError for other numbers than 1, 2, 4, 8, 16 and 32."""
    @property
    def vectors(self) -> int: ...
    def set_control(self, enabled: bool) -> None:
        """What the driver wrote to the capability's message control."""
    def set(self, number: int, address: int, data: int, masked: bool) -> None:
        """The message of a vector. Unmasking sends what is pending."""
    @property
    def pending(self) -> int:
        """A bit for each vector whose message a mask keeps back."""
    def set_pending(self, pending: int) -> None:
        """As a saved state has it; sends nothing."""
    def vector(self, number: int, otherwise: Interrupt | None = None) -> Interrupt:
        """As ``MsixTable.vector``."""
    def reset(self) -> None: ...

@final
class MsixTable(RustDevice):
    """The MSI-X structures of a PCI function (PCI Local Bus 3.0, 6.8.2): a page, with the
    table at its start and the pending bits at PENDING_OFFSET."""

    PENDING_OFFSET: int
    def __new__(cls, vm: Vm, vectors: int) -> Self:
        """EngineError for less than 1 or more than 128 vectors."""
    @property
    def vectors(self) -> int: ...
    def set_control(self, enabled: bool, masked: bool) -> None:
        """What the driver wrote to the capability's message control."""
    def vector(self, number: int, otherwise: Interrupt | None = None) -> Interrupt:
        """The interrupt of a vector; ``otherwise`` while MSI-X is off. With a number that
        is no vector it is none."""
    def reset(self) -> None: ...
    def save(self) -> tuple[list[int], list[bool]]:
        """Four words of each vector, and which are pending."""
    def load(self, words: Sequence[int], pending: Sequence[bool]) -> bool:
        """False, and nothing taken, where they are of another number of vectors."""

@type_check_only
class DriveForm(TypedDict):
    """A drive at a controller of ATA or SCSI."""

    name: str
    disk: Disk
    serial: str
    cd: bool

@final
class AhciPorts(RustDevice):
    """An AHCI controller: a device for the memory of its BAR, and the drives at its ports."""

    MAX_PORTS: int
    def __new__(
        cls, vm: Vm, name: str, drives: Sequence[DriveForm], line: Wire, message: Interrupt
    ) -> Self:
        """``line`` is driven while there are interrupts, and ``message`` raised for each that
        is new. EngineError for no drive, or more than MAX_PORTS."""
    def set_master(self, master: bool) -> None:
        """Whether the device may access memory; at first it may. When it was taken from it, nothing
        is written there any more, and it goes on when it is given back."""
    def reset(self) -> None:
        """When it returns nothing touches guest memory."""
    def save(self) -> tuple[list[int], list[list[int]]]:
        """The controller and its ports, in numbers; exact while the machine is held."""
    def load(self, controller: Sequence[int], ports: Sequence[Sequence[int]]) -> None:
        """EngineError where they are of another controller."""
    @property
    def stopped(self) -> int:
        """Requests that wait for the host to be mended."""
    def close(self) -> None:
        """Lets go of the disks."""

@type_check_only
class IdeState(TypedDict):
    """An IDE controller as it is saved, in numbers: ``crates/storage`` says which."""

    channels: list[list[int]]
    buffers: list[list[int]]
    drives: list[list[int]]

@final
class IdeChannels:
    """The channels of an IDE controller, and the drives at them."""

    CHANNELS: int
    DRIVES: int
    """Of each channel."""
    def __new__(
        cls, vm: Vm, name: str, drives: Sequence[DriveForm | None], lines: tuple[Wire, Wire]
    ) -> Self:
        """The first channel's two, then the second's. EngineError for more."""
    def task_ports(self, channel: int) -> RustDevice:
        """The eight ports of a channel's devices."""
    def control_port(self, channel: int) -> RustDevice:
        """The port of a channel's alternate status and control."""
    def master_ports(self) -> RustDevice:
        """The 16 ports of the bus masters."""
    def set_master(self, master: bool) -> None:
        """Whether the device may access memory; at first it may. When it was taken from it, nothing
        is written there any more, and it goes on when it is given back."""
    def reset(self) -> None:
        """When it returns nothing touches guest memory."""
    def save(self) -> IdeState:
        """Exact while the machine is held."""
    def load(self, state: IdeState) -> None:
        """EngineError where it is of another controller."""
    @property
    def stopped(self) -> int:
        """Requests that wait for the host to be mended."""
    def close(self) -> None:
        """Lets go of the disks."""

@type_check_only
class NvmeState(TypedDict):
    """Queues of an NVMe controller as they are saved, in numbers: ``crates/storage`` says which."""

    submissions: list[int]
    completions: list[int]
    features: list[int]
    requests: list[int]
    events: list[int]

@final
class NvmeQueues:
    """An NVMe controller without its registers: queues, commands and the namespace, on the
    machine's I/O thread."""

    MAX_PAIRS: int
    def __new__(
        cls,
        vm: Vm,
        name: str,
        disk: Disk,
        *,
        vendor: int,
        model: str,
        serial: str,
        uuid: bytes,
        interrupts: Sequence[Interrupt],
        line: Wire,
    ) -> Self:
        """The first interrupt is the admin queues'; each further one is a pair's for I/O.
        ``line`` is driven while there are completions that the driver has not taken."""
    def enable(self, submissions: tuple[int, int], completions: tuple[int, int]) -> None:
        """With admin queues as (address, entries). EngineError where they cannot be, or where
        the disk is closed."""
    def set_master(self, master: bool) -> None:
        """Whether the device may access memory; at first it may. When it was taken from it, nothing
        is written there any more, and it goes on when it is given back."""
    def reset(self) -> None:
        """When it returns nothing touches guest memory."""
    def shut_down(self) -> None:
        """Begins to write what is in the disk's cache."""
    @property
    def is_shut_down(self) -> bool: ...
    def set_mask(self, mask: int) -> None:
        """Bit 0 masks the line."""
    def doorbells(self) -> RustDevice:
        """The page of registers from 0x1000 on."""
    def resized(self) -> None:
        """Tells the driver that the disk has another size."""
    def save(self) -> NvmeState:
        """Exact while the machine is held."""
    def load(self, state: NvmeState, shut_down: bool) -> None:
        """Goes on from there. EngineError, and the controller is reset, where it cannot."""
    @property
    def stopped(self) -> int:
        """Requests that wait for the host to be mended."""
    def close(self) -> None:
        """Lets go of the disk."""

@type_check_only
class PvscsiState(TypedDict):
    """A PVSCSI controller as it is saved, in numbers: ``crates/storage`` says which."""

    interrupts: list[int]
    positions: list[int]
    state: int
    requests: list[int]
    completions: list[int]
    messages: list[int]
    answers: list[int]
    news: list[int]
    leaving: list[int]
    targets: list[list[int]]

@final
class DeviceMemory:
    """Memory of a device that the guest uses as RAM, wherever it maps it, and that is none: it is
    not saved with RAM, and no region of ``Vm.ram``. GuestMemoryError beyond its end."""

    def __new__(cls, length: int) -> Self:
        """Zeros, a multiple of 4096."""
    @property
    def length(self) -> int: ...
    def map(self, vm: Vm, address: int) -> None:
        """Lets the guest find it there, too, at any time; ``Vm.remove_memory`` takes it away.
        EngineError where something else is."""
    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None:
        """Where the guest has it mapped, ``Vm.write_memory`` is for that."""

@final
class PixelFormat:
    """Points as a viewer of a screen wants them (RFC 6143, 7.4).

    Frames have 4 bytes for each point: blue, green, red, and one that says nothing; lines of
    ``width`` points without gaps. ``place`` is a part of one: where its left upper corner is, from
    the left and from the top, its width and its height. ValueError where it lies outside.
    """

    def __new__(
        cls, bits: int, big_endian: bool, maxima: Sequence[int], shifts: Sequence[int]
    ) -> Self:
        """Of red, green and blue: the most of each, and by how many bits it is shifted. ValueError
        for what is no format."""
    def raw(self, frame: bytes, width: int, place: tuple[int, int, int, int]) -> bytes:
        """The points, line by line."""
    def tiles(self, frame: bytes, width: int, place: tuple[int, int, int, int]) -> bytes:
        """As ZRLE has them, before zlib (7.7.6)."""

@final
class PvscsiRings(RustDevice):
    """A PVSCSI controller but for the registers of its commands: a device for the registers from
    its BAR's second page on, rings and targets on the machine's I/O thread."""

    MAX_TARGETS: int
    MAX_RING_PAGES: int
    MAX_MESSAGE_PAGES: int
    def __new__(cls, vm: Vm, name: str, line: Wire, messages: Sequence[Interrupt]) -> Self:
        """``line`` is driven while something has happened that is not masked, and each of
        ``messages`` raised when it does."""
    def attach(self, target: int, drive: DriveForm) -> None:
        """Puts a drive at a target, and tells the driver where it has asked for news. EngineError
        where there is one, or no such target."""
    def ask_to_leave(self, target: int) -> None:
        """Tells the driver that a target is to go."""
    def has_left(self, target: int) -> bool:
        """Whether the driver has dealt with that, or asks for no news."""
    def detach(self, target: int) -> None:
        """Takes a target away; what is in flight ends."""
    def resized(self, target: int) -> None:
        """The disk has another size: the next command is told."""
    def set_up_rings(self, state: int, requests: Sequence[int], completions: Sequence[int]) -> None:
        """With numbers of pages. EngineError where they cannot be; then there are no rings."""
    def set_up_messages(self, pages: Sequence[int]) -> None:
        """EngineError where they cannot be, or where there are no rings."""
    def set_threshold(self, enable: bool) -> None:
        """EngineError where there are no rings."""
    def configuration(self, number: int, address: int, at: int) -> None:
        """Writes a page of configuration to guest memory. EngineError for one that is not there."""
    def issue(self, request: int, completion: int) -> None:
        """Carries out a request outside of the rings, whose completion has an address of its own.
        EngineError where it is not in RAM."""
    def abort(self) -> None:
        """Takes what the ring holds, and answers what has ended."""
    def reset_targets(self, only: int | None = None) -> None:
        """Ends what is in flight. EngineError for a target that is not there."""
    def reset_adapter(self) -> None:
        """When it returns nothing touches guest memory, and there are no rings."""
    def reset(self) -> None:
        """As it was made, but for its targets."""
    def set_master(self, master: bool) -> None:
        """Whether the device may access memory; at first it may. When it was taken from it, nothing
        is written there any more, and it goes on when it is given back."""
    def save(self) -> PvscsiState:
        """Exact while the machine is held."""
    def load(self, state: PvscsiState) -> None:
        """EngineError, and the controller is reset, where it is of another."""
    @property
    def stopped(self) -> int:
        """Requests that wait for the host to be mended."""
    def close(self) -> None:
        """Lets go of the disks."""

@type_check_only
class E1000State(TypedDict):
    """An e1000 card as it is saved, in numbers: ``crates/cards`` says which."""

    permanent: Sequence[int]
    registers: Sequence[int]
    filter: Sequence[int]
    statistics: Sequence[int]
    interrupts: Sequence[int]
    places: Sequence[int]
    contexts: Sequence[int]
    state: Sequence[int]

@final
class E1000Rings(RustDevice):
    """An e1000 card but for its first registers: a device for the others, from ``FIRST_REGISTER``
    on, and rings on the machine's I/O thread. It takes ``network`` over; with ``mac``, of 6 bytes,
    in its EEPROM."""

    FIRST_REGISTER: int
    def __new__(cls, vm: Vm, name: str, network: Network, mac: bytes, line: Wire) -> Self: ...
    @property
    def mac(self) -> bytes:
        """The address that the driver has given it, or its own."""
    @property
    def permanent(self) -> bytes: ...
    @property
    def link(self) -> bool:
        """Whether there is a network at the other end."""
    def set_tags(self, on: bool) -> None:
        """Whether tags of VLANs are put in and taken off."""
    def set_loopback(self, on: bool) -> None:
        """Whether what is sent comes back, and nothing else."""
    def raise_causes(self, causes: int) -> None:
        """Causes of an interrupt."""
    def reset(self) -> None:
        """As it was made, but for the loopback. When it returns nothing touches guest memory."""
    def set_master(self, master: bool) -> None:
        """Whether the card may access memory; at first it may. When it was taken from it, nothing
        is read or written there any more, and it goes on when it is given back."""
    def save(self) -> E1000State:
        """Exact while the machine is held."""
    def load(self, state: E1000State) -> None:
        """EngineError, and the card is reset, where it is of another."""
    def close(self) -> None:
        """Lets go of the network."""

@final
class Vmxnet3Causes:
    """The interrupt cause register of a VMXNET3 card, and its line, which is high while there is a
    cause."""

    def __new__(cls, line: Wire) -> Self: ...
    def interrupt(self, number: int) -> Interrupt:
        """An interrupt that is a cause of the line."""

@type_check_only
class Vmxnet3State(TypedDict):
    """A VMXNET3 card as it is saved, in numbers: ``crates/cards`` says which."""

    permanent: Sequence[int]
    mac: Sequence[int]
    interrupts: Sequence[int]
    state: Sequence[int]
    multicast: Sequence[int]
    vlans: Sequence[int]
    setup: Sequence[int]
    tx: Sequence[Sequence[int]]
    rx: Sequence[Sequence[int]]
    rss: Sequence[int]

@final
class Vmxnet3Rings(RustDevice):
    """A VMXNET3 card but for its registers of addresses and commands: a device for its first BAR,
    rings on the machine's I/O thread. It takes ``network`` over; with ``mac``, of 6 bytes."""

    MAX_INTERRUPTS: int
    def __new__(
        cls,
        vm: Vm,
        name: str,
        network: Network,
        mac: bytes,
        causes: Vmxnet3Causes,
        interrupts: Sequence[Interrupt],
    ) -> Self: ...
    @property
    def mac(self) -> bytes:
        """The address that the driver has given it, or its own."""
    def set_mac(self, mac: bytes) -> None: ...
    @property
    def permanent(self) -> bytes: ...
    @property
    def link(self) -> bool:
        """Whether there is a network at the other end."""
    def take_causes(self) -> int:
        """Reads the interrupt cause register, which ends them."""
    @property
    def events(self) -> int:
        """Those that the driver has not acknowledged."""
    def clear_events(self, events: int) -> None: ...
    def activate(self, shared: int, second: bool) -> None:
        """With the address of what the driver shares, by revision 2 or by 1. EngineError where
        that is none, or names rings that cannot be; then the card is not active."""
    @property
    def active(self) -> bool: ...
    def quiesce(self) -> None:
        """When it returns nothing touches guest memory, until the card is activated again."""
    def update_rx_mode(self) -> None:
        """The driver has changed that, as each of the following, in what it shares."""
    def update_mac_filters(self) -> None: ...
    def update_vlan_filters(self) -> None: ...
    def update_rss(self) -> None: ...
    def update_features(self) -> None: ...
    def put_status(self) -> None:
        """Writes to what the driver shares which queues stand, and why."""
    def put_statistics(self) -> None: ...
    def reset(self) -> None:
        """As it was made."""
    def set_master(self, master: bool) -> None:
        """Whether the card may access memory; at first it may. When it was taken from it, nothing
        is read or written there any more, and it goes on when it is given back."""
    def save(self) -> Vmxnet3State:
        """Exact while the machine is held."""
    def load(self, state: Vmxnet3State) -> None:
        """EngineError, and the card is reset, where it is of another."""
    def close(self) -> None:
        """Lets go of the network."""

@type_check_only
class VirtioQueue(TypedDict):
    """A queue as its driver has set it up: guest physical addresses, and what was negotiated."""

    size: int
    descriptors: int
    driver: int
    device: int
    packed: bool
    event_index: bool
    indirect: bool
    position: tuple[int, int] | None
    """Where the device goes on in it: as ``positions`` gave it."""
    interrupt: Interrupt

@disjoint_base
class VirtioDevice:
    """The data path of a virtio device, on its machine's I/O thread: the base of each kind."""

    @property
    def queue_count(self) -> int: ...
    def start(self, features: int, queues: Sequence[VirtioQueue | None], config: Interrupt) -> None:
        """The driver is ready. EngineError where a queue cannot be as it is set up."""
    def reset(self) -> None:
        """Forgets queues and interrupts; when it returns nothing touches guest memory."""
    def set_master(self, master: bool) -> None:
        """Whether the device may access memory; at first it may. When it was taken from it, nothing
        is written there any more, and it goes on when it is given back."""
    def stop_queue(self, index: int) -> None:
        """The driver uses a queue no longer; when it returns nothing of it is touched any more."""
    def positions(self) -> list[tuple[int, int] | None]:
        """Where the device is in each queue; exact while the machine is held."""
    @property
    def needs_reset(self) -> bool:
        """The driver has broken the rules of a queue since ``start``, or the back end is gone."""
    def config_changed(self) -> None:
        """Tells the driver that the configuration has changed."""
    def doorbells(self, stride: int) -> RustDevice:
        """The notification registers: one for each queue, ``stride`` bytes apart; with 0
        one for all, which takes the queue's number."""

@final
class VirtioBalloon(VirtioDevice):
    """The memory balloon."""

    def __new__(cls, vm: Vm, name: str) -> Self: ...
    def statistics(self, timeout: float) -> list[tuple[int, int]] | None:
        """Asks the driver for its statistics, as tags and values; None where it does not answer
        within ``timeout`` seconds."""

@final
class VirtioBlk(VirtioDevice):
    """The block device."""

    def __new__(cls, vm: Vm, name: str, disk: Disk, serial: str, queues: int) -> Self: ...
    @property
    def stopped(self) -> int:
        """Requests that wait for the host to be mended."""
    def close(self) -> None:
        """Lets go of the disk, when the machine has ended."""

@type_check_only
class VirtioNetState(TypedDict):
    """What the driver of a network card has asked by commands; addresses are 6 bytes each."""

    permanent: bytes
    mac: bytes
    mode: int
    unicast: bytes
    multicast: bytes
    vlans: bytes
    pairs: int
    guest_offloads: int

@final
class VirtioNet(VirtioDevice):
    """The network card. It takes ``network`` over; with ``mac``, of 6 bytes."""

    def __new__(cls, vm: Vm, name: str, network: Network, mac: bytes) -> Self: ...
    @property
    def status(self) -> int:
        """The field of the configuration: bit 0, the link is up; bit 1, the guest is to announce
        itself."""
    @property
    def mac(self) -> bytes:
        """The address that the driver has given it, or its own."""
    def state(self) -> VirtioNetState: ...
    def restore(self, state: VirtioNetState) -> None:
        """Takes a saved state up, before the driver's next start."""
    def close(self) -> None:
        """Lets go of the network."""

@type_check_only
class VirtioPortState(TypedDict):
    """What of a port of ``VirtioConsole`` is saved."""

    input: bytes
    sent: int
    known: bool
    open: bool
    due: int

@final
class VirtioConsole(VirtioDevice):
    """The console device. ``ports`` has their names; an empty one is a terminal. Bytes go both
    ways as those of ``SerialPort`` do."""

    MAX_PORTS: int
    def __new__(cls, vm: Vm, name: str, ports: Sequence[str], multiport: bool) -> Self: ...
    def receive(self, port: int, data: bytes) -> None: ...
    def queued(self, port: int) -> int: ...
    def wait_output(self, port: int) -> bytes: ...
    def flush_output(self, port: int, timeout: float) -> bool: ...
    def end_output(self, port: int) -> None: ...
    def resize(self, port: int, columns: int, rows: int) -> None:
        """The terminal has another size: tells a driver that knows of ports."""
    def emergency(self, character: int) -> None:
        """A character for port 0 that came by the configuration."""
    def states(self) -> list[VirtioPortState]: ...
    def set_states(self, states: Sequence[VirtioPortState]) -> None:
        """Before ``start``."""

@final
class VirtioRng(VirtioDevice):
    """The entropy device."""

    def __new__(cls, vm: Vm, name: str) -> Self: ...

@final
class VirtioServed(VirtioDevice):
    """A device whose queues are served from Python, on any thread."""

    def __new__(cls, vm: Vm, name: str, queues: int) -> Self: ...
    def wait(self) -> int | None:
        """Waits until there may be chains in a queue, and says in which; None: it is closed."""
    def take(self, queue: int) -> VirtioChain | None:
        """The next chain of a queue. None where there is none, and while the machine is held:
        ``wait`` tells of it again."""
    def close(self) -> None:
        """``wait`` gives None from now on."""

@final
class VirtioChain:
    """A driver's chain of buffers: bytes to read, then room to write. It goes back to the
    driver with ``done``, and when it is forgotten."""

    READ_MAX: int
    """The most that one ``read`` gives."""
    @property
    def readable(self) -> int:
        """Bytes that are left to read."""
    @property
    def writable(self) -> int:
        """Bytes that are left to write."""
    def read(self, limit: int = ...) -> bytes:
        """The next bytes, up to READ_MAX of them."""
    def write(self, data: bytes) -> int:
        """Writes the next bytes; gives how many found room."""
    def done(self) -> None:
        """Gives the chain back with what was written; the driver is interrupted if it wants
        that. Of no effect a second time."""

@final
class VhostUserBackEnd:
    """A process that serves a virtio device's queues by vhost-user, at the other end of a Unix
    socket. ConnectionError where it does not keep to the protocol, or does not answer."""

    def __new__(cls, socket: int) -> Self: ...
    @property
    def features(self) -> int:
        """Virtio's feature bits that it offers."""
    @property
    def queues(self) -> int:
        """How many it has."""
    def config(self, length: int) -> bytes:
        """The first bytes of its configuration space."""

@final
class VhostUserDevice(VirtioDevice):
    """The data path to a back end, which it takes over. ``served`` says by which errors the
    driver's requests are answered where it is gone."""

    def __new__(
        cls,
        vm: Vm,
        name: str,
        served: Literal["blk", "fs", "net"],
        back_end: VhostUserBackEnd,
        queues: int,
    ) -> Self: ...
    @property
    def alive(self) -> bool:
        """Whether the back end is there."""
    def close(self) -> None:
        """Hangs up."""

@final
class VirtioVsock(VirtioDevice):
    """The socket device of a guest with the address ``cid``; programs of the host connect to
    ``listener``, a descriptor of a Unix socket that listens at ``path``."""

    def __new__(cls, vm: Vm, name: str, cid: int, path: str, listener: int) -> Self: ...
    def close(self) -> None:
        """Ends all connections, when the machine has ended."""
    def reset_transport(self) -> None:
        """Tells the driver that all connections are gone."""

@type_check_only
class VmciState(TypedDict):
    """VMCI's device as it is saved, in numbers: ``crates/vmci`` says which."""

    interrupts: Sequence[int]
    state: Sequence[int]
    addresses: Sequence[int]
    sent: Sequence[int]
    page: Sequence[int]
    doorbells: Sequence[int]
    pairs: Sequence[int]

@final
class VmciDevice(RustDevice):
    """VMCI's registers, and what is behind them. Programs of the host connect to a descriptor of a
    Unix socket that listens, ``sockets`` as its path and that; without it nobody is there."""

    VECTORS: int
    def __new__(
        cls,
        vm: Vm,
        line: Wire,
        messages: Sequence[Interrupt],
        notifications: bool,
        sockets: tuple[str, int] | None,
    ) -> Self: ...
    def ring(self, context: int, resource: int) -> bool:
        """A doorbell of the guest's; False where it has none of that name."""
    def set_master(self, master: bool) -> None:
        """Whether it may access memory; at first it may not."""
    def reset(self) -> None: ...
    def save(self) -> VmciState:
        """Exact while the machine is held. Connections are not part of it."""
    def load(self, state: VmciState) -> None:
        """EngineError for a state that is none; then it is as after a reset."""
    def close(self) -> None:
        """Ends all connections, when the machine has ended."""

@final
class GuestCall:
    """A vCPU at an instruction that the platform answers, for the handler's time alone.

    Items are registers, named as in ``Vcpu.regs``, as they are before the instruction. Setting
    one sets it for the guest; system registers can be set in a trap hook only.
    """

    @property
    def vm(self) -> Vm: ...
    @property
    def vcpu(self) -> int:
        """The vCPU's number."""
    @property
    def cpl(self) -> int:
        """The privilege level of who called: 0 the kernel, 3 a user program."""
    def __getitem__(self, name: str, /) -> int: ...
    def __setitem__(self, name: str, value: int, /) -> None: ...
    def read(self, linear: int, length: int) -> bytes:
        """Guest memory at a linear address, as far as it is mapped; up to 1 MiB.

        No access rights are checked: a user program may name what only its kernel may read.
        """

    def access(self, linear: int, write: bool) -> int:
        """Where the RAM is that an access of the guest's own to one byte would reach; it is the
        same page's for the page's other bytes.

        Raises GuestFault, what the access would raise; and #GP where that is no RAM, and on engine
        ``kvm``, which has no string accesses.
        """

@final
class RegisterPortAccess:
    """An access to a port of the platform."""

    @property
    def port(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def input(self) -> bool: ...
    @property
    def string(self) -> bool:
        """INS or OUTS: all of it, REP prefix included, is for the handler to do.

        Engine ``kvm`` has no such access: it gives the items to devices of the bus."""

@final
class GuestTrap:
    """An event of a deprivileged guest."""

    @property
    def vector(self) -> int | None:
        """None: SYSCALL."""
    @property
    def error(self) -> int | None: ...
    @property
    def address(self) -> int:
        """Of a page fault."""
    @property
    def next(self) -> int | None:
        """Of SYSCALL: where the guest goes on if RIP is left alone."""

@final
class Vm:
    """Guest memory, bus, interrupt controllers and vCPUs of one machine."""

    def __new__(
        cls,
        engine: str,
        memory: int,
        vcpus: int | tuple[int, int, int] = ...,
        *,
        translate: bool = True,
        chaos: int | None = None,
        platform: Platform | None = None,
        features: Mapping[str, int] | None = None,
        signature: int | None = None,
        record: tuple[int, str, int] | None = None,
        replay: int | None = None,
    ) -> Self:
        """``engine``: "bt" or "kvm"; ``memory`` in bytes, a multiple of 4096.

        RAM lies at 0 up to 3 GiB, the rest from 4 GiB up. With ``translate``
        false, engine ``bt`` interprets every instruction (for tests). ``vcpus`` may be sockets,
        cores of each, and threads of each. ``chaos`` is the seed of disturbances by engine ``bt``
        (docs/testing.md). EngineError where the engine cannot have the ``platform``; None is
        a bare CPU. ``features`` is the most that its CPU may have, by words as ``cpu_features``
        gives them; what it does not name is not limited. ``signature`` is its family, model and
        stepping as EAX of CPUID's leaf 1 has them, by default the host's.

        ``record`` is the descriptor of an empty file, a text about the machine, and the
        instructions from one checkpoint to the next; ``replay`` the descriptor of such a
        file. Both are engine ``bt``'s, with one vCPU. EngineError where the file is damaged.
        """
    @property
    def ram(self) -> list[tuple[int, int]]:
        """(guest physical address, length) of each RAM range."""
    def ram_file(self, address: int) -> tuple[int, int]:
        """The file with the RAM that begins there, as ``ram`` has it: a descriptor that is the
        caller's, and where the RAM begins in the file. For mmap(2), to read: what is written
        there, the engine does not hear of."""
    def read_memory(self, address: int, length: int) -> bytes: ...
    def write_memory(self, address: int, data: bytes) -> None: ...
    def discard_memory(self, address: int, length: int) -> int:
        """Gives whole pages back to the host: they are zero from now on. How many bytes of the
        range were RAM."""
    def save_ram(self, descriptor: int, offset: int, *, written: bool = False) -> tuple[bytes, int]:
        """Writes the pages that are not zero to a file, from ``offset`` on, a multiple of 4096;
        or those that were ``written`` since ``log_writes()``.

        Gives the table of their runs, in the form of crates/memory/src/image.rs, and the offset
        behind the last. The machine is held.
        """
    def load_ram(self, layers: Sequence[tuple[str, int, bytes]]) -> None:
        """Maps what was saved, into a machine that has not run: of each file its name for errors,
        its descriptor and its table. The first is undermost.

        Raises EngineError for a file that is damaged, and then nothing has changed.
        """
    def add_memory(self, address: int, length: int) -> None:
        """Adds zeroed RAM where there is no RAM and no device, at any time."""
    def remove_memory(self, address: int) -> None:
        """Takes away the RAM that begins there, as ``ram`` has it, with what is in it.

        The machine is held meanwhile: as ``hold``, not from its devices.
        """
    def attach_ports(
        self,
        base: int,
        length: int,
        device: Device,
        *,
        sizes: Sequence[int] | None = None,
        mapped: bool = True,
    ) -> Region:
        """Attaches a device to ``length`` ports from ``base`` on, at any time.

        The device sees the accesses whose number of bytes is in ``sizes``, by
        default all of 1, 2, 4 and 8; others pass it by, to another device or to
        nobody. EngineError where an access of the range is taken: by a device, or
        by the engine (PIC 0x20, 0xA0, 0x4D0; PIT 0x40-0x43, 0x61).
        ``device.read`` and ``device.write`` are looked up now, once. Not ``mapped``, it
        answers nowhere until ``Region.map``, and is in nobody's way.
        """
    def attach_mmio(
        self,
        base: int,
        length: int,
        device: Device,
        *,
        sizes: Sequence[int] | None = None,
        mapped: bool = True,
    ) -> Region:
        """As ``attach_ports``, in guest physical memory that is not RAM."""
    def cpu_features(self) -> list[tuple[str, int]]:
        """Words of CPUID that a running guest relies on: ("1.ECX", bits) and so on."""
    def cpu_identity(self) -> tuple[str, int]:
        """Who made the guest's CPU, "GenuineIntel" or another; and its family, model and stepping
        as EAX of CPUID's leaf 1 has them."""
    def log_writes(self) -> None:
        """From now on it is noted which pages are written, anew with each call.

        Raises EngineError where the host cannot.
        """
    def port_regions(self) -> list[tuple[int, int, str]]:
        """Which ports are answered now: first, last, by whom."""
    def mmio_regions(self) -> list[tuple[int, int, str]]:
        """The same of addresses that are not RAM."""
    def irq_source(self, gsi: int) -> IrqSource:
        """A wire of its own to an interrupt line (GSI 0-23: IOAPIC pins; 0-15 also the PICs)."""
    def irq_line(self, gsi: int, level: bool) -> None:
        """Drives one more source of the line, which all callers of this share."""
    def msi(self, address: int, data: int) -> None: ...
    def tsc_hz(self) -> int:
        """Ticks of the guest's TSC in a second."""
    def tell_stolen_time(self) -> bool:
        """From now on vCPUs can have clocks of the time for which their threads waited for a
        processor; false where the host does not tell. To be called before they run."""
    def set_stolen_clock(self, vcpu: int, address: int | None) -> bool:
        """Where a vCPU's is, 8 bytes of RAM that count ticks of its TSC, or that it has none. False
        where that is no RAM."""
    def clock_ns(self) -> int:
        """The machine's clock: nanoseconds of run time since creation."""
    def vcpu(self, index: int) -> Vcpu: ...
    def hold(self, timeout: float = 5.0) -> None:
        """Brings all vCPUs between two instructions, and stops the machine's clock.

        Returns when all are there: ``Vcpu.run`` goes on, but no guest instruction runs and
        no device is called until ``resume``. The guest's time stands, TSC and kvmclock
        included. Holds can be nested; each needs its ``resume``. From any thread but
        those that run the machine's vCPUs, on which devices are called: EngineError
        there, and where a vCPU or a device that it is in takes longer than ``timeout``
        seconds, in which case the machine runs on.
        """
    def resume(self) -> None:
        """Ends one ``hold``; the last one lets the machine run."""
    @property
    def held(self) -> bool: ...
    def save_state(self) -> bytes:
        """What the vCPUs share, as one section with name, version, length and CRC:
        interrupt controllers, timers and the machine's clock, in a form that either
        engine takes up. With it belong each vCPU's ``save_state`` and RAM, all taken
        in one ``hold``.
        """
    def load_state(self, data: bytes) -> None:
        """Takes up what ``save_state`` of a machine with as many vCPUs gave: before the
        vCPUs' states, in one ``hold`` with them. EngineError where it is damaged, of
        another version, or of a host whose TSC counts at another rate; then nothing
        has changed.
        """
    def end_recording(self) -> tuple[str, int, int] | None:
        """Ends the recording, to be called when no vCPU runs: ("recorded", instructions,
        bytes). Of a replay: ("replayed" or, where the recorder died, "cut"; checkpoints that
        were alike; 0)."""
    def replay(self) -> Replay | None:
        """Of a machine that replays: the way through its recording."""
    def keep_reset_state(self) -> None:
        """Keeps what ``reset`` goes back to: before any vCPU runs or has its registers set."""
    def reset(self) -> None:
        """Interrupt controllers, timers and vCPUs as they were made; while no vCPU runs.

        RAM and the machine's clock go on, and a line that a source holds is high
        afterwards. EngineError without ``keep_reset_state``, or where the host refuses:
        the machine cannot run on then.
        """
    def reset_vcpu(self, index: int) -> None:
        """Makes a vCPU as new, while the others run: it waits for a SIPI."""
    def set_debug_alert(self, descriptor: int | None) -> None:
        """An eventfd(2) to be signalled when a vCPU has stopped for the debugger."""
    def take_debug_stops(self) -> list[tuple[int, str, int]]:
        """Which vCPUs have since this was asked last, to be asked while the machine is held:
        the number, and "step" and 0, "software" and the linear address, or "hardware" and a bit
        for each breakpoint of ``Vcpu.set_debug``. Of a replay also: "breakpoint" and the linear
        address, "arrived" and 0, or "end" and 0."""
    def set_planted(self, addresses: Sequence[int]) -> None:
        """Physical addresses of the INT3s that are the debugger's. All others are the guest's."""
    def request_stop(self) -> None:
        """Makes every running ``Vcpu.run`` return "stopped" soon. From any thread.

        A vCPU that does not run takes the request at its next ``run``, which
        then returns at once: a request made while a thread is about to call
        ``run`` is not lost.
        """
    def stats(self) -> dict[str, dict[str, int]]:
        """Counters by group, summed over all vCPUs; those of a machine with several
        also for each, as groups "vcpu0.exits" and so on.

        exits (by kind), accesses (rust, python, unclaimed: by who answered),
        python (reads, writes, calls: of Python devices and platform handlers), time_ns (run: all of
        ``Vcpu.run``; devices, python: in devices of either kind; port_in and so
        on: answering exits of that kind) and what the
        engine counts, as bt (blocks, tlb misses, ...). All are live, but for the
        engine's of a vCPU whose device does not return.
        """

@final
@final
class Replay:
    """A machine's way through its recording. A count is how many instructions, and ways into a
    handler, the guest has done. To be used while the machine is held."""

    @property
    def count(self) -> int:
        """Where the guest stands."""
    def seek(self, count: int, start: int, noted_before: int) -> None:
        """Has the machine go to ``count``, or the recording's end, when it runs next, from a place
        no later than ``start``; it stops there as "arrived", or "end". Nothing else stops it on the
        way: what would, before ``noted_before``, is noted."""
    def give_up(self) -> None:
        """The machine goes nowhere any more but runs on."""
    @property
    def passed(self) -> tuple[int, tuple[int, int] | None]:
        """Of the last seek: the count at which it began, and of the last break- or watchpoint that
        was noted the count before its instruction, with the bits of hardware breakpoints, or 0."""
    def set_breakpoints(self, addresses: Sequence[int]) -> None:
        """Linear addresses before whose instructions the guest stops. They change nothing in it."""
    def set_stay(self, stay: bool) -> None:
        """Whether the machine stands at the end of the recording, or ends."""

@final
class Vcpu:
    """One virtual CPU. ``run`` releases the interpreter while the guest runs."""

    def run(self) -> str:
        """Runs until the machine stops.

        Returns "shutdown" (triple fault), "halted" (HLT that no interrupt can
        end) or "stopped" (request_stop, or another vCPU came to its end).
        Devices are called on this thread. Raises what a device raised, the
        same object, or EngineError. However it ends, the machine's other vCPUs
        stop too, and ``run`` can be called again; an instruction whose device
        raised is then done, and has read all ones.

        On Python's main thread, signal handlers run while the guest does, so
        that Ctrl-C raises KeyboardInterrupt from here.
        """
    def regs(self) -> dict[str, int]:
        """rax..r15, rip, rflags, cr0, cr2, cr3, cr4, cr8, efer, apic_base,
        and cs/ds/es/fs/gs/ss/tr/ldt as NAME_selector, NAME_base, NAME_limit, NAME_attr
        (attr: as in a VMCS: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15;
        unusable 16), gdtr/idtr as NAME_base, NAME_limit.

        A machine that runs is held meanwhile, as by ``Vm.hold``; so for ``set_regs`` and
        ``dump``."""
    def set_regs(self, values: dict[str, int]) -> None:
        """Sets the given ones of ``regs`` and leaves the others.

        Sets none where one does not exist or a value does not fit."""
    def save_state(self) -> bytes:
        """All of the vCPU but its memory, as one section: registers of every kind,
        pending events, local APIC, and the guest's TSC at the moment of saving."""
    def load_state(self, data: bytes) -> None:
        """Takes up what ``save_state`` of a vCPU of the same number gave, on either
        engine. EngineError where it cannot; the vCPU must not run then."""
    def dump(self) -> str:
        """Registers and the bytes at RIP as text, for a crash report."""
    def translate(self, linear: int) -> int | None:
        """The physical address of a linear one; None where it is not mapped. As a debugger
        sees it: without rights, and no accessed bit is set."""
    def xsave(self) -> bytes:
        """The XSAVE image (Intel SDM 1, 13.4) in the standard format."""
    def set_xsave(self, image: bytes) -> None: ...
    def msr(self, index: int) -> int | None:
        """None where the CPU has no such register."""
    def set_msr(self, index: int, value: int) -> bool:
        """False where the CPU refuses the register or the value."""
    def set_debug(
        self,
        *,
        step: bool = False,
        block_interrupts: bool = True,
        software: bool = False,
        hardware: Sequence[tuple[str, int, int]] | None = None,
    ) -> None:
        """Where the vCPU stops for a debugger from now on; the guest does not see it.

        After one instruction, without interrupts if they are to be blocked and the engine can do
        that; at each INT3 of ``Vm.set_planted``; at up to four hardware breakpoints, each of
        "execute", "write" or "access", a linear address, and 1, 2, 4 or 8 bytes. To be set anew
        for each step, after the registers. EngineError for a breakpoint that no CPU has.
        """
    def set_frozen(self, frozen: bool) -> None:
        """Whether the vCPU stays where it is when the machine runs. One that has stopped for the
        debugger is frozen."""
    def set_present(self, present: bool) -> None:
        """Whether it is in the machine, as each is at first: one that is not does not count where
        all others halt for good. EngineError while it runs."""

def recorded_configuration(file: int) -> str:
    """The text about the machine in a recording, which is open. EngineError where it is none."""

def engine_available(name: str) -> tuple[str, str] | None:
    """None if the engine can run here, else why not and what mends it."""

@type_check_only
class KvmProbe(TypedDict):
    reason: tuple[str, str] | None
    runs: bool
    hardware: bool
    guest_rate: float
    host_rate: float
    max_vcpus: int
    nested: bool
    seconds: float

def kvm_probe(device: str = "/dev/kvm") -> KvmProbe:
    """What the KVM behind a device is worth, by running a small guest on it.

    ``guest_rate`` and ``host_rate`` are instructions a second of one loop; ``hardware``
    says whether the host's CPU ran the guest's.
    """

def host_cpu_features() -> list[tuple[str, int]]:
    """Words of CPUID that the host's own CPU has, named as ``Vm.cpu_features`` names them."""

def kvm_capabilities(device: str = "/dev/kvm") -> list[tuple[str, bool, str]]:
    """(name, there or not, what is lost without it); empty where KVM cannot be opened."""

class DiskError(Exception):
    """A disk image that cannot be used: with its path, the cause, and what mends it."""

    path: str
    cause: str
    mend: str

@final
class Disk:
    """A disk behind a controller. DiskError where the image cannot be used.

    With ``on_stop`` a write that the host fails waits for ``retry``. It is called for the first
    of them, on a thread of its own, with the cause and what says whether it still waits.
    ``on_error`` is called for requests that the host failed, on a thread too: with "read", "write",
    "flush" or "unmap", whether the host is full, and the cause; not for all, where there are many.
    ``files`` are descriptors of the image and of its backing files, from the top down; without
    them the path is opened. They stay the caller's.
    """

    def __new__(
        cls,
        path: str | PathLike[str],
        *,
        image_format: str | None = None,
        readonly: bool = False,
        direct: bool = False,
        snapshot: bool = False,
        iops: int | None = None,
        bps: int | None = None,
        on_stop: Callable[[str, Callable[[], bool]], object] | None = None,
        on_error: Callable[[str, bool, str], object] | None = None,
        files: list[int] | None = None,
    ) -> Self: ...
    @property
    def size(self) -> int:
        """In bytes."""
    @property
    def block_size(self) -> int: ...
    @property
    def readonly(self) -> bool: ...
    @property
    def discard_granularity(self) -> int: ...
    def resize(self, size: int) -> None: ...
    def access(self) -> DiskBytes:
        """Its bytes, for a device that waits for them."""
    def share(self) -> Disk:
        """The same disk once more, to be closed on its own."""
    def stats(self) -> dict[str, int]:
        """What was done so far, by the names of QEMU's BlockDeviceStats: rd_operations, rd_bytes,
        rd_total_time_ns, failed_rd_operations, invalid_rd_operations, the same of wr, flush and
        unmap, and wr_highest_offset. Empty once it is closed."""
    def flush(self) -> None:
        """Waits until all that was written is durable. Raises OSError."""
    def retry(self) -> None:
        """Tries writes anew that wait for the host to be mended; none do in a closed disk."""
    def close(self) -> None:
        """Lets go of the image, unless a controller has the disk too."""

@final
class DiskBytes:
    """Reads and writes of a disk that the caller waits for; the disk is open as long as this is.
    OSError where the host fails them."""

    def read(self, offset: int, length: int) -> bytes:
        """At most 1 MiB."""
    def write(self, offset: int, data: bytes) -> None: ...
    def close(self) -> None:
        """Lets go of the disk."""

@final
class Network:
    """The way to a network, until a card has it. OSError where the host does not give it."""

    @staticmethod
    def stream(name: str, socket: int) -> Network:
        """A program at the other end of a stream socket; messages call it by its name."""
    @staticmethod
    def joined(path: str | PathLike[str]) -> Network:
        """The switch at a socket, between the machines that name it."""
    @staticmethod
    def tap(queues: Sequence[int]) -> Network:
        """The queues of a tap device: descriptors with IFF_VNET_HDR."""
    def shape(
        self, *, delay: float = 0.0, loss: float = 0.0, rate: int | None = None, seed: int = 0
    ) -> None:
        """Makes it slower and worse: seconds, 0 to 1, bits a second."""
    def filter(
        self,
        judge: Callable[
            [
                int,
                IPv4Address | IPv6Address,
                IPv4Address | IPv6Address,
                tuple[int, int] | None,
                bool,
            ],
            bool,
        ],
    ) -> None:
        """Has each flow judged, on a thread of its own: protocol, source, destination, ports of
        both if there are any, and whether the guest began it."""
    def capture(self, file: int) -> None:
        """Writes all frames from now on into a file, which is open for writing (pcap)."""
    @property
    def queues(self) -> int: ...
    @property
    def offloads(self) -> bool:
        """Whether frames come from it with checksums and segmentation left to the guest."""
    def stats(self) -> dict[str, int]:
        """Counters: frames, bytes, and what was dropped by the reason. Also of a network that a
        card has."""

@final
class DiskSource:
    """An image that is copied into another."""

    def __new__(cls, path: str | PathLike[str], image_format: str | None = None) -> Self: ...
    @property
    def size(self) -> int: ...
    def copy(
        self,
        path: str | PathLike[str],
        image_format: str,
        progress: Callable[[int], object],
        stream: bool = False,
    ) -> None:
        """Copies into a new image, and tells how many bytes are done. What ``progress``
        raises ends the copy, and removes what was made. With ``stream`` a VMDK image is
        streamOptimized."""

def disk_create(
    path: str | PathLike[str],
    image_format: str,
    size: int | None = None,
    backing: str | None = None,
    backing_format: str | None = None,
    cluster_size: int | None = None,
) -> int:
    """Makes an image; gives the disk's size."""

@type_check_only
class DiskInfo(TypedDict):
    format: str
    size: int
    allocated: int
    subformat: NotRequired[str]
    """Of a VMDK image, as VMware names it."""
    version: NotRequired[int]
    cluster_size: NotRequired[int]
    backing: NotRequired[str | None]
    """As the image has it."""
    backing_path: NotRequired[str]
    """Where that file is, if it is one."""
    backing_format: NotRequired[str | None]
    dirty: NotRequired[bool]
    lazy_refcounts: NotRequired[bool]
    snapshots: NotRequired[int]

def disk_info(path: str | PathLike[str], image_format: str | None = None) -> DiskInfo:
    """What an image is, without its backing files."""

@type_check_only
class CheckReport(TypedDict):
    clusters: int
    leaks: int
    errors: int
    repaired: int
    problems: list[str]

def disk_check(path: str | PathLike[str], repair: bool) -> CheckReport:
    """Compares a qcow2 image's refcounts with what it refers to."""

def confine_prepare(unix_sockets: bool, socket_directories: Sequence[str | PathLike[str]]) -> bool:
    """From here on threads of this process are confined as they start, by their kind.

    ``unix_sockets``: whether data paths connect to Unix sockets, or make them in these
    directories, while the guest runs. True where threads go into a network with nothing in it.
    OSError: the kernel refuses, or the process was prepared before.
    """

def confine_control(
    grants: Sequence[
        tuple[
            str | PathLike[str],
            Literal["read", "write", "remove", "remove directories", "sockets"],
        ]
    ],
    children: Sequence[int],
) -> None:
    """Confines the calling thread and those that it makes: files by the grants, signals to itself
    and the children."""

def own_user_namespace() -> None:
    """A user namespace, where the process has no rights over the host's. Needs a single thread."""

def landlock_version() -> int:
    """The kernel's; 0 without Landlock."""

def unpack_lz4_block(block: bytes, most: int) -> bytes:
    """Raises ValueError for what is none, or more than ``most`` bytes when it is unpacked."""

def vnc_answer(password: bytes, challenge: bytes) -> bytes:
    """What a viewer with that password answers to a challenge of 16 bytes (RFC 6143, 7.2.2)."""
