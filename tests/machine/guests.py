"""Guests of a few bytes: 32-bit code as the PVH entry starts it, at 1 MiB."""

import struct

# mov edx, 0x604 ; mov eax, 0x3400 ; out dx, ax ; jmp $
POWER_OFF = bytes.fromhex("ba04060000 b800340000 66ef ebfe")
# mov al, 0xfe ; out 0x64, al ; jmp $
KEYBOARD_RESET = bytes.fromhex("b0fe e664 ebfe")
# mov edx, 0xcf9 ; mov al, 6 ; out dx, al ; jmp $
CF9_RESET = bytes.fromhex("baf90c0000 b006 ee ebfe")
# mov al, 1 ; out 0x92, al ; jmp $
PORT_92_RESET = bytes.fromhex("b001 e692 ebfe")
# lidt [0x100008] ; int3 ; 0x100008: six bytes of 0
TRIPLE_FAULT_ON_PURPOSE = bytes.fromhex("0f011d08001000 cc 000000000000")
# ud2, with no IDT of the guest's
TRIPLE_FAULT = bytes.fromhex("0f0b")
# mov eax, 0xdeadbeef ; jmp eax
JUMP_TO_NOWHERE = bytes.fromhex("b8efbeadde ffe0")
# cli ; hlt ; jmp $-1
HALT_FOREVER = bytes.fromhex("fa f4 ebfd")
# jmp $
ENDLESS_LOOP = bytes.fromhex("ebfe")
# cpuid ; jmp to it: an instruction that engine bt always interprets
CPUID_LOOP = bytes.fromhex("0fa2 ebfc")
# mov al, 0x10 ; out 0xf4, al ; jmp $
DEBUG_EXIT_16 = bytes.fromhex("b010 e6f4 ebfe")
# mov edx, 0x500 ; in al, dx ; inc al ; out dx, al ; POWER_OFF
ANSWER_PORT_500 = bytes.fromhex("ba00050000 ec fec0 ee") + POWER_OFF
# mov al, [0xd0000000] ; inc al ; mov [0xd0000004], al ; POWER_OFF
ANSWER_MMIO = bytes.fromhex("a0000000d0 fec0 a2040000d0") + POWER_OFF
# wait: mov edx, 0x3fd ; in al, dx ; test al, 1 ; jz wait
# mov edx, 0x3f8 ; in al, dx ; out dx, al ; jmp wait
ECHO = bytes.fromhex("bafd030000 ec a801 74f6 baf8030000 ec ee ebed")

# ECHO, with a digit that counts behind each byte: mov ecx, 0x30 first, then inc ecx ;
# mov eax, ecx ; out dx, al behind the echo
COUNTING_ECHO = bytes.fromhex("b930000000 bafd030000 ec a801 74f6 baf8030000 ec ee 41 89c8 ee ebe9")
# Says "?" for the first typed byte. For each further one: "0" if the upper half of the TSC's
# difference since the last is 0, else "1".
#       mov ebp, '?'                 the first answer
# wait: mov edx, 0x3fd ; in al, dx ; test al, 1 ; jz wait
#       mov edx, 0x3f8 ; in al, dx
#       rdtsc ; mov ebx, eax ; mov ecx, edx ; sub eax, esi ; sbb edx, edi
#       mov esi, ebx ; mov edi, ecx
#       mov eax, ebp ; cmp eax, 0 ; jne say
#       mov eax, '0' ; test edx, edx ; jz say ; mov eax, '1'
# say:  mov edx, 0x3f8 ; out dx, al ; xor ebp, ebp ; jmp wait
TICKS_BETWEEN = bytes.fromhex(
    "bd3f000000"
    "bafd030000 ec a801 74f6"
    "baf8030000 ec"
    "0f31 89c3 89d1 29f0 19fa"
    "89de 89cf"
    "89e8 83f800 750e"
    "b830000000 85d2 7405 b831000000"
    "baf8030000 ee 31ed ebc3"
)


def say_cpuid(leaf: int, register: str) -> bytes:
    """For each typed byte says EAX or EBX of a leaf of CPUID, each four bits from the lowest on as
    one of "@" to "O".

    wait: mov edx, 0x3fd ; in al, dx ; test al, 1 ; jz wait
          mov edx, 0x3f8 ; in al, dx ; mov eax, leaf ; xor ecx, ecx ; cpuid ; mov ebx, register
          mov edx, 0x3f8 ; mov ecx, 8
    next: mov al, bl ; and al, 0xf ; or al, 0x40 ; out dx, al ; shr ebx, 4 ; loop next ; jmp wait
    """
    number, move = leaf.to_bytes(4, "little").hex(), {"EAX": "89c3", "EBX": "89db"}[register]
    return bytes.fromhex(
        f"bafd030000 ec a801 74f6 baf8030000 ec b8{number} 31c9 0fa2 {move}"
        "baf8030000 b908000000 88d8 240f 0c40 ee c1eb04 e2f4 ebcd"
    )


