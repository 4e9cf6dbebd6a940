"""What gdb reads and writes of one vCPU: its registers, and memory as it has it mapped."""

from __future__ import annotations

from tetrarch.gdb.packets import PACKET_MAX, unescape
from tetrarch.gdb.registers import REGISTERS, VcpuRegisters
from tetrarch.gdb.words import BadRequest, number, numbers, unhex
from tetrarch.machine.debugger import Debugger

__all__ = ["Inspection"]

_OK = b"OK"
# Hex digits of a reply to a read, and what stands around them.
_READ_MAX = (PACKET_MAX - 4) // 2


class Inspection:
    """Each method answers what follows a packet's name."""

    def __init__(self, debugger: Debugger) -> None:
        self._debugger = debugger
        self._physical = False
        self.chosen = 0
        """The vCPU."""

    # Registers.

    def read_registers(self, rest: bytes) -> bytes:
        registers = self._registers_of()
        return b"".join(map(registers.read, REGISTERS)).hex().encode()

    def write_registers(self, rest: bytes) -> bytes:
        data = unhex(rest)
        registers = self._registers_of()
        if len(data) != sum(register.size for register in REGISTERS):
            raise BadRequest
        at = 0
        for register in REGISTERS:
            registers.write(register, data[at : at + register.size])
            at += register.size
        registers.store()
        return _OK

    def read_register(self, rest: bytes) -> bytes:
        register = REGISTERS[number(rest)]
        return self._registers_of().read(register).hex().encode()

    def write_register(self, rest: bytes) -> bytes:
        place, _, value = rest.partition(b"=")
        register = REGISTERS[number(place)]
        data = unhex(value)
        if len(data) != register.size:
            raise BadRequest
        registers = self._registers_of()
        registers.write(register, data)
        registers.store()
        return _OK

    def _registers_of(self) -> VcpuRegisters:
        return VcpuRegisters(self._debugger.vcpus[self.chosen])

    # Memory.

    @property
    def _space(self) -> int | None:
        return None if self._physical else self.chosen

    def read_memory(self, rest: bytes) -> bytes:
        address, length = numbers(rest, b",", 2)
        if length == 0:
            return b""
        return self._debugger.read(self._space, address, min(length, _READ_MAX)).hex().encode()

    def write_memory(self, rest: bytes) -> bytes:
        place, _, digits = rest.partition(b":")
        return self._write(place, unhex(digits))

    def write_binary(self, rest: bytes) -> bytes:
        place, _, data = rest.partition(b":")
        return self._write(place, unescape(data))

    def _write(self, place: bytes, data: bytes) -> bytes:
        address, length = numbers(place, b",", 2)
        if length != len(data) or address + length > 1 << 64:
            raise BadRequest
        self._debugger.write(self._space, address, data)
        return _OK

    def is_physical(self, rest: bytes) -> bytes:
        return b"%d" % self._physical

    def set_physical(self, rest: bytes) -> bytes:
        self._physical = number(rest) != 0
        return _OK
