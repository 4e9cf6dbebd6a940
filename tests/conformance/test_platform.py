"""A platform written in Python, as a guest of a few bytes meets it on each engine."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conformance.conftest import require
from tests.conformance.guest import CODE, CODE32, DATA, DATA32, END, HANDLER, Guest
from tests.conformance.moved import MovedGuest

from tetrarch._native import EngineError, GuestCall, GuestTrap, RegisterPortAccess
from tetrarch.platforms import GuestFault, Hypercalls, Msr, Platform, RegisterPort, TrapHook

BACKDOOR = 0x5658
MSR = 0x4B56_4DFF
# out dx, al with DX = END: the end of the run.
STOP = b"\x66\xba" + END.to_bytes(2, "little") + b"\xee"
VMCALL, VMMCALL = bytes.fromhex("0f01c1"), bytes.fromhex("0f01d9")
RDMSR, WRMSR = bytes.fromhex("0f32"), bytes.fromhex("0f30")
IN_EAX, OUT_EAX = b"\xed", b"\xef"
USER_CODE, USER_DATA = CODE32 | 0x60, DATA32 | 0x60

NO_FUNCTION: Any = 7

Make = Callable[[Platform], Guest]


@pytest.fixture
def make(engine: str) -> Make:
    """A guest on a platform; skips where the host's KVM cannot have it, and it says so."""

    def make(platform: Platform) -> Guest:
        try:
            return Guest(
                "kvm" if engine == "kvm" else "bt",
                translate=engine == "translator",
                platform=platform,
            )
        except EngineError as error:
            if engine == "kvm" and "use engine bt" in str(error):
                pytest.skip(str(error))
            raise

    return make


def user_mode(guest: Guest, code: bytes, **registers: int) -> None:
    """32-bit code in ring 3 with IOPL 0."""
    segments = {f"{name}_attr": USER_DATA for name in ("ss", "ds", "es", "fs", "gs")}
    selectors = {f"{name}_selector": 0x13 for name in ("ss", "ds", "es", "fs", "gs")}
    rights = {"cs_attr": USER_CODE, "cs_selector": 0xB} | segments | selectors
    guest.protected_mode(code, **rights, **registers)


def ended(guest: Guest) -> bool:
    return guest.run() == "stopped"


