"""Dumps of guest memory, as drgn, gdb and readers of ELF see them."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient
from tests.control.conftest import Make
from tests.control.test_session import event, session, started
from tests.gdb.debuggee import require_gdb

from tetrarch import Machine
from tetrarch.aio.bridge import on_thread
from tetrarch.images import CachedGuest
from tetrarch.machine.core_dump import core_ranges, write_core
from tetrarch.machine.page_map import MappedRange

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
    vm.pause()
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


class Memory:
    """A machine's memory of one page."""

    ram = ((0, 4096),)

    def read_memory(self, address: int, length: int) -> bytes:
        return b"a page of the guest's".ljust(4096, b".")[address : address + length]


def test_core_may_have_more_segments_than_the_header_counts(make: Make, tmp_path: Path) -> None:
    registers = make().vcpus[0].regs
    linear = [MappedRange(0x1_0000_0000 + page * 8192, 0, 4096, 0) for page in range(70_000)]
    with (tmp_path / "core").open("wb") as file:
        write_core(file, Memory(), [registers], Memory.ram, linear)  # type: ignore[arg-type]
    command = ["readelf", "--wide", "--file-header", "--segments", str(tmp_path / "core")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert done.stderr == ""
    assert re.search(r"Number of program headers: +65535 \(70001\)", done.stdout)
    loads = re.findall(r"^  LOAD +0x[0-9a-f]+ 0x[0-9a-f]{13}000 0x0", done.stdout, re.MULTILINE)
    assert len(loads) == 70_000


def test_dump_in_the_background_tells_how_far_it_is(make: Make, socket_path: Path) -> None:
    started(make)
    reader, writer = os.pipe()

    async def talk(client: QMPClient) -> None:
        assert await client.execute("query-dump") == {"status": "none", "completed": 0, "total": 0}
        client.send_fd_scm(writer)
        os.close(writer)
        await client.execute("getfd", {"fdname": "core"})
        arguments = {"protocol": "fd:core", "paging": False, "detach": True}
        await client.execute("dump-guest-memory", arguments)
        await event(client, "STOP")
        # Nobody reads: it cannot end.
        dump: Any = await client.execute("query-dump")
        assert (dump["status"], dump["total"]) == ("active", 16 << 20)
        for command in ("cont", "dump-guest-memory"):
            given = {"protocol": "file:/x", "paging": False} if command != "cont" else {}
            with pytest.raises(ExecuteError, match="There is a dump in process"):
                await client.execute(command, given)
        with open(reader, "rb") as core:
            data = await on_thread(core.read)
        assert data[:4] == b"\x7fELF"
        assert len(data) > 16 << 20
        await event(client, "RESUME")
        result = {"status": "completed", "completed": 16 << 20, "total": 16 << 20}
        assert await event(client, "DUMP_COMPLETED") == {"result": result}
        assert await client.execute("query-dump") == result

    session(socket_path, talk)


def test_dump_that_nobody_takes_has_failed_and_the_machine_goes_on(
    make: Make, socket_path: Path
) -> None:
    vm = started(make)
    reader, writer = os.pipe()
    os.close(reader)

    async def talk(client: QMPClient) -> None:
        client.send_fd_scm(writer)
        os.close(writer)
        await client.execute("getfd", {"fdname": "core"})
        arguments = {"protocol": "fd:core", "paging": False, "detach": True}
        await client.execute("dump-guest-memory", arguments)
        for name in ("STOP", "RESUME"):
            await event(client, name)
        told = await event(client, "DUMP_COMPLETED")
        assert told["result"]["status"] == "failed"
        assert "Broken pipe" in told["error"]

    session(socket_path, talk)
    assert vm.running


def test_quit_ends_a_dump(make: Make, socket_path: Path) -> None:
    vm = started(make)
    reader, writer = os.pipe()

    async def talk(client: QMPClient) -> None:
        client.send_fd_scm(writer)
        os.close(writer)
        await client.execute("getfd", {"fdname": "core"})
        arguments = {"protocol": "fd:core", "paging": False, "detach": True}
        await client.execute("dump-guest-memory", arguments)
        await event(client, "STOP")
        await client.execute("quit")
        await event(client, "SHUTDOWN")

    session(socket_path, talk)
    vm.wait(LIMIT_S)
    with open(reader, "rb") as core:
        assert len(core.read()) < 16 << 20


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
        vm.dump_core(tmp_path / "paged", paging=True)
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
    # What gdb, which knows nothing of physical addresses, reads where the kernel has it.
    names = dump.symbol("init_uts_ns").address
    look = ("-nx", "-batch", "-ex", f"x/s {names}", "-ex", "x/i $pc")
    done = subprocess.run(
        [require_gdb(), *look, "-c", tmp_path / "paged"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert '"Linux"' in done.stdout, done.stdout + done.stderr
    assert re.search(r"^=> 0x[0-9a-f]+:\t\w+", done.stdout, re.MULTILINE), done.stdout
