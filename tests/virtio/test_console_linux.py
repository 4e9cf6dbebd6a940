"""Linux on the virtio console: a shell on hvc0, a terminal that changes its size, named ports."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from tetrarch import Machine, MemoryConsole
from tetrarch.console.spec import PortSpec
from tetrarch.images import CachedGuest
from tetrarch.machine.config import VirtioTransport

PROMPT = "root@tetrarch:~# "
LIMIT_S = 200


def ask(console: MemoryConsole, command: str) -> str:
    console.send(command + "\n")
    return console.expect(PROMPT, LIMIT_S)


def wait_for_size(console: MemoryConsole, rows: int, columns: int) -> None:
    console.send(
        f"until [ \"$(stty size)\" = '{rows} {columns}' ]; do sleep 0.1; done; echo s''een\n"
    )
    console.expect("seen", LIMIT_S)
    console.expect(PROMPT, LIMIT_S)


@pytest.mark.parametrize("virtio", ["pci", "mmio"])
def test_shell_is_on_the_virtio_console_and_knows_its_size(
    debian_guest: CachedGuest, virtio: VirtioTransport, tmp_path: Path
) -> None:
    terminal = MemoryConsole()
    terminal.resize(30, 100)
    with Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        append_extra="console=hvc0",
        virtio=virtio,
        virtio_console=terminal,
    ) as vm:
        vm.start()
        terminal.expect(PROMPT, LIMIT_S)
        assert "/dev/hvc0" in ask(terminal, "tty")
        wait_for_size(terminal, 30, 100)
        terminal.resize(50, 132)
        wait_for_size(terminal, 50, 132)
        # More than the queues and buffers on the way hold.
        terminal.send("seq 1 20000; echo d''one\n")
        said = terminal.expect(re.compile(r"done\r?\n"), LIMIT_S)
        numbers = re.findall(r"^(\d+)\r?$", said, re.MULTILINE)
        assert numbers == [str(number) for number in range(1, 20001)]
        terminal.expect(PROMPT, LIMIT_S)
        vm.save(tmp_path / "saved")
    again = MemoryConsole()
    again.resize(25, 90)
    with Machine.restore(tmp_path / "saved", virtio_console=again) as vm:
        vm.start()
        again.send("echo go''es on\n")
        again.expect("goes on", LIMIT_S)
        again.expect(PROMPT, LIMIT_S)
        wait_for_size(again, 25, 90)
        again.send("poweroff\n")
        assert vm.wait(LIMIT_S).code == 0


def test_named_port_is_a_pipe_to_the_host(debian_guest: CachedGuest) -> None:
    terminal, pipe = MemoryConsole(), MemoryConsole()
    with Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        virtio_console=(terminal, PortSpec(pipe, "org.example.pipe")),
    ) as vm:
        vm.start()
        vm.console.expect(PROMPT, LIMIT_S)
        found = ask(vm.console, "grep -l org.example.pipe /sys/class/virtio-ports/*/name")
        port = re.search(r"/(vport\d+p1)/name", found)
        assert port is not None, found
        ask(vm.console, f"exec 3<>/dev/{port[1]}")
        ask(vm.console, "echo from the guest >&3")
        pipe.expect("from the guest\n", LIMIT_S)
        pipe.send("from the host\n")
        assert "read: from the host" in ask(vm.console, "read -r line <&3; echo read: $line")
        ask(vm.console, "seq 1 20000 >&3")
        said = pipe.expect("\n20000\n", LIMIT_S)
        assert said == "".join(f"{number}\n" for number in range(1, 20001))
        ask(vm.console, "echo on the console > /dev/hvc0")
        terminal.expect("on the console", LIMIT_S)


def test_program_takes_the_terminal_for_the_virtio_console(debian_guest: CachedGuest) -> None:
    """The guest's terminal follows that of the user."""
    master, slave = pty.openpty()
    set_size(master, 33, 111)
    command = [sys.executable, "-m", "tetrarch", "run", "--engine", "bt"]
    command += ["--kernel", str(debian_guest.kernel), "--initrd", str(debian_guest.initrd)]
    command += ["--virtio-console", "stdio", "--append-extra", "console=hvc0"]
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal
    ) as program:
        os.close(slave)
        watchdog = threading.Timer(LIMIT_S, program.kill)
        watchdog.start()
        try:
            expect(master, PROMPT)
            for rows, columns in ((33, 111), (44, 99)):
                set_size(master, rows, columns)
                size = f"'{rows} {columns}'"
                loop = f"until [ \"$(stty size)\" = {size} ]; do sleep 0.1; done; echo s''een\n"
                os.write(master, loop.encode())
                expect(master, "seen\r\n")
                expect(master, PROMPT)
            os.write(master, b"\x1d")
            expect(master, "left by Ctrl-]")
            assert program.wait(60) == 0
        finally:
            watchdog.cancel()
            program.kill()
            os.close(master)


def take_terminal() -> None:
    """In the child: the terminal on its standard input is its own, with its signals."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def set_size(master: int, rows: int, columns: int) -> None:
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def expect(master: int, text: str) -> None:
    said = b""
    while text.encode() not in said:
        try:
            said += os.read(master, 1)
        except OSError:
            break
    assert text.encode() in said, said[-1000:]