class Calls:
    """A hypercall handler that adds its arguments and leaves a mark in another register."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int, int]] = []

    def __call__(self, call: GuestCall) -> int:
        self.seen.append((call.vcpu, call.cpl, call["rax"], call["rip"]))
        call["rsi"] = 0x51
        return call["rbx"] + call["rcx"]


@pytest.mark.parametrize("instruction", [VMCALL, VMMCALL], ids=["vmcall", "vmmcall"])
def test_hypercall_handler_sees_and_sets_registers(make: Make, instruction: bytes) -> None:
    calls = Calls()
    guest = make(Platform(name="test", hypercalls=Hypercalls(calls)))
    guest.long_mode(instruction + STOP, rax=7, rbx=1 << 40, rcx=2)
    assert ended(guest)
    assert calls.seen == [(0, 0, 7, CODE)]
    assert (guest.register("rax"), guest.register("rsi")) == ((1 << 40) + 2, 0x51)
    assert guest.vm.stats()["exits"]["hypercall"] == 1
    assert guest.vm.stats()["python"]["calls"] == 1


def test_negative_result_of_a_hypercall_is_an_error_number(make: Make) -> None:
    guest = make(Platform(name="test", hypercalls=Hypercalls(lambda call: -38)))
    guest.long_mode(VMCALL + STOP)
    assert ended(guest)
    assert guest.register("rax") == (1 << 64) - 38


def test_hypercall_from_user_mode_is_the_platforms_choice(make: Make, engine: str) -> None:
    # KVM emulates the other vendor's instruction for the guest's kernel alone.
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    instruction = VMMCALL if engine == "kvm" and not intel else VMCALL
    calls = Calls()
    handler = Hypercalls(calls, user_mode=True)
    stop = RegisterPort(lambda call, access: call.vm.request_stop())
    guest = make(Platform(name="test", hypercalls=handler, ports={0x500: stop}))
    user_mode(guest, instruction + b"\xee", rbx=3, rcx=4, rdx=0x500, rflags=0x3002)
    assert ended(guest)
    assert [cpl for _, cpl, _, _ in calls.seen] == [3]
    assert guest.register("rax") == 7

    calls.seen.clear()
    guest = make(Platform(name="test", hypercalls=Hypercalls(calls)))
    user_mode(guest, instruction, idtr_limit=0)
    assert guest.run() == "shutdown"  # #UD, with an IDT that has no vectors
    assert calls.seen == []


def test_msr_is_read_and_written_in_python(make: Make) -> None:
    written: list[tuple[int, int]] = []

    def read(call: GuestCall, index: int) -> int:
        return 0x1122_3344_5566_7788

    def write(call: GuestCall, index: int, value: int) -> None:
        written.append((index, value))

    msr = Msr(read, write)
    guest = make(Platform(name="test", msrs={range(MSR, MSR + 2): msr}))
    # Read; increment RCX; write what was read.
    code = RDMSR + bytes.fromhex("ffc1") + WRMSR + STOP
    guest.long_mode(code, rcx=MSR, rax=1 << 63, rdx=1 << 63)
    assert ended(guest)
    assert written == [(MSR + 1, 0x1122_3344_5566_7788)]
    assert guest.vm.stats()["exits"]["msr_read"] == 1


def test_answers_of_a_platform_hold_when_the_guest_moves_at_once() -> None:
    require("kvm")
    held = [1]

    def read(call: GuestCall, index: int) -> int:
        call.vm.request_stop()  # a cut, as soon as the answer is there
        return held[-1]

    def write(call: GuestCall, index: int, value: int) -> None:
        call.vm.request_stop()
        held.append(value)

    guest = MovedGuest(Platform(name="test", msrs={MSR: Msr(read, write)}))
    # Four times: read ; mov edx, 0x500 ; out dx, eax ; inc eax ; xor edx, edx ; write ;
    # dec r9d ; jnz to the read
    code = RDMSR + bytes.fromhex("ba00050000 ef ffc0 31d2") + WRMSR + bytes.fromhex("41ffc9 75ed")
    guest.long_mode(code + STOP, rcx=MSR, r9=4)
    assert ended(guest)
    assert held == [1, 2, 3, 4, 5]
    assert [event[3] for event in guest.events] == [1, 2, 3, 4]
    assert guest.moves >= 12


@pytest.mark.parametrize("code", [RDMSR, WRMSR], ids=["read", "write"])
def test_msr_without_a_handler_is_a_general_protection_fault(make: Make, code: bytes) -> None:
    guest = make(Platform(name="test", msrs={MSR: Msr()}))
    guest.vector(13, HANDLER, width=64)
    guest.vm.write_memory(HANDLER, b"\x5b" + STOP)  # pop rbx: the error code
    guest.long_mode(code, rcx=MSR, rbx=1)
    assert ended(guest)
    assert guest.register("rbx") == 0
    # The frame begins with RIP.
    assert guest.vm.read_memory(guest.register("rsp"), 8) == CODE.to_bytes(8, "little")


def test_msr_that_nobody_answers_stays_a_fault(make: Make) -> None:
    guest = make(Platform(name="test", msrs={MSR: Msr()}))
    guest.vector(13, HANDLER, width=64)
    guest.vm.write_memory(HANDLER, STOP)
    guest.long_mode(RDMSR, rcx=MSR + 1)
    assert ended(guest)
    assert guest.vm.stats()["exits"]["msr_read"] == 0


class Backdoor:
    """As VMware's, command 10: the version."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, bool, bool, int]] = []

    def __call__(self, call: GuestCall, access: RegisterPortAccess) -> int | None:
        self.seen.append((access.port, access.size, access.input, access.string, call.cpl))
        if access.port != BACKDOOR:
            call.vm.request_stop()
            return None
        assert (call["rax"], call["rcx"]) == (0x564D_5868, 10)
        call["rbx"] = 0x564D_5868
        return 6


