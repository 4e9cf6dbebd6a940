"""One small guest on one engine: bytes and registers in, a log of exits out."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tetrarch._native import EngineError, Vcpu, Vm
from tetrarch.machine.kvm import probe_kvm
from tetrarch.platforms import Platform

MIB = 1 << 20
CODE = 0x1000
STACK = 0x800
DATA = 0x4000
HANDLER = 0x2000
IDT = 0x5000
GDT = 0x5800
PAGE_TABLES = 0x8000
PORTS = 0x500
MMIO = 0xD000_0000
# A write there ends the run at once, on any engine.
END = 0x5FF
# Each run takes milliseconds; an interpreting KVM on a busy host takes longer.
LIMIT_S = 60
# Enough for a guest to halt, mostly; no test fails where it is not.
READY_S = 0.1

# Access rights as in a VMCS (Intel SDM 3C, 25.4.1).
CODE16, CODE32, CODE64 = 0x009B, 0xC09B, 0xA09B
DATA16, DATA32 = 0x0093, 0xC093
TSS, LDT = 0x008B, 0x0082
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")

Event = tuple[str | int, ...]


@dataclass
class Log:
    """What happened, in order. Reads are answered with ascending bytes."""

    events: list[Event] = field(default_factory=list)
    answers: int = 0

    def answer(self, size: int) -> int:
        value = int.from_bytes(bytes((self.answers + i) & 0xFF for i in range(1, size + 1)))
        self.answers += size
        return value


class Space:
    """A device over a whole range, which writes down each access."""

    def __init__(self, guest: Guest, read: str, write: str, base: int) -> None:
        self._guest, self._read, self._write, self._base = guest, read, write, base

    def read(self, offset: int, size: int) -> int:
        value = self._guest.log.answer(size)
        self._guest.events.append((self._read, self._base + offset, size, value))
        self._guest.accessed()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self._guest.events.append((self._write, self._base + offset, size, value))
        self._guest.accessed()


class End:
    """Stops the machine when it is written to."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._guest.vm.request_stop()


