"""The ACPI tables: structure by our own reading, meaning by Intel's disassembler."""

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrarch.boot import aml, build_acpi
from tetrarch.errors import ConfigError

RAM = [(0, 0xC000_0000), (1 << 32, 1 << 30)]


def by_signature(vcpus: int, there: Sequence[int] | None = None) -> dict[bytes, tuple[int, bytes]]:
    tables = build_acpi(range(vcpus), RAM, there=there)[1]
    return {data[:4]: (address, data) for address, data in tables}


def test_rsdp_has_both_checksums_and_points_to_the_xsdt() -> None:
    address, tables = build_acpi([0], RAM)
    rsdp = dict(tables)[address]

    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) % 256 == 0
    assert sum(rsdp) % 256 == 0
    assert len(rsdp) == 36
    (xsdt,) = struct.unpack_from("<Q", rsdp, 24)
    assert dict(tables)[xsdt][:4] == b"XSDT"


@pytest.mark.parametrize(
    ("vcpus", "there"), [(1, None), (2, None), (64, None), (300, None), (4000, None), (255, [0])]
)
def test_tables_are_sound_and_apart(vcpus: int, there: Sequence[int] | None) -> None:
    _, tables = build_acpi(range(vcpus), RAM, there=there)
    end = 0xE_0000
    for address, data in sorted(tables):
        assert address >= end
        end = address + len(data)
        if data[:4] in (b"FACS", b"RSD "):
            continue
        assert sum(data) % 256 == 0
        assert int.from_bytes(data[4:8], "little") == len(data)
    assert end <= 0x10_0000


def test_xsdt_and_fadt_point_to_tables() -> None:
    tables = by_signature(1)
    xsdt = tables[b"XSDT"][1]
    fadt = tables[b"FACP"][1]

    places = tuple(tables[name][0] for name in (b"FACP", b"APIC", b"MCFG"))
    assert struct.unpack_from("<3Q", xsdt, 36) == places
    assert struct.unpack_from("<II", fadt, 36) == (tables[b"FACS"][0], tables[b"DSDT"][0])
    assert tables[b"FACS"][0] % 64 == 0


def test_timers_are_told_where_there_are_some() -> None:
    _, tables = build_acpi([0], RAM, timers=True)
    (hpet,) = [data for _, data in tables if data[:4] == b"HPET"]
    block, space, width = struct.unpack_from("<IBB", hpet, 36)
    assert (block >> 16, block & 0xFF, space, width) == (0x8086, 1, 0, 64)
    assert struct.unpack_from("<Q", hpet, 44) == (0xFED0_0000,)
    assert len(hpet) == 56
    assert b"HPET" not in by_signature(1)


def madt_entries(vcpus: int, there: Sequence[int] | None = None) -> list[bytes]:
    madt = by_signature(vcpus, there)[b"APIC"][1]
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert at == len(madt)
    return entries


def test_madt_lists_processors_and_the_interrupt_wiring() -> None:
    entries = madt_entries(2)

    assert entries[:2] == [bytes([0, 8, i, i, 1, 0, 0, 0]) for i in range(2)]
    assert struct.unpack("<BBBBII", entries[2]) == (1, 12, 0, 0, 0xFEC0_0000, 0)
    assert struct.unpack("<BBBBIH", entries[3]) == (2, 10, 0, 0, 2, 0)
    assert struct.unpack("<BBBBIH", entries[4]) == (2, 10, 0, 9, 9, 0xD)


def test_processors_from_255_on_are_x2apic_entries() -> None:
    entries = madt_entries(300)

    x2apic = [struct.unpack("<BBHIII", e) for e in entries if e[0] == 9]
    assert len([e for e in entries if e[0] == 0]) == 255
    assert [e[3] for e in x2apic] == list(range(255, 300))


def test_processors_that_can_come_are_told_apart() -> None:
    enabled, online_capable = 1, 2
    assert [entry[4] for entry in madt_entries(4, [0, 2])[:4]] == [
        *(enabled, online_capable),
        *(enabled, online_capable),
    ]
    dsdt = by_signature(4, [0, 2])[b"DSDT"][1]
    # The first is a processor, too, but none that is ejected; each slot of the PCI bus is.
    assert dsdt.count(b"ACPI0007") == 4
    assert dsdt.count(b"_EJ0") - by_signature(4)[b"DSDT"][1].count(b"_EJ0") == 3
    assert b"ACPI0007" not in by_signature(4)[b"DSDT"][1]


@pytest.mark.parametrize("vcpus", [0, -1, 100_000])
def test_impossible_numbers_of_processors_are_refused(vcpus: int) -> None:
    with pytest.raises(ConfigError):
        build_acpi(range(vcpus), RAM)


@pytest.mark.parametrize(("vcpus", "there"), [(1, None), (300, None), (40, [0, 7])])
@pytest.mark.parametrize("signature", ["DSDT", "FACP", "APIC", "XSDT", "FACS", "MCFG"])
def test_disassembler_reads_the_tables_without_complaint(
    tmp_path: Path, signature: str, vcpus: int, there: Sequence[int] | None
) -> None:
    iasl = shutil.which("iasl")
    if iasl is None:
        pytest.skip("needs iasl (Debian: acpica-tools)")
    path = tmp_path / "table.dat"
    path.write_bytes(by_signature(vcpus, there)[signature.encode()][1])

    result = subprocess.run([iasl, "-d", path], capture_output=True, text=True, check=False)

    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "rror" not in output, output
    assert "arning" not in output, output


@pytest.mark.parametrize("there", [None, [0]])
def test_dsdt_survives_recompilation(tmp_path: Path, there: Sequence[int] | None) -> None:
    iasl = shutil.which("iasl")
    if iasl is None:
        pytest.skip("needs iasl (Debian: acpica-tools)")
    path = tmp_path / "dsdt.dat"
    dsdt = by_signature(3, there)[b"DSDT"][1]
    path.write_bytes(dsdt)

    subprocess.run([iasl, "-d", path], capture_output=True, check=True)
    # -oa: paths as they are written, or iasl shortens \\_S5 to _S5.
    subprocess.run([iasl, "-oa", tmp_path / "dsdt.dsl"], capture_output=True, check=True)

    assert (tmp_path / "dsdt.aml").read_bytes()[36:] == dsdt[36:]


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, b"\0"),
        (1, b"\1"),
        (2, b"\x0a\x02"),
        (256, b"\x0b\0\1"),
        (1 << 16, b"\x0c\0\0\1\0"),
        (1 << 32, b"\x0e\0\0\0\0\1\0\0\0"),
    ],
)
def test_aml_integers_take_the_shortest_form(value: int, encoded: bytes) -> None:
    assert aml.integer(value) == encoded


@given(st.integers(0, 5000))
def test_aml_length_counts_itself_and_the_body(size: int) -> None:
    encoded = aml.with_length(bytes(size))

    extra = encoded[0] >> 6
    length = encoded[0] & (0x3F if extra == 0 else 0xF)
    length |= int.from_bytes(encoded[1 : 1 + extra], "little") << 4
    assert length == len(encoded) == size + 1 + extra


def test_aml_eisa_id() -> None:
    assert aml.eisa_id("PNP0501") == b"\x0c\x41\xd0\x05\x01"
