"""Debian's own programs print the same in a guest as on the host.

The host's own run is in a chroot of the same files, so both have the same versions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from tests.userland.debian import DebianRoot

from tetrarch import Machine
from tetrarch.console import ExpectTimeout
from tetrarch.images import CachedGuest

SMALL = ("busybox-static", "coreutils", "dash", "openssl", "perl-base", "python3-minimal")
FULL = (*SMALL, "gcc", "libc6-dev", "perl", "python3", "stress-ng")
BOOT_LIMIT_S = 120

# Name, command, seconds that it may take in the guest.
SMALL_CASES = [
    ("arithmetic", "python3 /cases/arithmetic.py", 60),
    ("text", "python3 /cases/text.py", 60),
    ("perl", "perl /cases/base.pl", 60),
    ("openssl", "sh /cases/openssl.sh", 100),
    ("exceptions", "/cases/throw", 60),
]
FULL_CASES = [
    *SMALL_CASES,
    ("library", "python3 /cases/library.py", 200),
    ("modules", "perl /cases/modules.pl", 200),
    ("gcc", "sh /cases/gcc.sh", 200),
    ("stress-cpu", "sh /cases/stress.sh --cpu 1 --cpu-method all --cpu-ops 3000", 250),
    ("stress-vm", "sh /cases/stress.sh --vm 1 --vm-bytes 16M --vm-method all --vm-ops 100000", 250),
    ("stress-matrix", "sh /cases/stress.sh --matrix 1 --matrix-method all --matrix-ops 10000", 250),
    ("stress-str", "sh /cases/stress.sh --str 1 --str-method all --str-ops 200000", 250),
    ("stress-wcs", "sh /cases/stress.sh --wcs 1 --wcs-method all --wcs-ops 200000", 250),
]


@dataclass
class Userland:
    """A root and the guest that runs it, which is booted again after a case broke it."""

    debian: DebianRoot
    kernel: CachedGuest
    memory: str
    cpus: int = 1
    machine: Machine | None = None

    def run(self, name: str, command: str, limit: float) -> tuple[int, str]:
        machine = self.machine or self._boot()
        try:
            machine.console.send(f"{name} {command}\n")
            machine.console.expect(f"=== begin {name}\r\n")
            output = machine.console.expect(re.compile(rf"=== end {name} (\d+)\r\n"), limit)
        except ExpectTimeout:
            self.close()
            raise
        text, _, code = output.rpartition(f"=== end {name} ")
        return int(code), text.replace("\r\n", "\n")

    def close(self) -> None:
        machine, self.machine = self.machine, None
        if machine is not None:
            machine.kill()

    def _boot(self) -> Machine:
        self.machine = machine = Machine(
            kernel=self.kernel.kernel,
            initrd=self.debian.initrd,
            append="console=ttyS0 quiet reboot=t panic=-1",
            memory=self.memory,
            cpus=self.cpus,
            engine="bt",
        )
        machine.start()
        machine.console.expect("=== ready\r\n", BOOT_LIMIT_S)
        return machine


def userland(packages: tuple[str, ...], kernel: CachedGuest, memory: str) -> Iterator[Userland]:
    debian = DebianRoot(packages)
    debian.build()
    made = Userland(debian, kernel, memory)
    yield made
    made.close()


@pytest.fixture(scope="module")
def small(debian_guest: CachedGuest) -> Iterator[Userland]:
    yield from userland(SMALL, debian_guest, "512M")


@pytest.fixture(scope="module")
def full(debian_guest: CachedGuest) -> Iterator[Userland]:
    yield from userland(FULL, debian_guest, "1536M")


@pytest.mark.parametrize(
    ("name", "command", "limit"), SMALL_CASES, ids=[case[0] for case in SMALL_CASES]
)
def test_base_programs(small: Userland, name: str, command: str, limit: float) -> None:
    check(small, name, command, limit)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "command", "limit"), FULL_CASES, ids=[case[0] for case in FULL_CASES]
)
def test_programs(full: Userland, name: str, command: str, limit: float) -> None:
    check(full, name, command, limit)


def check(userland: Userland, name: str, command: str, limit: float) -> None:
    expected = userland.debian.run(command)
    assert expected[0] == 0, f"on the host: {expected[1]}"
    assert userland.run(name, command, limit) == expected
