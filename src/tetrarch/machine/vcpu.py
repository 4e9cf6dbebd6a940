"""A virtual CPU as a program looks at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tetrarch.machine.lifecycle import Allow, allow_all
from tetrarch.machine.memory import LinearMemory
from tetrarch.machine.registers import FpuRegisters, ModelRegisters, Registers

if TYPE_CHECKING:
    from tetrarch.machine.engine_vm import MemoryAccess, VcpuAccess

__all__ = ["VcpuView"]


class VcpuView:
    """Registers and memory, of a machine that runs too: it is held for the moment of a look."""

    def __init__(
        self, vm: MemoryAccess, vcpu: VcpuAccess, number: int = 0, allow: Allow = allow_all
    ) -> None:
        """``allow`` raises where registers ("set_regs") or memory ("write_memory") cannot be set
        now."""
        self._vcpu = vcpu
        self._allow = allow
        self.number = number
        self.linear = LinearMemory(vm, vcpu, allow)
        """Memory as it has it mapped: ``linear[address : address + 16]``."""
        self.msr = ModelRegisters(vcpu, allow)
        """Model-specific registers by number."""

    def __repr__(self) -> str:
        return f"<vCPU {self.number}>"

    @property
    def regs(self) -> Registers:
        """General, segment and control registers at this moment: ``regs.rip``, ``regs["cr3"]``.
        Assigning sets them."""
        return Registers(self._vcpu, self._allow)

    def set_regs(self, **values: int) -> None:
        """Sets the given ones and leaves the others, or sets none where one cannot be."""
        self.require_settable()
        self._vcpu.set_regs(values)

    def require_settable(self) -> None:
        """Raises MachineStateError where no register can be set now: the machine records, or
        replays."""
        self._allow("set_regs")

    @property
    def fpu(self) -> FpuRegisters:
        """x87, SSE and AVX registers at this moment: ``fpu.xmm0``. Assigning sets them."""
        return FpuRegisters(self._vcpu, self._allow)

    def dump(self) -> str:
        """Registers and the bytes at RIP as text."""
        return self._vcpu.dump()
