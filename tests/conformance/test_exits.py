"""Accesses to ports and memory outside of RAM reach the machine as the guest made them."""

from __future__ import annotations

import pytest
from tests.conformance.guest import DATA, MMIO, PORTS, Guest
from tests.conformance.moved import MovedGuest

# mov dx, 0x5ff ; out dx, al
STOP16 = bytes.fromhex("baff05 ee")
STOP32 = bytes.fromhex("baff050000 ee")  # in 64-bit code too


def test_port_writes_of_every_width(guest: Guest) -> None:
    # mov eax, 0x44332211 ; mov dx, 0x500 ; out dx, al ; out dx, ax ; out dx, eax
    guest.real_mode(bytes.fromhex("66b811223344 ba0005 ee ef 66ef") + STOP16)
    assert guest.run() == "stopped"
    assert guest.events == [
        ("out", PORTS, 1, 0x11),
        ("out", PORTS, 2, 0x2211),
        ("out", PORTS, 4, 0x44332211),
    ]


def test_port_reads_of_every_width_change_only_their_part(guest: Guest) -> None:
    # mov dx, 0x502 ; in al, dx ; mov ebx, eax ; in ax, dx ; mov ecx, eax ; in eax, dx
    code = bytes.fromhex("ba0205 ec 6689c3 ed 6689c1 66ed")
    guest.real_mode(code + STOP16, rax=0xAAAA_AAAA_AAAA_AAAA)
    assert guest.run() == "stopped"
    assert guest.events == [
        ("in", PORTS + 2, 1, 0x01),
        ("in", PORTS + 2, 2, 0x0203),
        ("in", PORTS + 2, 4, 0x04050607),
    ]
    assert guest.register("rbx") & 0xFFFF_FFFF == 0xAAAA_AA01
    assert guest.register("rcx") & 0xFFFF_FFFF == 0xAAAA_0203
    assert guest.register("rax") == 0x0405_0607


@pytest.mark.parametrize(("size", "prefix"), [(1, ""), (2, ""), (4, "66")])
def test_string_output_comes_one_item_at_a_time(guest: Guest, size: int, prefix: str) -> None:
    # mov dx, 0x500 ; mov si, 0x4000 ; mov cx, 3 ; cld ; rep outs
    outs = "6e" if size == 1 else "6f"
    guest.vm.write_memory(DATA, bytes(range(1, 13)))
    guest.real_mode(bytes.fromhex(f"ba0005 be0040 b90300 fc f3{prefix}{outs}") + STOP16)
    assert guest.run() == "stopped"
    data = bytes(range(1, 13))
    assert guest.events == [
        ("out", PORTS, size, int.from_bytes(data[i * size : (i + 1) * size], "little"))
        for i in range(3)
    ]
    assert guest.register("rsi") == DATA + 3 * size
    assert guest.register("rcx") == 0


@pytest.mark.parametrize(("size", "prefix"), [(1, ""), (2, ""), (4, "66")])
def test_string_input_fills_memory(guest: Guest, size: int, prefix: str) -> None:
    # mov dx, 0x500 ; mov di, 0x4000 ; mov cx, 3 ; cld ; rep ins
    ins = "6c" if size == 1 else "6d"
    guest.real_mode(bytes.fromhex(f"ba0005 bf0040 b90300 fc f3{prefix}{ins}") + STOP16)
    assert guest.run() == "stopped"
    assert [event[:3] for event in guest.events] == [("in", PORTS, size)] * 3
    values = [int(event[3]).to_bytes(size, "little") for event in guest.events]
    assert guest.vm.read_memory(DATA, 3 * size) == b"".join(values)
    assert guest.register("rdi") == DATA + 3 * size


