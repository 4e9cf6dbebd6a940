"""The machine-check architecture: a guest counts its banks once and reads all of them later, on
whatever engine it is then (Intel SDM 3B, 17.3)."""

from __future__ import annotations

from tests.conformance.guest import PORTS, Guest

BANKS = 10
# mov dx, 0x5ff ; out dx, al
STOP = bytes.fromhex("66baff05 ee")
# rdmsr ; mov edi, edx ; mov dx, 0x500 ; out dx, eax ; mov eax, edi ; out dx, eax
SHOW = bytes.fromhex("0f32 89d7 66ba0005 ef 89f8 ef")


def mov_ecx(value: int) -> bytes:
    return b"\xb9" + value.to_bytes(4, "little")


def shown(guest: Guest) -> list[int]:
    """What SHOW has shown, of 64 bits each."""
    halves = [int(event[3]) for event in guest.events if event[:2] == ("out", PORTS)]
    return [low | high << 32 for low, high in zip(halves[::2], halves[1::2], strict=True)]


def test_banks_are_the_same_on_every_engine(guest: Guest) -> None:
    # loop: SHOW ; inc ecx ; dec ebx ; jnz loop
    each = SHOW + bytes.fromhex("41 4b")
    loop = each + b"\x75" + (-len(each) - 2 & 0xFF).to_bytes(1)
    code = mov_ecx(0x179) + SHOW + mov_ecx(0x17B) + SHOW + mov_ecx(0x400) + loop + STOP
    guest.protected_mode(code, rbx=4 * BANKS)
    assert guest.run() == "stopped"
    capability, control, *registers = shown(guest)
    assert capability == BANKS | 1 << 8
    assert control == 2**64 - 1
    assert registers == [2**64 - 1, 0, 0, 0] * BANKS


def test_address_of_a_bank_keeps_what_is_written(guest: Guest) -> None:
    # mov eax, 0x12345678 ; mov edx, 0x9ABC ; wrmsr, between accesses where a guest may be moved
    write = bytes.fromhex("b878563412 babc9a0000 0f30")
    code = mov_ecx(0x402 + 4 * 3) + SHOW + write + SHOW + SHOW + STOP
    guest.protected_mode(code)
    assert guest.run() == "stopped"
    assert shown(guest) == [0, 0x9ABC_1234_5678, 0x9ABC_1234_5678]
