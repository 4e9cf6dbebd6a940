"""Linux's 64-bit boot protocol, by what the guest finds in memory and registers."""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.boot.conftest import source_of

from tetrarch.boot.bzimage import load_bzimage, parse_setup_header
from tetrarch.boot.loader import load_kernel
from tetrarch.errors import BootError

MIB = 1 << 20
ZERO_PAGE = 0x7000


def boot(vm: Any, image: bytes, initrd: Any = None, cmdline: str = "quiet") -> dict[str, int]:
    return load_bzimage(vm, source_of(image), initrd, cmdline, 0)


def test_kernel_is_entered_at_its_64_bit_entry(make_vm: Any, make_bzimage: Any, write: Any) -> None:
    vm = make_vm(64 * MIB)
    payload = bytes(range(256)) * 16
    kernel = write("vmlinuz", make_bzimage(payload=payload))

    regs = load_kernel(vm, kernel, None, "console=ttyS0", 0xE_0000)

    assert regs["rip"] == 16 * MIB + 0x200
    assert regs["rsi"] == ZERO_PAGE
    assert vm.memory[16 * MIB : 16 * MIB + len(payload)] == payload
    assert vm.u64(ZERO_PAGE + 0x70) == 0xE_0000
    assert vm.memory[ZERO_PAGE + 0x210] == 0xFF
    assert vm.memory[ZERO_PAGE + 0x1EF] == 0
    assert vm.memory[ZERO_PAGE + 0x202 : ZERO_PAGE + 0x206] == b"HdrS"
    assert vm.text(vm.u32(ZERO_PAGE + 0x228)) == b"console=ttyS0"
    assert vm.u32(ZERO_PAGE + 0x218) == vm.u32(ZERO_PAGE + 0x21C) == 0


def test_cpu_starts_in_long_mode_with_the_protocols_segments(
    make_vm: Any, make_bzimage: Any
) -> None:
    vm = make_vm(64 * MIB)

    regs = boot(vm, make_bzimage())

    assert regs["cr0"] & 0x8000_0001 == 0x8000_0001
    assert regs["cr4"] & 0x20
    assert regs["efer"] == 0x500
    assert regs["rflags"] == 2
    assert (regs["cs_selector"], regs["ss_selector"]) == (0x10, 0x18)
    assert regs["cs_attr"] == 0xA09B
    descriptors = [vm.u64(regs["gdtr_base"] + s) for s in (0x10, 0x18)]
    assert descriptors == [0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF]


@pytest.mark.parametrize(
    ("change", "address"),
    [
        ({"xloadflags": 0}, 16 * MIB),
        ({"version": 0x20B}, 16 * MIB),
        # Fields that came later than the version are not looked at: here pref_address ...
        ({"version": 0x206}, 2 * MIB),
        # ... and here relocatable_kernel and its alignment too.
        ({"version": 0x202}, MIB),
    ],
    ids=["no 64-bit entry", "2.11", "2.06", "2.02"],
)
def test_32_bit_kernel_is_entered_in_protected_mode(
    make_vm: Any, make_bzimage: Any, change: dict[str, Any], address: int
) -> None:
    vm = make_vm(64 * MIB)

    regs = boot(vm, make_bzimage(**change), cmdline="quiet")

    assert (regs["rip"], vm.u32(ZERO_PAGE + 0x214)) == (address, address)
    assert vm.memory[address : address + 4] == b"\x90" * 4
    assert (regs["cr0"], regs["cs_attr"], regs["efer"]) == (0x11, 0xC09B, 0)
    assert (regs["rsi"], regs["rbp"], regs["rdi"], regs["rbx"]) == (ZERO_PAGE, 0, 0, 0)
    assert vm.text(vm.u32(ZERO_PAGE + 0x228)) == b"quiet"


@pytest.mark.parametrize("address", [0, 0x7123, 16 * MIB, (4 << 30) - 1])
def test_page_tables_map_the_first_4_gib_to_themselves(
    make_vm: Any, make_bzimage: Any, address: int
) -> None:
    vm = make_vm(64 * MIB)
    regs = boot(vm, make_bzimage())

    pdpt = vm.u64(regs["cr3"] + (address >> 39) * 8)
    directory = vm.u64((pdpt & ~0xFFF) + (address >> 30 & 511) * 8)
    entry = vm.u64((directory & ~0xFFF) + (address >> 21 & 511) * 8)

    assert entry & 0x83 == 0x83
    assert (entry & ~0x1F_FFFF) + (address & 0x1F_FFFF) == address


def test_memory_map_spares_the_firmware_area(make_vm: Any, make_bzimage: Any) -> None:
    vm = make_vm(64 * MIB)

    boot(vm, make_bzimage())

    count = vm.memory[ZERO_PAGE + 0x1E8]
    entries = [
        struct.unpack_from("<QQI", vm.memory, ZERO_PAGE + 0x2D0 + 20 * i) for i in range(count)
    ]
    assert entries == [
        (0, 0x9_FC00, 1),
        (0x9_FC00, 0x6_0400, 2),
        (0x10_0000, 63 * MIB, 1),
        (0xE000_0000, 0x10_0000, 2),  # PCI configuration space
    ]