class Guest:
    """A machine with the two spaces above, in front of ``code`` at 0x1000."""

    def __init__(
        self,
        engine: str,
        *,
        translate: bool = True,
        vcpus: int = 1,
        platform: Platform | None = None,
    ) -> None:
        self.vm = Vm(engine, MIB, vcpus, translate=translate, platform=platform)
        self.vcpu: Vcpu = self.vm.vcpu(0)
        self.log = Log()
        self.cut_by_time = True
        """Of a guest that is moved (moved.py)."""
        self._when_ready: Callable[[], None] | None = None
        self.attach(self.vm)

    def attach(self, vm: Vm) -> None:
        vm.attach_ports(PORTS, END - PORTS, Space(self, "in", "out", PORTS))
        vm.attach_ports(END, 1, End(self))
        vm.attach_mmio(MMIO, 0x1000, Space(self, "read", "write", MMIO))

    def when_ready(self, call: Callable[[], None]) -> None:
        """Calls it, on a thread of its own, some time after the guest's first access to a
        device: then what the guest did before is done, and it may halt."""
        self._when_ready = call

    def accessed(self) -> None:
        """A device was."""
        if self._when_ready is not None:
            timer = threading.Timer(READY_S, self._when_ready)
            timer.daemon = True
            timer.start()
            self._when_ready = None

    @property
    def events(self) -> list[Event]:
        return self.log.events

    def real_mode(self, code: bytes, **registers: int) -> None:
        """Segments with base 0, vectors at 0 (Intel SDM 3A, 10.1.4 and 20.1.4)."""
        self._start(code, CODE16, DATA16, 0xFFFF, registers)

    def protected_mode(self, code: bytes, **registers: int) -> None:
        """Flat 32-bit segments, no paging; the GDT has them at 8 and 16."""
        self._descriptors(0x00CF_9B00_0000_FFFF)
        system = {"cr0": 0x11, **self._tables()}
        self._start(code, CODE32, DATA32, 0xFFFF_FFFF, system | registers)

    def long_mode(self, code: bytes, **registers: int) -> None:
        """64-bit code, the first and the fourth GiB mapped to themselves."""
        self._descriptors(0x00AF_9B00_0000_FFFF)
        table = PAGE_TABLES
        self.vm.write_memory(table, struct.pack("<Q", table + 0x1003))
        pages = [(table + 0x2003, 0), (0, 0), (0, 0), (table + 0x3003, 3)]
        self.vm.write_memory(table + 0x1000, struct.pack("<4Q", *(entry for entry, _ in pages)))
        for index, gib in ((2, 0), (3, 3)):
            entries = [gib << 30 | page << 21 | 0x83 for page in range(512)]
            self.vm.write_memory(table + index * 0x1000, struct.pack("<512Q", *entries))
        system = {
            "cr0": 0x8000_0011,
            "cr3": table,
            "cr4": 0x20,
            "efer": 0x500,
            **self._tables(),
        }
        self._start(code, CODE64, DATA32, 0xFFFF_FFFF, system | registers)

    def vector(self, number: int, handler: int, *, width: int) -> None:
        """An interrupt gate for code of so many bits (real mode: an address)."""
        if width == 16:
            self.vm.write_memory(number * 4, struct.pack("<HH", handler, 0))
        elif width == 32:
            gate = struct.pack("<HHBBH", handler & 0xFFFF, 8, 0, 0x8E, handler >> 16)
            self.vm.write_memory(IDT + number * 8, gate)
        else:
            gate = struct.pack("<HHBBHII", handler & 0xFFFF, 8, 0, 0x8E, handler >> 16, 0, 0)
            self.vm.write_memory(IDT + number * 16, gate)

    def run(self) -> str:
        """The end of the run; it fails where there is none."""
        watchdog = threading.Timer(LIMIT_S, self.vm.request_stop)
        watchdog.daemon = True
        watchdog.start()
        try:
            end = self._run()
            assert watchdog.is_alive(), f"the guest did not end: {self.vcpu.dump()}"
        finally:
            watchdog.cancel()
        return end

    def _run(self) -> str:
        try:
            return self.vcpu.run()
        except EngineError as error:
            # A KVM that interprets knows less than a CPU: no INT3 in protected mode.
            if "cannot emulate" in str(error) and not probe_kvm().hardware:
                pytest.xfail(f"no hardware behind this /dev/kvm: {error}")
            raise

    def register(self, name: str) -> int:
        return self.vcpu.regs()[name]

    def _tables(self) -> dict[str, int]:
        return {"gdtr_base": GDT, "gdtr_limit": 23, "idtr_base": IDT, "idtr_limit": 0x7FF}

    def _descriptors(self, code: int) -> None:
        self.vm.write_memory(GDT, struct.pack("<3Q", 0, code, 0x00CF_9300_0000_FFFF))

    def _start(
        self, code: bytes, code_rights: int, data_rights: int, limit: int, changes: dict[str, int]
    ) -> None:
        self.vm.write_memory(CODE, code)
        registers = {"rip": CODE, "rsp": STACK, "rflags": 2, "cr0": 0x10, "idtr_limit": 0x3FF}
        protected = limit != 0xFFFF
        for name in SEGMENTS:
            registers[f"{name}_selector"] = (8 if name == "cs" else 16) if protected else 0
            registers[f"{name}_base"] = 0
            registers[f"{name}_limit"] = limit
            registers[f"{name}_attr"] = code_rights if name == "cs" else data_rights
        for name, rights in (("tr", TSS), ("ldt", LDT)):
            registers |= {
                f"{name}_selector": 0,
                f"{name}_base": 0,
                f"{name}_limit": 0xFFFF,
                f"{name}_attr": rights,
            }
        registers |= {"idtr_base": 0, "gdtr_base": 0, "gdtr_limit": 0}
        self.vcpu.set_regs(registers | changes)
