"""Stock gdb at a guest of engine bt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.gdb.conftest import Make
from tests.gdb.debuggee import attempt, gdb_script

from tetrarch import Machine
from tetrarch.machine.status import StopReason

# What the guest is to end with, which it can do by itself alone.
FINISH = "set var verdict = 21\nset var finish = 1\ndetach"
END_LIMIT_S = 60


def ends_with(machine: Machine, value: int) -> bool:
    status = machine.wait(END_LIMIT_S)
    return status.reason is StopReason.DEBUG_EXIT and status.value == value


def started(debuggee: Make) -> tuple[Machine, str]:
    machine = debuggee()
    machine.start()
    return machine, machine.serve_gdb().address


def test_breakpoint_by_symbol_steps_and_backtrace(debuggee: Make, kernel: Path) -> None:
    machine, address = started(debuggee)
    said = gdb_script(
        f"""
        break add
        continue
        backtrace
        delete
        stepi
        printf "step: %d\\n", $rip - (long)&add
        next
        next
        finish
        info line
        {FINISH}
        """,
        address,
        kernel,
    )
    assert re.search(r"Breakpoint 1, add \(a=\d+, b=1\)", said), said
    assert re.search(r"#1 .* in work \(amount=1\)", said), said
    assert re.search(r"#2 .* in main \(\)", said), said
    assert "Value returned is" in said, said
    assert ends_with(machine, 21)


def test_breakpoint_is_passed_again_and_again(debuggee: Make, kernel: Path) -> None:
    machine, address = started(debuggee)
    said = gdb_script(
        f"""
        break work
        continue
        set var $first = counter
        continue
        continue
        printf "passed %d times\\n", counter - $first
        disassemble /r work,+1
        x/1xb work
        {FINISH}
        """,
        address,
        kernel,
    )
    assert "passed 2 times" in said, said
    # What is planted is not seen.
    assert re.search(r"<work>:\s+0x55\n", said), said
    assert ends_with(machine, 21)


def test_hardware_breakpoints_and_watchpoints(debuggee: Make, kernel: Path) -> None:
    machine, address = started(debuggee)
    said = gdb_script(
        f"""
        hbreak add
        continue
        printf "at add: %d\\n", $rip == (long)&add + 12
        delete
        watch counter
        continue
        delete
        rwatch half
        continue
        delete
        awatch counter
        continue
        hbreak work
        hbreak add
        hbreak main
        delete
        {FINISH}
        """,
        address,
        kernel,
    )
    assert re.search(r"Breakpoint 1, add \(", said), said
    old, new = map(
        int,
        re.findall(r"Hardware watchpoint 2: counter\s+Old value = (\d+)\s+New value = (\d+)", said)[
            0
        ],
    )
    assert new == old + 1, said
    assert re.search(r"Hardware read watchpoint 3: half\s+Value = 0.5", said), said
    assert re.search(r"Hardware access \(read/write\) watchpoint 4: counter", said), said
    assert ends_with(machine, 21)


def test_fifth_hardware_breakpoint_is_refused(debuggee: Make, kernel: Path) -> None:
    machine, address = started(debuggee)
    said = gdb_script(
        f"""
        hbreak *1
        hbreak *2
        hbreak *3
        hbreak *4
        hbreak *5
        {attempt("continue")}
        delete
        {FINISH}
        """,
        address,
        kernel,
    )
    assert "Cannot insert hardware breakpoint 5." in said, said
    assert "refused: Command aborted." in said, said
    assert ends_with(machine, 21)


def test_registers_of_every_kind_are_read_and_set(debuggee: Make, kernel: Path) -> None:
    machine, address = started(debuggee)
    said = gdb_script(
        f"""
        break add
        continue
        delete
        set var $rbx = 0x1122334455667788
        set var $xmm3.v2_int64[1] = 0x99aa
        set var $st2 = 1.5
        set var $fs_base = 0x7000
        printf "rbx %lx xmm3 %lx st2 %.2f fs %lx\\n", $rbx, $xmm3.v2_int64[1], $st2, $fs_base
        stepi
        printf "rbx %lx xmm3 %lx st2 %.2f fs %lx\\n", $rbx, $xmm3.v2_int64[1], $st2, $fs_base
        info registers cr0 cr3 cr4 efer eflags cs gs_base k_gs_base mxcsr
        info registers ymm0
        info float
        {FINISH}
        """,
        address,
        kernel,
    )
    line = "rbx 1122334455667788 xmm3 99aa st2 1.50 fs 7000\n"
    assert said.count(line) == 2, said
    assert re.search(r"cr0 .*\[ PE MP ET PG \]", said), said
    assert re.search(r"efer .*\[ LME LMA \]", said), said
    assert re.search(r"cs +0x8", said), said
    assert re.search(r"Control Word: +0x037f", said), said
    assert ends_with(machine, 21)


def test_memory_is_that_of_linear_or_of_physical_addresses(debuggee: Make, kernel: Path) -> None:
    machine, address = started(debuggee)
    said = gdb_script(
        f"""
        break add
        continue
        printf "second mapping: %d\\n", *(long *)((long)&verdict + 0x40000000)
        set var *(long *)((long)&verdict + 0x40000000) = 8
        printf "verdict: %d\\n", verdict
        maintenance packet Qqemu.PhyMemMode:1
        maintenance packet qqemu.PhyMemMode
        {attempt("x/1xb (long)&add + 0x40000000")}
        maintenance packet Qqemu.PhyMemMode:0
        printf "again: %d\\n", *(long *)((long)&verdict + 0x40000000)
        {FINISH}
        """,
        address,
        kernel,
    )
    assert "second mapping: 7" in said, said
    assert "verdict: 8" in said, said
    assert 'received: "1"' in said, said
    assert "refused: Cannot access memory" in said, said
    assert "again: 8" in said, said
    assert ends_with(machine, 21)


def test_step_passes_over_interrupts_unless_it_is_told_not_to(debuggee: Make, kernel: Path) -> None:
    machine, address = started(debuggee)
    # A step takes far less than the millisecond between two interrupts, many do not.
    steps = (
        "python places = [gdb.execute('stepi', to_string=True) and "
        "gdb.execute('info symbol $rip', to_string=True) for _ in range(600)]; "
        "print('in handler:', sum('on_timer' in place for place in places))"
    )
    said = gdb_script(
        f"""
        break add
        continue
        delete
        maintenance packet qqemu.sstepbits
        maintenance packet qqemu.sstep
        {steps}
        maintenance packet Qqemu.sstep=1
        tbreak on_timer
        continue
        printf "handled\\n"
        {FINISH}
        """,
        address,
        kernel,
    )
    assert 'received: "ENABLE=1,NOIRQ=2"' in said, said
    assert 'received: "0x3"' in said, said
    assert "in handler: 0\n" in said, said
    assert "Temporary breakpoint 2" in said, said
    assert ends_with(machine, 21)


def test_guest_s_own_int3_goes_to_the_guest(debuggee: Make, kernel: Path) -> None:
    machine, address = started(debuggee)
    said = gdb_script(
        f"""
        break add
        continue
        set var $before = own_breakpoints
        continue
        printf "own: %d\\n", own_breakpoints - $before
        {FINISH}
        """,
        address,
        kernel,
    )
    assert "own: 1\n" in said, said
    assert ends_with(machine, 21)


def test_several_clients_come_one_after_the_other(debuggee: Make, kernel: Path) -> None:
    machine, address = started(debuggee)
    for _ in range(3):
        # It hangs up without a detach, with a breakpoint set.
        said = gdb_script("break work\ncontinue\nprint counter\ndisconnect", address, kernel)
        assert "Breakpoint 1, work" in said, said
    gdb_script(FINISH, address, kernel)
    assert ends_with(machine, 21)


def test_machine_that_waits_begins_with_gdb(debuggee: Make, kernel: Path, tmp_path: Path) -> None:
    machine = debuggee(gdb=tmp_path / "gdb", gdb_wait=True)
    machine.start()
    address = str(tmp_path / "gdb")
    said = gdb_script(
        f"""
        printf "first: %d\\n", $rip == (long)&entry
        info threads
        hbreak main
        continue
        {FINISH}
        """,
        address,
        kernel,
    )
    assert "first: 1\n" in said, said
    assert "vCPU 0" in said, said
    assert re.search(r"Breakpoint 1, main \(\)", said), said
    assert ends_with(machine, 21)


def test_interrupt_stops_a_guest_that_runs(debuggee: Make, kernel: Path) -> None:
    machine, address = started(debuggee)
    said = gdb_script(
        f"""
        python import threading
        python interrupt = lambda: gdb.post_event(lambda: gdb.execute("interrupt"))
        python threading.Timer(0.3, interrupt).start()
        continue
        info registers rip
        {FINISH}
        """,
        address,
        kernel,
    )
    assert "SIGINT" in said, said
    assert ends_with(machine, 21)


def test_gdb_hears_of_the_end(debuggee: Make, kernel: Path) -> None:
    machine, address = started(debuggee)
    said = gdb_script("set var verdict = 3\nset var finish = 1\ncontinue", address, kernel)
    assert re.search(r"exited with code 07\]", said), said
    assert ends_with(machine, 3)


@pytest.mark.parametrize("how", ["kill", "monitor quit"])
def test_gdb_ends_the_machine(debuggee: Make, kernel: Path, how: str) -> None:
    machine, address = started(debuggee)
    gdb_script(how, address, kernel)
    assert machine.wait(END_LIMIT_S).reason is StopReason.STOPPED


def test_monitor(debuggee: Make, kernel: Path) -> None:
    machine, address = started(debuggee)
    said = gdb_script(
        f"""
        monitor help
        monitor info registers
        monitor info cpus
        monitor info status
        monitor nonsense
        break work
        continue
        delete
        monitor reset
        maintenance flush register-cache
        printf "first: %d\\n", $rip == (long)&entry
        hbreak work
        continue
        {FINISH}
        """,
        address,
        kernel,
    )
    for answer in ("system_reset", "RIP=", "* CPU #0", "stopped by gdb", "unknown command"):
        assert answer in said, said
    assert "first: 1\n" in said, said
    assert "Breakpoint 2, work" in said, said
    assert machine.resets == 1
    assert ends_with(machine, 21)


def test_unix_socket(debuggee: Make, kernel: Path, tmp_path: Path) -> None:
    machine = debuggee()
    machine.start()
    socket = tmp_path / "gdb.sock"
    server = machine.serve_gdb(socket)
    assert server.address == str(socket)
    assert socket.stat().st_mode & 0o777 == 0o600
    gdb_script(FINISH, str(socket), kernel)
    assert ends_with(machine, 21)
    assert not socket.exists()