def test_initrd_lies_page_aligned_at_the_top_of_memory(
    make_vm: Any, make_bzimage: Any, write: Any
) -> None:
    vm = make_vm(64 * MIB)
    data = b"initrd" * 1000
    initrd = write("initrd", data)

    boot(vm, make_bzimage(), initrd)

    address, size = vm.u32(ZERO_PAGE + 0x218), vm.u32(ZERO_PAGE + 0x21C)
    assert size == len(data)
    assert address % 4096 == 0
    # Linux reads a little past the end of a damaged one: a page of RAM follows.
    assert 64 * MIB - size - 2 * 4096 < address <= 64 * MIB - size - 4096
    assert vm.memory[address : address + size] == data


def test_initrd_of_several_chunks_arrives_whole(
    make_vm: Any, make_bzimage: Any, write: Any
) -> None:
    vm = make_vm(64 * MIB)
    data = b"".join(i.to_bytes(4, "little") for i in range(MIB))

    boot(vm, make_bzimage(), write("initrd", data + b"end"))

    address = vm.u32(ZERO_PAGE + 0x218)
    assert vm.memory[address : address + 4 * MIB + 3] == data + b"end"


def test_old_kernel_gets_its_initrd_below_initrd_addr_max(
    make_vm: Any, make_bzimage: Any, write: Any
) -> None:
    vm = make_vm(64 * MIB)
    image = make_bzimage(xloadflags=1, initrd_addr_max=32 * MIB - 1)

    boot(vm, image, write("initrd", b"x" * 5000))

    assert vm.u32(ZERO_PAGE + 0x218) == 32 * MIB - 8192 - 4096


def test_initrd_that_fits_exactly_is_taken_and_a_page_more_is_not(
    make_vm: Any, make_bzimage: Any, write: Any
) -> None:
    # The kernel's memory ends at 20 MiB.
    vm = make_vm(22 * MIB)
    boot(vm, make_bzimage(), write("fits", bytes(2 * MIB - 4096)))
    assert vm.u32(ZERO_PAGE + 0x218) == 20 * MIB

    with pytest.raises(BootError, match="does not fit"):
        boot(vm, make_bzimage(), write("larger", bytes(2 * MIB - 4095)))


def test_advice_on_memory_is_one_figure_that_works(
    make_vm: Any, make_bzimage: Any, write: Any
) -> None:
    # The kernel's memory ends at 20 MiB, the initrd is 2 MiB and unpacks to 6.
    initrd = write("initrd", b"\x1f\x8b" + bytes(2 * MIB - 6) + (6 * MIB).to_bytes(4, "little"))
    for size in (16, 20, 21):  # no room for the kernel, then none for the initrd
        with pytest.raises(BootError) as error:
            boot(make_vm(size * MIB), make_bzimage(), initrd)
        assert "32M" in error.value.mend
    boot(make_vm(32 * MIB), make_bzimage(), initrd)


def test_memory_that_is_taken_but_hardly_enough_is_warned_of(
    make_vm: Any, make_bzimage: Any, write: Any, caplog: Any
) -> None:
    # As above, then without the size of what is packed, then not packed.
    sized = write("sized", b"\x1f\x8b" + bytes(2 * MIB - 6) + (6 * MIB).to_bytes(4, "little"))
    strange = write("strange", b"\x1f\x8b" + b"\xff" * (2 * MIB - 2))
    other = write("other", b"\xfd7zXZ\0" + bytes(2 * MIB - 6))
    plain = write("plain", b"070701" + bytes(4 * MIB - 6))
    boot(make_vm(31 * MIB), make_bzimage(), sized)
    assert "sized: unpacks to 6 MiB" in caplog.text
    assert caplog.text.rstrip().endswith("give the machine 32M")
    caplog.clear()
    boot(make_vm(31 * MIB), make_bzimage(), plain)
    assert "plain: unpacks to 4 MiB" in caplog.text
    caplog.clear()
    boot(make_vm(32 * MIB), make_bzimage(), sized)
    boot(make_vm(32 * MIB), make_bzimage(), plain)
    boot(make_vm(24 * MIB), make_bzimage(), strange)
    boot(make_vm(24 * MIB), make_bzimage(), other)
    boot(make_vm(24 * MIB), make_bzimage())
    assert caplog.text == ""


def test_initrd_larger_than_any_memory_says_so(
    make_vm: Any, make_bzimage: Any, tmp_path: Path
) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 << 30)

    with pytest.raises(BootError, match="any memory size"):
        boot(make_vm(64 * MIB), make_bzimage(), path)


def test_unaligned_preferred_address_is_rounded_up(make_vm: Any, make_bzimage: Any) -> None:
    regs = boot(make_vm(64 * MIB), make_bzimage(pref_address=17 * MIB))

    assert regs["rip"] == 18 * MIB + 0x200


