"""A Debian disk from the archive to its end: built, booted, used, rebooted, switched off."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pexpect
import pytest
from tests.terminals import kill

from tetrarch import Machine, MachineConfig
from tetrarch.agent import AgentError, connect, encode_run
from tetrarch.agent.client import EXIT, RUN
from tetrarch.machine.guest import with_installed_disk
from tetrarch.net import NetSpec

# Of a host that does a lot beside it; a build takes 3 to 4 minutes on 2 CPUs, a boot less than one.
LIMIT_S = 900

pytestmark = [pytest.mark.long, pytest.mark.timeout(6 * LIMIT_S)]


@pytest.fixture
def data(debian_disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """XDG_DATA_HOME with the disk ``web``."""
    monkeypatch.setenv("XDG_DATA_HOME", str(debian_disk))
    return debian_disk


@pytest.fixture
def port() -> int:
    """A TCP port of the host that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    return number


def run(vsock: Path, *words: str) -> tuple[int, str]:
    """A command's exit code and what it says."""
    said = b""
    with connect(vsock, LIMIT_S) as stream:
        stream.send(RUN, encode_run(words))
        while True:
            kind, data = stream.read()
            if kind == EXIT:
                return int.from_bytes(data, "little"), said.decode()
            said += data


def boot_id(vsock: Path) -> str:
    """Which boot of the guest this is; "" where it goes meanwhile."""
    try:
        return run(vsock, "cat", "/proc/sys/kernel/random/boot_id")[1]
    except AgentError:
        return ""


def test_system_runs_comes_back_after_a_reboot_and_ends(data: Path, tmp_path: Path) -> None:
    vsock = tmp_path / "vsock"
    config = with_installed_disk(
        MachineConfig(engine="bt", image="web", vsock=vsock, on_reset="restart")
    )
    with Machine(config) as vm:
        vm.start()
        vm.console.expect("\nbox login: ", LIMIT_S)
        assert run(vsock, "systemctl", "is-system-running", "--wait") == (0, "running\n")
        assert run(vsock, "systemctl", "--failed", "--no-legend") == (0, "")
        assert run(vsock, "hostname") == (0, "box\n")
        assert run(vsock, "stat", "--format=%U:%G %a", "/home/me")[1] == "me:me 755\n"
        assert run(vsock, "runuser", "-u", "me", "--", "sudo", "id", "-u") == (0, "0\n")
        assert run(vsock, "getcap", "/usr/bin/ping")[1] == "/usr/bin/ping cap_net_raw=ep\n"
        before = boot_id(vsock)
        assert run(vsock, "sh", "-c", "echo kept >/root/written")[0] == 0
        with suppress(AgentError):  # the connection may end before the command
            run(vsock, "systemctl", "reboot")
        deadline = time.monotonic() + LIMIT_S
        while boot_id(vsock) in ("", before):
            assert time.monotonic() < deadline
        assert run(vsock, "systemctl", "is-system-running", "--wait") == (0, "running\n")
        assert (vm.resets, run(vsock, "cat", "/root/written")) == (1, (0, "kept\n"))
        with suppress(AgentError):
            run(vsock, "systemctl", "poweroff")
        assert vm.wait(LIMIT_S).code == 0


def test_command_runs_on_the_disk_and_what_it_writes_stays(data: Path) -> None:
    def tetrarch(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "tetrarch", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    start = ("run", "web", "--engine", "bt", "--", "sh", "-c")
    assert tetrarch(*start, "echo more >/root/more; exit 7") == (7, "", "")
    assert tetrarch(*start, "cat /root/more") == (0, "more\n", "")


def test_login_has_a_terminal_as_large_as_ours(data: Path) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "tetrarch", "run", "web", "--engine", "bt"],
        dimensions=(33, 111),
        timeout=LIMIT_S,
        encoding="utf-8",
    )
    try:
        child.expect("box login: ")
        child.sendline("root")
        child.expect("# ")
        child.sendline("stty size")
        child.expect("33 111\r\n")
        child.sendline("poweroff")
        child.expect(pexpect.EOF)
    finally:
        kill(child)


def test_disk_that_was_made_larger_has_a_file_system_as_large(data: Path) -> None:
    def tetrarch(*words: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "tetrarch", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=LIMIT_S,
            check=True,
        ).stdout

    disk = data / "tetrarch/disks/web/disk.raw"
    before = disk.stat().st_size
    tetrarch("disk", "resize", str(disk), "+1G")
    look = "systemctl is-system-running --wait && stat --file-system --format '%b %S' /"
    running, room = tetrarch("run", "web", "--engine", "bt", "--", "sh", "-c", look).splitlines()
    blocks, size = map(int, room.split())
    assert running == "running"
    assert blocks * size > before


def test_user_comes_in_by_ssh_and_installs_a_package(data: Path, tmp_path: Path, port: int) -> None:
    vsock = tmp_path / "vsock"
    net = (NetSpec.parse(f"user,forward={port}:22"),)
    config = with_installed_disk(MachineConfig(engine="bt", image="web", vsock=vsock, net=net))
    with Machine(config) as vm:
        vm.start()
        assert run(vsock, "systemctl", "is-system-running", "--wait") == (0, "running\n")
        ssh = ["ssh", "-i", str(data / "key"), "-p", str(port), "-o", "BatchMode=yes"]
        ssh += ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path / 'known'}"]
        install = "sudo apt-get update -q && sudo apt-get install -qy hello && hello"
        done = subprocess.run(
            [*ssh, "me@127.0.0.1", install],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["Hello, world!"]), (
            done.stdout + done.stderr
        )


def test_twenty_boots_in_a_row(data: Path, tmp_path: Path) -> None:
    for number in range(20):
        vsock = tmp_path / f"vsock{number}"
        config = with_installed_disk(MachineConfig(engine="bt", image="web", vsock=vsock))
        with Machine(config) as vm:
            vm.start()
            vm.console.expect("\nbox login: ", LIMIT_S)
            assert run(vsock, "systemctl", "is-system-running", "--wait") == (0, "running\n")
            with suppress(AgentError):
                run(vsock, "systemctl", "poweroff")
            assert vm.wait(LIMIT_S).code == 0
