"""A program of the guest's, at the backdoor: registers, and the protocols over them."""

from __future__ import annotations

from typing import Any, cast

from tetrarch._native import GuestFault
from tetrarch.platforms import GuestCall, RegisterPortAccess
from tetrarch.platforms.vmware import Vmware
from tetrarch.platforms.vmware.backdoor import HIGH_BANDWIDTH_PORT, MAGIC, PORT

MESSAGE = 30
OPEN, SEND_SIZE, SEND, RECEIVE_SIZE, RECEIVE, RECEIVED, CLOSE = range(7)
SUCCESS, DO_RECEIVE, HIGH_BANDWIDTH = 1, 2, 0x80
RPCI, TCLO = 0x49435052, 0x4F4C4354
REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp")


class StandIn:
    """What a command sees of a machine. Of linear addresses those are there that ``MAPPED`` has;
    their pages lie the other way round in memory."""

    MAPPED = range(0x10_0000, 0x18_0000)
    ram: tuple[tuple[int, int], ...] = ((0, 3 << 30), (4 << 30, 1 << 30))

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}
        self.clocks: dict[int, int | None] = {}
        self.tells = True

    def read_memory(self, address: int, length: int) -> bytes:
        assert address // 4096 == (address + length - 1) // 4096
        return bytes(self.bytes.get(address + index, 0) for index in range(length))

    def write_memory(self, address: int, data: bytes) -> None:
        assert address // 4096 == (address + len(data) - 1) // 4096
        self.bytes |= {address + index: byte for index, byte in enumerate(data)}

    def place(self, linear: int) -> int:
        if linear not in self.MAPPED:
            raise GuestFault(14, 6, linear)
        return 0x20_0000 - (linear & ~4095) + (linear & 4095)

    def tsc_hz(self) -> int:
        return 5_000_000_123

    def tell_stolen_time(self) -> bool:
        return self.tells

    def set_stolen_clock(self, vcpu: int, address: int | None) -> bool:
        """Of RAM without its last page."""
        there = address is None or any(
            base <= address < base + length - 4096 for base, length in self.ram
        )
        self.clocks[vcpu] = address if there else None
        return there


class Access:
    def __init__(self, size: int = 4, *, input_: bool = True, string: bool = False) -> None:
        self.port, self.size, self.input, self.string = PORT, size, input_, string


class Registers(dict[str, int]):
    """As a ``GuestCall``."""

    vcpu = 0

    def __init__(self, cpl: int = 3, **values: int) -> None:
        super().__init__(dict.fromkeys(REGISTERS, 0) | values)
        self.cpl = cpl
        self.vm = StandIn()

    def access(self, linear: int, write: bool) -> int:
        return self.vm.place(linear)

    def __setitem__(self, name: str, value: int) -> None:
        assert name in self
        assert 0 <= value < 1 << 64
        super().__setitem__(name, value)


class Program:
    """Calls by the port, as open-vm-tools does."""

    def __init__(self, vmware: Vmware, cpl: int = 3) -> None:
        self.platform = vmware.platform(hypercalls=True, any_privilege=True)
        self.cpl = cpl
        self.memory = StandIn()

    def call(self, command: int, access: Access | None = None, **values: int) -> Registers:
        """The registers after it."""
        registers = Registers(self.cpl, **{"rax": MAGIC, "rdx": PORT} | values)
        registers["rcx"] |= command
        port: Any = self.platform.ports
        eax = port[PORT].handler(
            cast(GuestCall, registers), cast(RegisterPortAccess, access or Access())
        )
        if eax is not None:
            registers["rax"] = eax
        return registers

    def string(self, *, out: bool, call: bool = False, **values: int) -> Registers:
        """The registers after REP OUTSB or INSB, or a hypercall for the same."""
        registers = Registers(self.cpl, **{"rax": MAGIC} | values)
        registers.vm = self.memory
        if call:
            assert self.platform.hypercalls is not None
            registers["rdx"] |= 1 | (2 if out else 0)
            eax = self.platform.hypercalls.handler(cast(GuestCall, registers))
            assert eax is not None
            registers["rax"] = eax
        else:
            port: Any = self.platform.ports
            access = Access(1, input_=not out, string=True)
            handler = port[HIGH_BANDWIDTH_PORT].handler
            assert handler(cast(GuestCall, registers), cast(RegisterPortAccess, access)) is None
        return registers


class Channel:
    """A channel for messages. Its operations give the status."""

    def __init__(self, program: Program, protocol: int) -> None:
        self.program = program
        done = program.call(MESSAGE, rcx=OPEN << 16, rbx=protocol | 1 << 31)
        self.opened = bool(done["rcx"] >> 16 & SUCCESS)
        self.number = done["rdx"] >> 16
        self.cookies = done["rsi"], done["rdi"]

    def use(self, kind: int, argument: int = 0, **values: int) -> Registers:
        number = values.get("number", self.number)
        return self.program.call(
            MESSAGE,
            rcx=kind << 16,
            rbx=argument,
            rdx=number << 16 | PORT,
            rsi=values.get("rsi", self.cookies[0]),
            rdi=values.get("rdi", self.cookies[1]),
        )

    def status(self, kind: int, argument: int = 0, **values: int) -> int:
        return self.use(kind, argument, **values)["rcx"] >> 16

    def send(self, text: bytes) -> None:
        assert self.status(SEND_SIZE, len(text)) & SUCCESS
        for at in range(0, len(text), 4):
            piece = int.from_bytes(text[at : at + 4], "little")
            assert self.status(SEND, piece) == SUCCESS

    def receive(self) -> bytes | None:
        """None: there is nothing."""
        done = self.use(RECEIVE_SIZE)
        assert done["rcx"] >> 16 & SUCCESS
        if not done["rcx"] >> 16 & DO_RECEIVE:
            return None
        assert done["rdx"] >> 16 == SEND_SIZE
        length, text = done["rbx"], b""
        while len(text) < length:
            done = self.use(RECEIVE, SUCCESS)
            assert (done["rcx"] >> 16, done["rdx"] >> 16) == (SUCCESS, SEND)
            text += done["rbx"].to_bytes(4, "little")
        assert self.status(RECEIVED, SUCCESS) == SUCCESS
        return text[:length]

    def string(self, out: bool, linear: int, length: int, **more: Any) -> Registers:
        """Sends or fetches so many bytes of memory at once."""
        first, second = self.cookies
        if out:
            values = {"rsi": linear, "rbp": first, "rdi": second}
        else:
            values = {"rdi": linear, "rsi": first, "rbp": second}
        number = self.number << 16
        return self.program.string(
            out=out, **{"rbx": SUCCESS << 16, "rcx": length, "rdx": number} | values | more
        )

    def ask(self, text: bytes) -> bytes | None:
        self.send(text)
        return self.receive()