def test_port_shows_registers_to_user_mode_past_iopl(make: Make) -> None:
    backdoor = Backdoor()
    ports = {range(BACKDOOR, BACKDOOR + 2): RegisterPort(backdoor, any_privilege=True)}
    guest = make(Platform(name="test", ports=ports))
    code = IN_EAX + bytes.fromhex("42") + OUT_EAX  # inc edx
    user_mode(guest, code, rax=0x564D_5868, rcx=10, rdx=BACKDOOR)
    assert ended(guest)
    assert backdoor.seen == [(BACKDOOR, 4, True, False, 3), (BACKDOOR + 1, 4, False, False, 3)]
    assert (guest.register("rax"), guest.register("rbx")) == (6, 0x564D_5868)


def test_port_shows_registers_to_the_kernel(make: Make) -> None:
    backdoor = Backdoor()
    guest = make(Platform(name="test", ports={BACKDOOR: RegisterPort(backdoor)}))
    guest.long_mode(IN_EAX + STOP, rax=0x564D_5868, rcx=10, rdx=BACKDOOR)
    assert ended(guest)
    assert backdoor.seen == [(BACKDOOR, 4, True, False, 0)]
    assert (guest.register("rax") & 0xFFFF_FF00, guest.register("rbx")) == (0, 0x564D_5868)
    assert guest.events == []


def test_exception_of_a_handler_comes_out_of_run(make: Make) -> None:
    error = LookupError("no such command")

    def fail(call: GuestCall, access: RegisterPortAccess) -> int:
        raise error

    guest = make(Platform(name="test", ports={BACKDOOR: RegisterPort(fail)}))
    guest.long_mode(IN_EAX + STOP, rdx=BACKDOOR)
    with pytest.raises(LookupError) as raised:
        guest.run()
    assert raised.value is error
    # The instruction is done, and the guest can go on.
    assert guest.register("rip") == CODE + 1
    assert ended(guest)


def test_fault_of_a_handler_is_the_guests(make: Make) -> None:
    def fault(call: GuestCall, access: RegisterPortAccess) -> int:
        call["rbx"] = 99  # lost with the instruction
        raise GuestFault(13, 0x18)

    guest = make(Platform(name="test", ports={BACKDOOR: RegisterPort(fault)}))
    guest.vector(13, HANDLER, width=64)
    guest.vm.write_memory(HANDLER, b"\x58" + STOP)  # pop rax
    guest.long_mode(IN_EAX, rdx=BACKDOOR, rbx=5)
    assert ended(guest)
    assert guest.register("rbx") == 5
    assert guest.vm.read_memory(guest.register("rsp"), 8) == CODE.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (GuestFault(32), "takes a vector"),
        (GuestFault(6, 1), "exception 6 has no such error code"),
    ],
)
def test_fault_that_cannot_be_is_told(make: Make, fault: GuestFault, line: str) -> None:
    def handler(call: GuestCall, access: RegisterPortAccess) -> int:
        raise fault

    guest = make(Platform(name="test", ports={BACKDOOR: RegisterPort(handler)}))
    guest.long_mode(IN_EAX + STOP, rdx=BACKDOOR)
    with pytest.raises(ValueError, match=line):
        guest.run()


@pytest.mark.parametrize("result", [1 << 32, -1, "6", 1.0])
def test_result_that_does_not_fit_is_told(make: Make, result: object) -> None:
    def handler(call: GuestCall, access: RegisterPortAccess) -> int:
        return result  # type: ignore[return-value]

    guest = make(Platform(name="test", ports={BACKDOOR: RegisterPort(handler)}))
    guest.long_mode(IN_EAX + STOP, rdx=BACKDOOR)
    with pytest.raises((TypeError, ValueError), match="a handler of the platform returned"):
        guest.run()


def test_call_is_over_when_its_handler_returns(make: Make) -> None:
    kept: list[GuestCall] = []

    def keep(call: GuestCall, access: RegisterPortAccess) -> int:
        assert call.read(CODE, 1) == IN_EAX
        kept.append(call)
        return 0

    guest = make(Platform(name="test", ports={BACKDOOR: RegisterPort(keep)}))
    guest.long_mode(IN_EAX + STOP, rdx=BACKDOOR)
    assert ended(guest)
    for use in (lambda: kept[0]["rax"], lambda: kept[0].read(DATA, 1), lambda: kept[0].cpl):
        with pytest.raises(EngineError, match="the call is over"):
            use()


