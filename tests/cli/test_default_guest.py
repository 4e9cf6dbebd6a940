"""``tetrarch run`` without a kernel: Debian's cloud kernel to a shell, at a terminal."""

import os
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from tests.terminals import kill

from tetrarch import Machine
from tetrarch.images import CachedGuest

# A boot takes about two seconds on a free CPU; CI hosts are not free.
LIMIT_S = 90
PROMPT = "root@tetrarch:[^#]*# "


def boot(*options: str, **environment: str) -> "pexpect.spawn[str]":
    return pexpect.spawn(
        sys.executable,
        ["-m", "tetrarch", "run", "--engine", "bt", *options],
        encoding="utf-8",
        codec_errors="replace",
        timeout=LIMIT_S,
        env={**os.environ, **environment},
    )


@pytest.fixture
def shell(debian_guest: CachedGuest) -> Iterator["pexpect.spawn[str]"]:
    child = boot()
    child.expect(PROMPT)
    yield child
    kill(child)


def command(shell: "pexpect.spawn[str]", line: str) -> str:
    """Types a line; what the guest prints up to the next prompt."""
    shell.sendline(line)
    shell.expect_exact(line)
    shell.expect(PROMPT)
    return str(shell.before)


def end(shell: "pexpect.spawn[str]") -> int | None:
    shell.expect(pexpect.EOF)
    shell.wait()
    code: int | None = shell.exitstatus
    return code


def echoes(shell: "pexpect.spawn[str]") -> bool:
    # This end of the pseudo-terminal shows the attributes of the other.
    return bool(termios.tcgetattr(shell.child_fd)[3] & termios.ECHO)


def test_power_off_ends_with_0_and_gives_the_terminal_back(shell: "pexpect.spawn[str]") -> None:
    assert not echoes(shell)
    assert "42" in command(shell, "echo $((6 * 7))")
    shell.sendline("poweroff")
    # The terminal's attributes are gone with its last user: look before that.
    shell.expect("Power down")
    assert end(shell) == 0


def test_reboot_starts_it_again(shell: "pexpect.spawn[str]") -> None:
    assert "42" in command(shell, "echo $((6 * 7)) > /tmp/answer; cat /tmp/answer")
    shell.sendline("reboot")
    shell.expect("Restarting system")
    shell.expect(PROMPT)
    assert "No such file" in command(shell, "cat /tmp/answer")
    shell.sendline("poweroff")
    shell.expect("Power down")
    assert end(shell) == 0


def test_job_control(shell: "pexpect.spawn[str]") -> None:
    # Each job says when it has the terminal; its name is what it is when the key arrives, or was.
    shell.sendline("sh -c 'echo rea''dy; exec sleep 1000'")
    shell.expect_exact("ready\r\n")
    shell.sendcontrol("c")
    shell.expect(PROMPT)
    assert "130" in command(shell, "echo $?")
    shell.sendline("sh -c 'echo rea''dy; exec cat'")
    shell.expect_exact("ready\r\n")
    shell.sendcontrol("z")
    shell.expect("Stopped")
    shell.expect(PROMPT)
    assert "exec cat" in command(shell, "jobs")
    shell.sendline("fg")
    shell.expect_exact("exec cat")
    shell.send("typed\n\x04")
    shell.expect(r"typed\r\ntyped")
    shell.expect(PROMPT)


def test_kernel_modules_can_be_loaded(shell: "pexpect.spawn[str]") -> None:
    assert "bad" not in command(shell, "modprobe loop || echo b''ad")
    assert "loop" in command(shell, "lsmod | grep '^loop'")
    assert "No such" not in command(shell, "ls /dev/loop-control")


def test_long_paste_arrives_whole(shell: "pexpect.spawn[str]") -> None:
    text = "".join(f"line {number} of what was pasted at once\n" for number in range(200))
    command(shell, "stty -echo")
    shell.sendline("cat > /tmp/pasted")
    shell.send(text)
    shell.send("\x04")
    shell.expect(PROMPT)
    shell.sendline("wc -c < /tmp/pasted")
    shell.expect(rf"\b{len(text)}\b")


def test_leave_key(shell: "pexpect.spawn[str]") -> None:
    shell.send("\x1d")
    shell.expect("was stopped")
    assert end(shell) == 0


def test_idle_guest_leaves_the_cpu_alone(shell: "pexpect.spawn[str]") -> None:
    seconds = 5
    command(shell, "true")  # what the first prompt started has run
    shell.sendline(f"sleep {seconds}; echo aw''ake")
    shell.expect_exact("aw''ake\r\n")
    before = cpu_time(shell.pid)
    shell.expect_exact("awake\r\n")
    assert cpu_time(shell.pid) - before < 0.03 * seconds


def cpu_time(pid: int) -> float:
    """User and system time of all threads (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_cached_guest_needs_neither_apt_nor_network(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    child = boot(PATH=str(tmp_path), http_proxy="http://127.0.0.1:9", https_proxy="")
    child.expect(PROMPT)
    child.sendline("poweroff")
    assert end(child) == 0


def test_terminal_is_restored_at_every_end_of_the_guest(debian_guest: CachedGuest) -> None:
    # A shell between us and the program keeps the terminal open after its end.
    shell = pexpect.spawn("/bin/bash", ["--norc", "-i"], encoding="utf-8", timeout=LIMIT_S)
    show_echo = "stty -a | tr ' ;' '\\n\\n' | grep 'echo$'"
    program = f"{sys.executable} -m tetrarch run --engine bt"
    for options, typed, code in [("", "poweroff\n", 0), ("--timeout 3", None, 124)]:
        shell.sendline(f"{program} {options}; echo rc=$?; {show_echo}")
        if typed is not None:
            shell.expect(PROMPT)
            assert not echoes(shell)
            shell.send(typed)
        shell.expect(rf"rc={code}\b")
        shell.expect(r"[^-]echo\r")
    kill(shell)


def test_guest_learns_the_size_of_the_terminal(debian_guest: CachedGuest) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "tetrarch", "run", "--engine", "bt"],
        encoding="utf-8",
        timeout=LIMIT_S,
        dimensions=(33, 99),
    )
    child.expect(PROMPT)
    child.sendline("stty size")
    child.expect(r"\b33 99\b")
    kill(child)


def test_guest_asks_no_terminal_where_there_is_none(debian_guest: CachedGuest) -> None:
    with Machine(engine="bt") as vm:
        vm.start()
        vm.console.expect("# ", LIMIT_S)
        vm.console.send("echo $((6 * 7))\n")
        assert vm.console.expect("# ", LIMIT_S).startswith("42\r\n")
        assert "\x1b" not in vm.console.text
