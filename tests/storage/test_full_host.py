"""A host whose file system is full under a guest that writes, at every disk controller."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
from tests.nodes import can_be_opened

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]
LIMIT_S = 240

# The disk is on 4 MiB of memory, of which a file takes all but a little.
FULL = (
    'mount -t tmpfs -o size=4M tmpfs "$0" && truncate -s 16M "$0/disk.img" && '
    'head -c 3M /dev/zero > "$0/blocker" && exec "$@"'
)

BUSES = [
    ("virtio", "vda"),
    ("nvme", "nvme0n1"),
    ("pvscsi", "sda"),
    pytest.param("ahci", "sda", marks=pytest.mark.long),
    ("ide", "sda"),
]


@dataclass
class FullHost:
    """``tetrarch run`` with a disk that has not the room for what the guest has in /tmp/data."""

    program: subprocess.Popen[bytes]
    said: IO[bytes]
    warned: IO[bytes]
    blocker: Path

    def ask(self, command: str) -> None:
        assert self.program.stdin is not None
        self.program.stdin.write(command.encode() + b"\n")
        self.program.stdin.flush()

    def has_room(self) -> None:
        self.blocker.unlink()

    def end(self) -> tuple[str, str]:
        """What else the guest and the program have said, when the guest has powered off."""
        said, warned = self.said.read().decode(), self.warned.read().decode()
        assert self.program.wait() == 0, warned
        return said, warned


def until(stream: IO[bytes], words: bytes) -> bytes:
    """What a stream says up to the line with these words."""
    before = b""
    for line in stream:
        before += line
        if words in line:
            return before
    pytest.fail(f"{words!r} was never said: {before!r}")


@contextmanager
def full_host(
    request: pytest.FixtureRequest, folder: Path, bus: str, device: str, werror: str
) -> Iterator[FullHost]:
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this host gives no user namespaces, which a small file system needs")
    guest = request.getfixturevalue("standard_guest" if bus == "ahci" else "debian_guest")
    host = folder / "host"
    host.mkdir()
    run = [sys.executable, "-m", "tetrarch", "run", "--engine", "bt"]
    run += ["--kernel", guest.kernel, "--initrd", guest.initrd]
    run += ["--disk", f"{host}/disk.img,bus={bus},werror={werror}"]
    with subprocess.Popen(
        [*UNSHARE, "sh", "-c", FULL, host, *run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        watchdog = threading.Timer(LIMIT_S, program.kill)
        watchdog.start()
        try:
            blocker = Path(f"/proc/{program.pid}/root{host}/blocker")
            full = FullHost(program, program.stdout, program.stderr, blocker)
            full.ask(
                f"until {can_be_opened(device)}; do sleep 0.1; done; "
                "dd if=/dev/urandom of=/tmp/data bs=64k count=40"
            )
            yield full
        finally:
            watchdog.cancel()
            program.kill()


def write(device: str) -> str:
    return f"dd if=/tmp/data of=/dev/{device} bs=64k conv=fsync"


def compare(device: str) -> str:
    """Whether the disk has it, past what the guest's kernel keeps in memory."""
    return (
        "echo 3 > /proc/sys/vm/drop_caches; "
        f"cmp -n $((40 * 65536)) /tmp/data /dev/{device} && echo the sa''me"
    )


@pytest.mark.parametrize(("bus", "device"), BUSES)
def test_guest_sees_an_error_and_uses_the_disk_again_when_there_is_room(
    request: pytest.FixtureRequest, tmp_path: Path, bus: str, device: str
) -> None:
    with full_host(request, tmp_path, bus, device, "report") as host:
        host.ask(f"{write(device)} || (dmesg -c; echo it fai''led)")
        before = until(host.said, b"it failed").decode()
        host.has_room()
        host.ask(f"{write(device)} && {compare(device)}; dmesg; poweroff -f")
        said, warned = host.end()
    assert re.search(r"dd: .*(Input/output error|No space left on device)", before), before
    assert re.search(rf"error, dev {device}, sector \d+ op 0x1:\(WRITE\)", before), before
    # A few requests failed, and nothing else did.
    assert not re.search(r"time(d )?out|frozen|offline|not responding|Call Trace", before), before
    _, _, complaints = said.partition("the same")
    assert complaints, said
    assert not re.search(r"ata\d|nvme|vda|sda", complaints), complaints
    # However many failed: that a disk of a guest's fails is one line.
    assert warned.count("disk0: a request failed: the host's file system is full\n") == 1, warned


@pytest.mark.parametrize(("bus", "device"), BUSES)
def test_machine_is_held_until_there_is_room_and_loses_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, bus: str, device: str
) -> None:
    with full_host(request, tmp_path, bus, device, "stop") as host:
        host.ask(f"{write(device)} && {compare(device)}; dmesg; poweroff -f")
        line = until(host.warned, b"paused").decode()
        assert re.search(
            r"disk0 \(.*disk\.img\): the host's file system is full; the machine is paused: ", line
        ), line
        host.has_room()
        host.program.send_signal(signal.SIGCONT)
        said, warned = host.end()
    assert "the same" in said
    # There was room for all that was to be written: it was held once, and said so once.
    assert "paused" not in warned
    assert "error" not in said.lower()
