"""A virtual CPU as a program looks at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tetrarch.machine.engine_vm import EngineVcpu

__all__ = ["VcpuView"]


class VcpuView:
    """Registers, of a machine that runs too: it is held for the moment of a look."""

    def __init__(self, vcpu: EngineVcpu) -> None:
        self._vcpu = vcpu

    @property
    def regs(self) -> dict[str, int]:
        """By name: rax to r15, rip, rflags, cr0 to cr8, efer, cs_selector and so on."""
        return self._vcpu.regs()

    def set_regs(self, **values: int) -> None:
        """Sets the given ones and leaves the others, or sets none where one cannot be."""
        self._vcpu.set_regs(values)

    def dump(self) -> str:
        """Registers and the bytes at RIP as text."""
        return self._vcpu.dump()