def test_string_output_backwards(guest: Guest) -> None:
    # mov dx, 0x500 ; mov si, 0x4002 ; mov cx, 3 ; std ; rep outsb ; cld
    guest.vm.write_memory(DATA, b"\x01\x02\x03")
    guest.real_mode(bytes.fromhex("ba0005 be0240 b90300 fd f36e fc") + STOP16)
    assert guest.run() == "stopped"
    assert [event[3] for event in guest.events] == [3, 2, 1]
    assert guest.register("rsi") == DATA - 1


def test_memory_writes_of_every_width(guest: Guest) -> None:
    # mov rax, 0x8877665544332211 ; mov ebx, 0xd0000000 ;
    # mov [rbx], al ; mov [rbx+2], ax ; mov [rbx+4], eax ; mov [rbx+8], rax
    code = "48b81122334455667788 bb000000d0 8803 66894302 894304 48894308"
    guest.long_mode(bytes.fromhex(code) + STOP32)
    assert guest.run() == "stopped"
    assert guest.events == [
        ("write", MMIO, 1, 0x11),
        ("write", MMIO + 2, 2, 0x2211),
        ("write", MMIO + 4, 4, 0x44332211),
        ("write", MMIO + 8, 8, 0x8877665544332211),
    ]


def test_memory_reads_of_every_width(guest: Guest) -> None:
    # mov ebx, 0xd0000000 ; mov cl, [rbx] ; mov si, [rbx+2] ; mov edi, [rbx+4] ; mov r8, [rbx+8]
    code = "bb000000d0 8a0b 668b7302 8b7b04 4c8b4308"
    ones = 0xFFFF_FFFF_FFFF_FFFF
    guest.long_mode(bytes.fromhex(code) + STOP32, rcx=ones, rsi=ones, rdi=ones)
    assert guest.run() == "stopped"
    assert [event[:3] for event in guest.events] == [
        ("read", MMIO, 1),
        ("read", MMIO + 2, 2),
        ("read", MMIO + 4, 4),
        ("read", MMIO + 8, 8),
    ]
    assert guest.register("rcx") == 0xFFFF_FFFF_FFFF_FF01
    assert guest.register("rsi") == 0xFFFF_FFFF_FFFF_0203
    assert guest.register("rdi") == 0x0405_0607
    assert guest.register("r8") == 0x0809_0A0B_0C0D_0E0F


def test_read_modify_write_of_a_device_is_a_read_and_a_write(guest: Guest) -> None:
    # mov ebx, 0xd0000000 ; add dword [ebx], 1
    guest.protected_mode(bytes.fromhex("bb000000d0 830301") + STOP32)
    assert guest.run() == "stopped"
    assert guest.events == [("read", MMIO, 4, 0x01020304), ("write", MMIO, 4, 0x01020305)]


def test_string_move_out_of_a_device(guest: Guest) -> None:
    # mov esi, 0xd0000000 ; mov edi, 0x4000 ; mov ecx, 2 ; cld ; rep movsd
    guest.protected_mode(bytes.fromhex("be000000d0 bf00400000 b902000000 fc f3a5") + STOP32)
    assert guest.run() == "stopped"
    assert guest.events == [("read", MMIO, 4, 0x01020304), ("read", MMIO + 4, 4, 0x05060708)]
    assert guest.vm.read_memory(DATA, 8) == bytes.fromhex("04030201 08070605")


def test_unclaimed_port_and_memory_read_as_ones(guest: Guest) -> None:
    # mov dx, 0x700 ; in ax, dx ; movzx ecx, ax ; mov ebx, [0xe0000000]
    guest.protected_mode(bytes.fromhex("ba00070000 66ed 0fb7c8 8b1d000000e0") + STOP32)
    assert guest.run() == "stopped"
    assert (guest.register("rcx"), guest.register("rbx")) == (0xFFFF, 0xFFFF_FFFF)


def test_halt_with_interrupts_off_ends_the_run(guest: Guest) -> None:
    guest.real_mode(bytes.fromhex("fa f4"))  # cli ; hlt
    assert guest.run() == "halted"
    assert guest.register("rip") == 0x1002


