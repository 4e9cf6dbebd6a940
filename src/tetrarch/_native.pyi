"""Types of the native module: the Rust core behind one machine."""

from typing import Protocol

__version__: str

class Device(Protocol):
    """What can be attached to a port or memory range.

    ``offset`` counts from the start of the range, ``size`` is the width of the
    access in bytes (1, 2, 4 or 8). An exception stops the machine and comes
    out of ``Vcpu.run``.
    """

    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...

class EngineError(Exception):
    """The engine cannot do what was asked: a host limit or a bad request."""

class GuestMemoryError(Exception):
    """A guest physical range that is not RAM of this machine."""

    address: int
    length: int

class Vm:
    """Guest memory, bus, interrupt controllers and vCPUs of one machine."""

    def __init__(self, engine: str, memory: int, vcpus: int = 1, *, translate: bool = True) -> None:
        """``engine``: "bt"; ``memory`` in bytes, a multiple of 4096.

        RAM lies at 0 up to 3 GiB, the rest from 4 GiB up. With ``translate``
        false, engine ``bt`` interprets every instruction (for tests).
        """
    @property
    def ram(self) -> list[tuple[int, int]]:
        """(guest physical address, length) of each RAM range."""
    def read_memory(self, address: int, length: int) -> bytes: ...
    def write_memory(self, address: int, data: bytes) -> None: ...
    def attach_ports(self, base: int, length: int, device: Device) -> None: ...
    def attach_mmio(self, base: int, length: int, device: Device) -> None: ...
    def irq_line(self, gsi: int, level: bool) -> None:
        """Drives an interrupt line (GSI 0-23: IOAPIC pins; 0-15 also the PICs)."""
    def msi(self, address: int, data: int) -> None: ...
    def clock_ns(self) -> int:
        """The machine's clock: nanoseconds of run time since creation."""
    def vcpu(self, index: int) -> Vcpu: ...
    def request_stop(self) -> None:
        """Makes every running ``Vcpu.run`` return "stopped" soon. From any thread."""
    def stats(self) -> dict[str, dict[str, int]]:
        """Counters by group: exits, bt (blocks, tlb misses, ...), time_ns, python."""

class Vcpu:
    """One virtual CPU. ``run`` releases the interpreter while the guest runs."""

    def run(self) -> str:
        """Runs until the machine stops.

        Returns "shutdown" (triple fault) or "stopped" (request_stop). Devices
        are called on this thread. Raises what a device raised, or EngineError.
        """
    def regs(self) -> dict[str, int]:
        """rax..r15, rip, rflags, cr0, cr2, cr3, cr4, cr8, efer, apic_base,
        and cs/ds/es/fs/gs/ss/tr/ldt as NAME_selector, NAME_base, NAME_limit, NAME_attr
        (attr: as in a VMCS: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15;
        unusable 16), gdtr/idtr as NAME_base, NAME_limit."""
    def set_regs(self, values: dict[str, int]) -> None:
        """Sets the given ones of ``regs`` and leaves the others."""
    def dump(self) -> str:
        """Registers and the bytes at RIP as text, for a crash report."""

def engine_available(name: str) -> str | None:
    """None if the engine can run here, else the reason why not, in one line."""

def debug_fuzz_interpreter(data: bytes) -> None: ...
