"""Registers and memory of a machine, looked at and changed from Python, on both engines."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch import GuestMemoryError, Machine, _native
from tetrarch.testing import pvh_kernel

# Says what is in memory at 0x10_0080 when EBX is set: wait: test ebx, ebx ; jz wait ;
# mov al, [0x100080] ; mov edx, 0x3f8 ; out dx, al ; jmp $
SAY_CELL = bytes.fromhex("85db 74fc a080001000 baf8030000 ee ebfe").ljust(0x80, b"\0") + b"?"
CELL = 0x10_0080
START = 0x10_0000


@pytest.fixture(params=["bt", "kvm"])
def vm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    name: str = request.param
    reason = _native.engine_available(name)
    if reason is not None:
        pytest.skip("; ".join(reason))
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(SAY_CELL))
    with Machine(kernel=kernel, engine=name, memory="16M") as vm:  # type: ignore[arg-type]
        vm.load()
        vm.vcpus[0].regs.rbx = 0
        vm.start()
        yield vm


def test_register_is_an_attribute_that_is_read_and_set(vm: Machine) -> None:
    vcpu = vm.vcpus[0]
    assert START <= vcpu.regs.rip < START + 4
    vcpu.regs.rsi = 0x1234_5678_9ABC
    assert vcpu.regs.rsi == vcpu.regs["rsi"] == dict(vcpu.regs)["rsi"] == 0x1234_5678_9ABC
    vcpu.regs.rsi += 1
    assert vcpu.regs.rsi == 0x1234_5678_9ABD
    with vm.paused():
        regs = vcpu.regs
        regs.update(rdi=7, r8=8)
        regs["r9"] = 9
        assert (vcpu.regs.rdi, vcpu.regs.r8, vcpu.regs.r9) == (7, 8, 9) == (regs.rdi, regs.r8, 9)
    assert vcpu.regs.cr0 & 1
    assert vcpu.regs.cs_attr & 0x10
    assert {"rip", "cr3", "fs_base"} <= set(dir(vcpu.regs))


def test_register_that_is_none_is_an_attribute_error(vm: Machine) -> None:
    regs = vm.vcpus[0].regs
    with pytest.raises(AttributeError, match="no register 'eip'"):
        _ = regs.eip
    with pytest.raises(AttributeError, match="no register 'eip'"):
        regs.eip = 0
    with pytest.raises(KeyError):
        _ = regs["eip"]
    assert copy.copy(regs)["rip"] == regs.rip


def test_vector_registers_hold_what_they_are_given(vm: Machine) -> None:
    vcpu = vm.vcpus[0]
    vcpu.fpu.xmm3 = value = 0x0123_4567_89AB_CDEF_FEDC_BA98_7654_3210
    vcpu.fpu.st1 = 0x3FFF_8000_0000_0000_0000
    assert vcpu.fpu.xmm3 == value
    assert vcpu.fpu.st1 == 0x3FFF_8000_0000_0000_0000
    assert vcpu.fpu.mxcsr == 0x1F80
    assert vcpu.fpu.fcw == 0x37F
    with pytest.raises(OverflowError, match="does not fit xmm3"):
        vcpu.fpu.xmm3 = 1 << 128
    with pytest.raises(AttributeError, match="register 'zmm40'"):
        _ = vcpu.fpu.zmm40


def test_upper_half_of_a_ymm_register_stays_beside_the_lower(vm: Machine) -> None:
    fpu = vm.vcpus[0].fpu
    try:
        fpu.ymm2 = 5 << 128 | 6
    except (AttributeError, _native.EngineError):
        if vm.engine != "kvm":
            raise
        pytest.skip("the engine's CPU has no AVX here")
    assert vm.vcpus[0].fpu.ymm2 == 5 << 128 | 6
    assert vm.vcpus[0].fpu.xmm2 == 6


def test_msr_is_by_number(vm: Machine) -> None:
    msr = vm.vcpus[0].msr
    msr[0xC000_0102] = 0xFFFF_8880_0000_0000  # IA32_KERNEL_GS_BASE
    assert msr[0xC000_0102] == 0xFFFF_8880_0000_0000
    with pytest.raises(KeyError, match="no MSR 0x12345"):
        _ = msr[0x12345]
    with pytest.raises(KeyError, match="refuses"):
        msr[0xC000_0102] = 1 << 63  # no canonical address


def test_view_of_memory_shows_what_the_machine_has_and_lets_nobody_write(vm: Machine) -> None:
    view = vm.memory[CELL : CELL + 0x1000]
    assert (view.nbytes, view.readonly) == (0x1000, True)
    assert bytes(view[:2]) == b"?\0"
    vm.write_memory(CELL + 1, b"!")
    assert view[1] == ord("!") == vm.memory[CELL + 1]
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 0
    assert sum(map(len, vm.memory.ranges)) == 16 << 20


def test_what_is_written_the_guest_reads_code_too(vm: Machine) -> None:
    vm.memory[CELL] = ord("a")
    vm.memory[CELL + 1 : CELL + 3] = memoryview(b"bc")
    # The code has run many times: mov al, [CELL + 1] instead.
    vm.memory[START + 5 : START + 9] = (CELL + 1).to_bytes(4, "little")
    vm.vcpus[0].regs.rbx = 1
    assert vm.console.expect("b") == "b"


def test_view_outlives_the_machine(vm: Machine) -> None:
    view = vm.memory[CELL : CELL + 1]
    vm.kill()
    assert bytes(view) == b"?"


def test_range_that_is_no_ram_is_an_error(vm: Machine) -> None:
    for bad in (slice(0xFEE0_0000, 0xFEE0_0010), slice((16 << 20) - 1, (16 << 20) + 1)):
        with pytest.raises(GuestMemoryError):
            _ = vm.memory[bad]
        with pytest.raises(GuestMemoryError):
            vm.memory[bad] = bytes(bad.stop - bad.start)
    for bad in (slice(None, 5), slice(5, None), slice(0, 8, 2), slice(-1, 5), slice(8, 4)):
        with pytest.raises(ValueError, match="range"):
            _ = vm.memory[bad]
    with pytest.raises(ValueError, match="3 bytes do not fit a range of 2"):
        vm.memory[0:2] = b"abc"


def test_linear_addresses_are_those_of_the_page_tables(vm: Machine) -> None:
    vcpu = vm.vcpus[0]
    assert vcpu.linear[CELL] == ord("?")  # paging is off
    vcpu.linear[CELL - 2 : CELL + 2] = b"ab!\0"
    assert vm.memory[CELL] == ord("!")
    assert vcpu.linear[START - 1 : START + 2] == b"\0" + SAY_CELL[:2]
    if vm.engine == "kvm":
        return  # KVM walks the tables, and only one with hardware behind it: tests/gdb/drive_kvm.py
    # A directory of one entry: 4 MiB at 0xC000_0000 are those at 0.
    vm.memory[0x5000 + 4 * 0x300 : 0x5004 + 4 * 0x300] = (0x83).to_bytes(4, "little")
    vm.memory[0x5000:0x5004] = (0x83).to_bytes(4, "little")
    with vm.paused():
        regs = vcpu.regs
        regs.update(cr3=0x5000, cr4=regs.cr4 | 0x10, cr0=regs.cr0 | 0x8000_0000)
        assert vcpu.linear.physical(0xC010_0080) == CELL
        assert vcpu.linear[0xC010_0080] == ord("!")
        assert vcpu.linear.text(0xC010_007E) == "ab!"
        assert vcpu.linear.physical(0x4000_0000) is None
        with pytest.raises(GuestMemoryError, match="0x40000000 is not mapped"):
            _ = vcpu.linear[0x4000_0000]
        vm.kill()


def test_machine_that_ended_shows_its_last_registers(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.POWER_OFF))
    vm = Machine(kernel=kernel, engine="bt", memory="16M")
    vm.run(30)
    assert vm.vcpus[0].regs.rdx == 0x604
    assert bytes(vm.memory[START : START + 5]) == guests.POWER_OFF[:5]
