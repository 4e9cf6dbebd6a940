"""A guest of Xen's that calls its hypervisor, one hypercall a run."""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.conformance.guest import DATA, END, Guest

from tetrarch.platforms.xen import Xen

VMCALL = bytes.fromhex("0f01c1")
VMMCALL = bytes.fromhex("0f01d9")
STOP = bytes([0x66, 0xBA]) + END.to_bytes(2, "little") + b"\xee"  # mov dx, END ; out dx, al
MEMORY, VERSION, VM_ASSIST, VCPU, SCHED, EVENTS, HVM = 12, 17, 21, 24, 29, 32, 34
SET_TIMER = 15
EPERM, ENOENT, ESRCH, EFAULT, EEXIST, EINVAL, ENOSYS = -1, -2, -3, -14, -17, -22, -38
SELF = 0x7FF0
SHARED, INFO = 0x2_0000, 0x3_0040
PENDING, MASK, SELECTOR = SHARED + 2048, SHARED + 2560, 8
NOWHERE = 0x8000_0000_0000


class XenGuest(Guest):
    """Arguments that are bytes lie at ``DATA``, and are read again afterwards."""

    def __init__(self, *, vcpus: int = 1, translate: bool = True) -> None:
        self.xen = Xen()
        self.ends: list[int] = []
        super().__init__("bt", translate=translate, vcpus=vcpus, platform=self.xen.platform())
        ends = {reason: self._end(reason) for reason in (0, 1, 3)}
        self.xen.connect(self.vm, (1, vcpus, 1), ends)

    def _end(self, reason: int) -> Callable[[], None]:
        return lambda: self.ends.append(reason)

    def call(
        self, number: int, *arguments: int | bytes, instruction: bytes = VMCALL, **registers: int
    ) -> int:
        """The result, negative for an error."""
        self.prepare(number, *arguments, instruction=instruction, **registers)
        assert self.run() == "stopped"
        result = self.register("rax")
        return result - (1 << 64) if result >> 63 else result

    def prepare(
        self, number: int, *arguments: int | bytes, instruction: bytes = VMCALL, **registers: int
    ) -> None:
        """Has the guest call when it runs next, and end then."""
        values: dict[str, int] = {}
        for name, value in zip(("rdi", "rsi", "rdx"), arguments, strict=False):
            if isinstance(value, bytes):
                self.vm.write_memory(DATA, value)
            values[name] = DATA if isinstance(value, bytes) else value
        self.long_mode(instruction + STOP, rax=number, **values, **registers)

    def answer(self, form: str, at: int = 0) -> tuple[int, ...]:
        """What a hypercall has left in its argument."""
        return struct.unpack(form, self.vm.read_memory(DATA + at, struct.calcsize(form)))

    def number(self, address: int) -> int:
        return int.from_bytes(self.vm.read_memory(address, 8), "little")

    def place(self) -> None:
        """shared_info, and a vcpu_info of the first vCPU's own."""
        assert self.call(MEMORY, 7, struct.pack("<HHIQQ", SELF, 0, 0, 0, SHARED >> 12)) == 0
        assert self.call(VCPU, 10, 0, struct.pack("<QII", INFO >> 12, INFO & 0xFFF, 0)) == 0

    def bind_ipi(self, vcpu: int = 0) -> int:
        assert self.call(EVENTS, 7, struct.pack("<II", vcpu, 0)) == 0
        return self.answer("<I", 4)[0]

    def send(self, port: int) -> int:
        return self.call(EVENTS, 4, struct.pack("<I", port))

    def unmask(self, port: int) -> int:
        return self.call(EVENTS, 9, struct.pack("<I", port))