def tell_cpuid(leaves: list[tuple[int, int]]) -> bytes:
    """Writes EAX, EBX, ECX and EDX of each leaf and subleaf to port 0x500, then POWER_OFF.

    mov eax, leaf ; mov ecx, subleaf ; cpuid ; mov esi, edx ; mov edx, 0x500 ; out dx, eax ;
    mov eax, ebx ; out dx, eax ; mov eax, ecx ; out dx, eax ; mov eax, esi ; out dx, eax
    """
    asked = (struct.pack("<BIBI", 0xB8, leaf, 0xB9, subleaf) for leaf, subleaf in leaves)
    told = bytes.fromhex("0fa2 89d6 ba00050000 ef 89d8 ef 89c8 ef 89f0 ef")
    return b"".join(one + told for one in asked) + POWER_OFF


def say(text: bytes) -> bytes:
    """Prints on COM1: mov edx, 0x3f8, then for each byte mov al, byte ; out dx, al."""
    return bytes.fromhex("baf8030000") + b"".join(b"\xb0%c\xee" % byte for byte in text)


# mov edx, 0xcf8 ; mov eax, 0x80002404 ; out dx, eax ; in eax, dx
# then, with 0x80000000 there: mov edx, 0xcfc ; in eax, dx ; mov edx, 0x500 ; out dx, eax
# mov edx, 0xcf8 ; mov eax, 0x80000800 ; out dx, eax ; mov edx, 0xcfc ; in eax, dx
# mov edx, 0x500 ; out dx, eax ; POWER_OFF
PCI_SCAN = (
    bytes.fromhex(
        "baf80c0000 b804240080 ef ed"
        "b800000080 ef bafc0c0000 ed ba00050000 ef"
        "baf80c0000 b800080080 ef bafc0c0000 ed ba00050000 ef"
    )
    + POWER_OFF
)


# lidt [0x4000], six bytes that nobody wrote ; int3
TRIPLE_FAULT_ANYWHERE = bytes.fromhex("0f011d00400000 cc")


def reset_until(count: int, reset: bytes, each: bytes = b"") -> bytes:
    """Does ``each`` and resets by ``reset``, until it has started ``count`` times.

    inc dword [0x5000] ; each ; cmp dword [0x5000], count ; jae off ; reset ; off: POWER_OFF
    """
    return (
        bytes.fromhex("ff0500500000")
        + each
        + bytes.fromhex("833d00500000")
        + bytes([count, 0x73, len(reset)])
        + reset
        + POWER_OFF
    )


# mov edx, 0x500 ; mov eax, [0x5000] ; out dx, al
TELL_PORT_500 = bytes.fromhex("ba00050000 a100500000 ee")
# Says what it finds in the UART's scratch register, the PIC's mask and CR2, and leaves 0x5a there:
# mov edx, 0x3ff ; in al, dx ; mov edx, 0x500 ; out dx, al ; in al, 0x21 ; out dx, al ;
# mov eax, cr2 ; out dx, al ; mov edx, 0x3ff ; mov al, 0x5a ; out dx, al ; out 0x21, al ;
# mov cr2, eax
TELL_STATE = bytes.fromhex(
    "baff030000 ec ba00050000 ee e421 ee 0f20d0 ee baff030000 b05a ee e621 0f22d0"
)


def watch_cpu_1() -> bytes:
    """For each typed byte: "r" says the hot-plug register of CPU 1, as one of "@" to "O"; "s"
    starts all other CPUs, which say their APIC IDs and halt; of a digit four bits are written.

          mov esi, starts ; mov edi, 0x3000 ; mov ecx, its length ; cld ; rep movsb
    wait: mov edx, 0x3fd ; in al, dx ; test al, 1 ; jz wait ; mov edx, 0x3f8 ; in al, dx
          cmp al, "s" ; je send ; cmp al, "r" ; je read
          and al, 0xf ; mov edx, 0x701 ; out dx, al ; jmp wait
    read: mov edx, 0x701 ; in al, dx ; or al, 0x40 ; mov edx, 0x3f8 ; out dx, al ; jmp wait
    send: mov ebx, 0xfee00300 ; mov [ebx], INIT to all others ; mov [ebx], SIPI with vector 3
          jmp wait
    starts (16 bits): mov eax, 1 ; cpuid ; shr ebx, 24 ; mov al, bl ; or al, 0x30
          mov dx, 0x3f8 ; out dx, al ; cli ; hlt ; jmp $-1
    """
    starts = bytes.fromhex("66b801000000 0fa2 66c1eb18 88d8 0c30 baf803 ee fa f4 ebfd")
    wait = bytes.fromhex("bafd030000 ec a801 74f6 baf8030000 ec")
    write = bytes.fromhex("240f ba01070000 ee eb")
    read = bytes.fromhex("ba01070000 ec 0c40 baf8030000 ee eb")
    send = bytes.fromhex("bb0003e0fe c70300450c00 c70303460c00 eb")
    to_read, to_send = len(write) + 1, 4 + len(write) + 1 + len(read) + 1
    choose = bytes([0x3C, ord("s"), 0x74, to_send, 0x3C, ord("r"), 0x74, to_read])
    loop = wait + choose
    for part in (write, read, send):
        loop += part
        loop += (-len(loop) - 1).to_bytes(1, "little", signed=True)
    code_at, setup_bytes = 0x10_0000, 18
    source = code_at + setup_bytes + len(loop)
    setup = struct.pack("<BIBIBI", 0xBE, source, 0xBF, 0x3000, 0xB9, len(starts))
    return setup + bytes.fromhex("fc f3a4") + loop + starts
