"""The backdoor from code of a guest, on each engine."""

from __future__ import annotations

import pytest
from tests.conformance.conftest import ENGINES, require
from tests.conformance.guest import Guest
from tests.conformance.test_platform import STOP, user_mode

from tetrarch._native import EngineError
from tetrarch.platforms.named import named_platform
from tetrarch.platforms.vmware.backdoor import MAGIC, PORT

IN_EAX, VMCALL, VMMCALL = b"\xed", bytes.fromhex("0f01c1"), bytes.fromhex("0f01d9")


@pytest.fixture(params=ENGINES)
def guest(request: pytest.FixtureRequest) -> Guest:
    name: str = request.param
    require(name)
    engine = "kvm" if name == "kvm" else "bt"
    return Guest(engine, translate=name == "translator", platform=named_platform("vmware", engine))


def version(guest: Guest) -> tuple[int, int]:
    assert guest.run() == "stopped"
    return guest.register("rax") & 0xFFFF_FF00, guest.register("rbx")


def test_port_answers_the_kernel(guest: Guest) -> None:
    guest.long_mode(IN_EAX + STOP, rax=MAGIC, rcx=10, rdx=PORT, rbx=(1 << 32) - 1)
    assert version(guest) == (0, MAGIC)


@pytest.mark.parametrize("instruction", [VMCALL, VMMCALL], ids=["vmcall", "vmmcall"])
def test_hypercall_answers_where_cpuid_says_so(guest: Guest, instruction: bytes) -> None:
    # mov eax, 0x40000010 ; cpuid ; mov esi, ecx ; then the call.
    code = bytes.fromhex("b810000040 0fa2 89ce")
    call = bytes.fromhex("b868584d56 b90a000000 31d2") + instruction
    guest.long_mode(code + STOP, rcx=0)
    assert guest.run() == "stopped"
    if guest.register("rsi") == 0:
        pytest.skip("the port is the way on this engine")
    assert guest.register("rsi") == 2  # VMCALL alone: Linux takes no other word of two bits
    guest.long_mode(call + STOP)
    assert version(guest) == (0, MAGIC)


def test_programs_reach_the_port_past_iopl() -> None:
    for engine in ("interpreter", "translator"):
        guest = Guest(
            "bt", translate=engine == "translator", platform=named_platform("vmware", "bt")
        )
        # in eax, dx ; then a hypercall that stops nothing, and #UD to end.
        user_mode(guest, IN_EAX + b"\x0f\x0b", rax=MAGIC, rcx=10, rdx=PORT, idtr_limit=0)
        assert guest.run() == "shutdown"
        assert (guest.register("rax"), guest.register("rbx")) == (6, MAGIC)


def test_kvm_is_not_asked_for_what_it_keeps_to_itself() -> None:
    require("kvm")
    try:
        Guest("kvm", platform=named_platform("vmware", "kvm"))
    except EngineError as error:
        pytest.fail(f"the platform asks for too much: {error}")
