"""Dumps of guest memory, as drgn and readers of ELF see them."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tests.control.conftest import Make

from tetrarch import Machine
from tetrarch.images import CachedGuest
from tetrarch.machine.core_dump import core_ranges

LIMIT_S = 60
READ_LIVE = """
import sys, drgn
prog = drgn.Program()
prog.set_qemu_qmp(sys.argv[1])
sys.stdout.write(prog.read(0x90000, 18, physical=True).decode())
"""


def test_core_has_registers_and_memory_where_they_belong(make: Make, tmp_path: Path) -> None:
    vm = make()
    vm.start()
    vm.console.expect("up", LIMIT_S)
    vm.hold()
    vm.write_memory(0x20_0000, b"found again")
    vm.dump_core(tmp_path / "core")
    data = (tmp_path / "core").read_bytes()
    kind, machine = struct.unpack_from("<HH", data, 16)
    assert (data[:5], kind, machine) == (b"\x7fELF\x02", 4, 62), "a core file of x86-64"
    notes, memory = (struct.unpack_from("<IIQQQQQQ", data, 64 + 56 * index) for index in (0, 1))
    assert (notes[0], memory[0]) == (4, 1)
    offset, address, size = memory[2], memory[4], memory[5]
    assert (address, size) == (0, 16 << 20)
    assert data[offset + 0x20_0000 :][:11] == b"found again"
    assert len(data) == offset + size
    # The descriptor of the first note begins behind its head and "CORE"; pr_reg is 112 bytes
    # into it, and RIP the 17th register there.
    (rip,) = struct.unpack_from("<Q", data, notes[2] + 20 + 112 + 8 * 16)
    assert rip == vm.vcpus[0].regs["rip"]


def test_range_of_a_core_is_what_of_it_is_ram() -> None:
    ram = [(0, 0x1000_0000), (1 << 32, 0x1000)]
    assert core_ranges(ram) == ram
    assert core_ranges(ram, 0x800_0000, 1 << 32) == [(0x800_0000, 0x800_0000), (1 << 32, 0x1000)]
    with pytest.raises(Exception, match="no RAM"):
        core_ranges(ram, 0x2000_0000, 4096)


def test_drgn_lists_the_tasks_of_a_dump_and_reads_a_running_machine(
    debian_guest: CachedGuest, socket_path: Path, tmp_path: Path
) -> None:
    drgn = pytest.importorskip("drgn", reason="drgn has no wheel for this Python")
    from tests.control import btf

    wanted = {"init", "kthreadd", "sh", "sleep"}
    with Machine(engine="bt", memory="256M", control=socket_path) as vm:
        vm.start()
        vm.console.expect("# ", LIMIT_S)
        # It is a shell until it has become another program.
        vm.console.send("sleep 1000 & until grep -q sleep /proc/$!/comm; do :; done; echo up''on\n")
        vm.console.expect("upon\r\n", LIMIT_S)
        vm.dump_core(tmp_path / "core")
        vm.write_memory(0x9_0000, b"to be read by drgn")  # in no use after the boot
        # In a process of its own: it keeps the interpreter while it waits for an answer.
        done = subprocess.run(
            [sys.executable, "-c", READ_LIVE, socket_path],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.stdout == "to be read by drgn", done.stderr
        assert vm.running
    dump = drgn.Program()
    dump.set_core_dump(str(tmp_path / "core"))
    btf.add_types(dump)
    assert wanted <= btf.tasks(dump)