def test_system_registers_are_read_but_not_set(make: Make) -> None:
    def handler(call: GuestCall, access: RegisterPortAccess) -> int:
        assert call["cr0"] & 1
        call["cr3"] = 0
        return 0

    guest = make(Platform(name="test", ports={BACKDOOR: RegisterPort(handler)}))
    guest.long_mode(IN_EAX + STOP, rdx=BACKDOOR)
    with pytest.raises(EngineError, match="cr3 is a system register"):
        guest.run()


def test_cpuid_is_data_or_a_function_of_the_vcpu(make: Make) -> None:
    name = (0x4000_0001, *(int.from_bytes(word, "little") for word in (b"Test", b"Test", b"Test")))
    cpuid: Any = {0x4000_0000: name, (0x4000_0001, 3): lambda vcpu: (vcpu + 5, 6, 7, 8)}
    guest = make(Platform(name="test", cpuid=cpuid))
    cpuid_instruction = bytes.fromhex("0fa2")
    guest.long_mode(cpuid_instruction + STOP, rax=0x4000_0000)
    assert ended(guest)
    assert guest.register("rbx") == name[1]
    guest.long_mode(cpuid_instruction + b"\x89\xc6" + STOP, rax=0x4000_0001, rcx=3)  # mov esi, eax
    assert ended(guest)
    assert (guest.register("rsi"), guest.register("rcx")) == (5, 7)


def test_deprivileged_kernels_traps_are_the_platforms(make: Make) -> None:
    seen: list[tuple[int | None, int | None, int]] = []

    def trapped(call: GuestCall, trap: GuestTrap) -> None:
        seen.append((trap.vector, trap.error, call["rip"]))
        if call.read(call["rip"], 1) == b"\xfa":  # CLI, as if it were done
            call["rip"] += 1
            return
        # Into ring 0, behind the HLT.
        for name in ("ss", "ds", "es", "fs", "gs"):
            call[f"{name}_selector"] = 16
            call[f"{name}_attr"] = DATA32
        call["cs_selector"] = 8
        call["cs_attr"] = CODE32
        call["rip"] += 1

    guest = make(Platform(name="test", trap_hook=TrapHook(trapped, frozenset({13}))))
    user_mode(guest, b"\xfa\xf4" + STOP)
    assert ended(guest)
    assert seen == [(13, 0, CODE), (13, 0, CODE + 1)]
    assert guest.register("cs_selector") == 8


def test_platform_that_refers_to_its_machine_is_collected(make: Make) -> None:
    class Handler:
        vm: object = None

        def __call__(self, call: GuestCall, access: RegisterPortAccess) -> int:
            return 0

    handler = Handler()
    guest = make(Platform(name="test", ports={BACKDOOR: RegisterPort(handler)}))
    handler.vm = guest.vm
    gone = weakref.ref(handler)
    del guest, handler
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("platform", "line"),
    [
        ({"cpuid": {0: (1, 2, 3)}}, "not four registers"),
        ({"cpuid": {0: (1, 2, 3, 1 << 32)}}, "not four registers"),
        ({"cpuid": {"x": (1, 2, 3, 4)}}, "no CPUID leaf"),
        ({"msrs": {1 << 32: Msr()}}, "no MSR index"),
        ({"msrs": {range(5, 5): Msr()}}, "no MSR index"),
        ({"msrs": {5: Msr(read=NO_FUNCTION)}}, "cannot be called"),
        ({"ports": {0x10000: RegisterPort(print)}}, "no port"),
        ({"hypercalls": Hypercalls(NO_FUNCTION)}, "cannot be called"),
        ({"trap_hook": TrapHook(print, frozenset({32}))}, "no exception 32"),
    ],
)
def test_platform_that_makes_no_sense_is_refused(
    engine: str, platform: dict[str, object], line: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=line):
        Guest(
            "kvm" if engine == "kvm" else "bt",
            platform=Platform(name="test", **platform),  # type: ignore[arg-type]
        )