def test_kernel_that_cannot_move_lies_where_it_asks(make_vm: Any, make_bzimage: Any) -> None:
    regs = boot(make_vm(64 * MIB), make_bzimage(pref_address=17 * MIB, relocatable=0))

    assert regs["rip"] == 17 * MIB + 0x200


def test_longest_command_line_is_taken_and_one_byte_more_is_not(
    make_vm: Any, make_bzimage: Any
) -> None:
    vm = make_vm(64 * MIB)
    boot(vm, make_bzimage(cmdline_size=255), cmdline="x" * 255)
    assert vm.text(vm.u32(ZERO_PAGE + 0x228)) == b"x" * 255

    with pytest.raises(BootError, match="256 bytes long, this kernel takes 255"):
        boot(vm, make_bzimage(cmdline_size=255), cmdline="x" * 256)


def test_command_line_limit_never_exceeds_its_place(make_vm: Any, make_bzimage: Any) -> None:
    with pytest.raises(BootError, match="this kernel takes 65535"):
        boot(make_vm(64 * MIB), make_bzimage(cmdline_size=0xFFFF_FFFF), cmdline="x" * 70_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0x1FF}, "boot protocol 1.255, which is too old"),
        ({"version": 0x201}, "of boot protocol 2.01, which starts by a BIOS alone"),
        ({"loadflags": 0}, "that lies below 1 MiB, which starts by a BIOS alone"),
        ({"alignment": 0}, "alignment"),
        ({"alignment": 3 * MIB}, "alignment"),
        ({"pref_address": 0x7000, "relocatable": 0}, "no place"),
        ({"pref_address": 1 << 63}, "no place"),
        ({"init_size": 0xFFFF_FFFF}, "no place"),
        ({"init_size": 100 * MIB}, "give it 120M"),
    ],
)
def test_kernel_that_cannot_start_is_refused_with_its_cause(
    make_vm: Any, make_bzimage: Any, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BootError, match=message) as error:
        boot(make_vm(64 * MIB), make_bzimage(**change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0x206, 0x207, 0x210, 0x263, 0x3FF, 0x400, 0x1000])
def test_truncated_kernel_is_refused(make_vm: Any, make_bzimage: Any, keep: int) -> None:
    with pytest.raises(BootError, match="cut short"):
        boot(make_vm(64 * MIB), make_bzimage()[:keep])


@given(st.binary(max_size=2048), st.integers(0, 2048))
def test_damaged_kernels_boot_or_are_refused(
    make_vm: Any, make_bzimage: Any, damage: bytes, at: int
) -> None:
    image = make_bzimage()
    damaged = (image[:at] + damage + image[at + len(damage) :])[: len(image)]
    vm = make_vm(24 * MIB)
    try:
        entry = boot(vm, damaged)["rip"]
    except BootError as error:
        entry, message = None, str(error)
    else:
        message = ""
    assert "\n" not in message
    assert entry is None or MIB <= entry < 24 * MIB


@given(
    st.fixed_dictionaries(
        {
            "version": st.integers(0x20B, 0xFFFF),
            "alignment": st.integers(0, 0xFFFF_FFFF) | st.sampled_from([1 << i for i in range(32)]),
            "pref_address": st.integers(0, (1 << 64) - 1) | st.integers(0, 40 * MIB),
            "init_size": st.integers(0, 0xFFFF_FFFF) | st.integers(0, 40 * MIB),
            "initrd_addr_max": st.integers(0, 0xFFFF_FFFF),
            "cmdline_size": st.integers(0, 0xFFFF_FFFF),
            # With a 64-bit entry, at which all that is accepted begins.
            "xloadflags": st.integers(0, 0xFFFF).map(lambda flags: flags | 1),
            "relocatable": st.integers(0, 255),
        }
    )
)
def test_accepted_headers_keep_what_they_promise(make_bzimage: Any, fields: dict[str, Any]) -> None:
    image = make_bzimage(**fields)
    source = source_of(image)
    try:
        header = parse_setup_header(source)
    except BootError:
        assume(False)
    assert header.load_address >= MIB
    assert header.memory_end <= 0xC000_0000
    assert header.load_address >= header.pref_address
    if header.relocatable:
        assert header.load_address % header.alignment == 0


def test_initrd_of_several_parts_lies_behind_each_other(
    make_vm: Any, make_bzimage: Any, write: Any
) -> None:
    vm = make_vm(32 * MIB)
    parts = write("one", b"first"), write("two", b"second")
    load_kernel(vm, write("vmlinuz", make_bzimage()), ",".join(map(str, parts)), "", 0)
    at, size = vm.u32(0x7218), vm.u32(0x721C)
    assert bytes(vm.memory[at : at + size]) == b"first\0\0\0second"


def test_file_whose_name_has_a_comma_is_one(make_vm: Any, make_bzimage: Any, write: Any) -> None:
    vm = make_vm(32 * MIB)
    load_kernel(vm, write("vmlinuz", make_bzimage()), write("a,b c", b"whole"), "", 0)
    at, size = vm.u32(0x7218), vm.u32(0x721C)
    assert bytes(vm.memory[at : at + size]) == b"whole"