def test_triple_fault_ends_the_run(guest: Guest) -> None:
    guest.protected_mode(bytes.fromhex("0f0b"), idtr_limit=0)  # ud2
    assert guest.run() == "shutdown"
    assert guest.run() == "shutdown"


def test_registers_of_a_stopped_guest_are_exact(guest: Guest) -> None:
    # mov ax, 0x1234 ; mov bx, ax ; add bx, 1 ; xor cx, cx ; stop
    guest.real_mode(bytes.fromhex("b83412 89c3 83c301 31c9") + STOP16, rcx=0xFFFF)
    assert guest.run() == "stopped"
    assert guest.register("rbx") & 0xFFFF == 0x1235
    assert guest.register("rcx") == 0
    assert guest.register("rdx") & 0xFFFF == 0x5FF


def test_all_that_a_program_holds_is_there_behind_each_access(guest: Guest) -> None:
    # Fibonacci's numbers by call, stack, carry flag and the upper registers, each told to the
    # device as it comes: mov r14d, 1 ; mov r9d, 12 ; mov edx, 0x500 ; stc
    # next: push r14 ; call add ; pop r15 ; mov eax, r14d ; out dx, eax ; setc al ; out dx, al
    # dec r9d ; jnz next ; stop ; add: lea r14, [r14+r15] ; ret
    code = "41be01000000 41b90c000000 ba00050000 f9"
    loop = "4156 e817000000 415f 4489f0 ef 0f92c0 ee 41ffc9 75ea"
    guest.long_mode(bytes.fromhex(code + loop) + STOP32 + bytes.fromhex("9090 4f8d343e c3"))
    assert guest.run() == "stopped"
    numbers = [1, 2]
    while len(numbers) < 12:
        numbers.append(numbers[-1] + numbers[-2])
    assert [event[2:] for event in guest.events[::2]] == [(4, number) for number in numbers]
    assert [event[2:] for event in guest.events[1::2]] == [(1, 1)] * 12
    if isinstance(guest, MovedGuest):
        # Once more than there are accesses: before the first instruction.
        assert guest.moves >= 24


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_each_mode_computes_at_its_width(guest: Guest, mode: str) -> None:
    # mov eax, -1 (mov ax, -1 in real mode) ; inc eax: 40 is a prefix in 64-bit code
    if mode == "real":
        guest.real_mode(bytes.fromhex("b8ffff 40") + STOP16, rax=0x5555_0000)
        expected = 0x5555_0000
    elif mode == "protected":
        guest.protected_mode(bytes.fromhex("b8ffffffff 40") + STOP32, rax=0x5555_0000)
        expected = 0
    else:
        # mov eax, -1 ; inc rax
        guest.long_mode(bytes.fromhex("b8ffffffff 48ffc0") + STOP32)
        expected = 0x1_0000_0000
    assert guest.run() == "stopped"
    assert guest.register("rax") == expected


def test_real_mode_enters_protected_mode_by_itself(guest: Guest) -> None:
    # lgdt [0x4000] ; mov eax, cr0 ; or al, 1 ; mov cr0, eax ; jmp 8:0x1020
    switch = bytes.fromhex("0f01160040 0f20c0 0c01 0f22c0 ea20100800")
    # mov ax, 16 ; mov ds, ax ; mov eax, [0x4010]
    flat = bytes.fromhex("66b81000 8ed8 a110400000")
    guest.vm.write_memory(DATA, bytes.fromhex("1700 18400000"))
    guest.vm.write_memory(0x4010, bytes.fromhex("78563412"))
    for index, descriptor in enumerate((0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)):
        guest.vm.write_memory(0x4018 + 8 * index, descriptor.to_bytes(8, "little"))
    guest.real_mode(switch.ljust(0x20, b"\x90") + flat + STOP32)
    assert guest.run() == "stopped"
    assert guest.register("rax") == 0x1234_5678
    assert guest.register("cs_selector") == 8
    assert guest.register("cr0") & 1
