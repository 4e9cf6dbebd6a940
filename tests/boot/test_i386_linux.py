"""32-bit Linux on engine bt: i386 programs in a 64-bit guest, and Debian's i386 kernel."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tests.debs import debian_package
from tests.initrds import shell_tree

from tetrarch import Machine, StopReason
from tetrarch.images import CachedGuest

PATIENCE = 300.0

# Arithmetic, pipes, processes, signals, floating point and 64-bit numbers in 32-bit registers.
WORK = """
echo BEG''IN
head -c 4 /bin/busybox | tail -c 3; head -c 5 /bin/busybox | tail -c 1 | od -An -tu1
sha256sum < /bin/busybox
gzip < /bin/busybox | gunzip | md5sum
i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); done; echo $i $((0x123456789abcdef % 1000003))
awk 'BEGIN { for (i = 1; i < 2000; i++) s += 1 / i; printf "%.12f\\n", s * s }'
sleep 1000 & kill $!; wait $!; echo $?
uname -m
echo EN''D
poweroff -f
"""


def _expected(busybox: bytes) -> list[str]:
    total = 0.0
    for i in range(1, 2000):
        total += 1 / i
    return [
        "ELF   1",
        f"{hashlib.sha256(busybox).hexdigest()}  -",
        f"{hashlib.md5(busybox).hexdigest()}  -",
        f"3000 {0x123456789ABCDEF % 1000003}",
        f"{total * total:.12f}",
        "143",
    ]


def _works(kernel: Path, folder: Path, machine: str) -> None:
    busybox = (debian_package("busybox-static", "i386") / "bin" / "busybox").read_bytes()
    initrd = folder / "initrd.gz"
    initrd.write_bytes(shell_tree(WORK, busybox).gzip())
    with Machine(
        engine="bt", kernel=kernel, initrd=initrd, append="console=ttyS0 quiet", memory="256M"
    ) as vm:
        vm.start()
        vm.console.expect("BEGIN", PATIENCE)
        said = vm.console.expect("END", PATIENCE).rpartition("END")[0]
        assert vm.wait(PATIENCE).reason is StopReason.POWERED_OFF
        interpreted = vm.stats()["bt"]["interpreted"]
        translated = vm.stats()["bt"]["instructions_translated"]
    # The shell tells the end of its job now and then.
    lines = [line for line in said.split("\r\n") if line.strip() not in ("", "Terminated")]
    assert lines == [*_expected(busybox), machine]
    # What runs often was translated.
    assert interpreted < 20_000_000, f"{translated} instructions translated"


def test_i386_programs_run_in_a_64_bit_guest(debian_guest: CachedGuest, tmp_path: Path) -> None:
    _works(debian_guest.kernel, tmp_path, "x86_64")


@pytest.mark.long
def test_debians_i386_kernel_boots(tmp_path: Path) -> None:
    kernel = next((debian_package("linux-image-686-pae", "i386") / "boot").glob("vmlinuz-*"))
    _works(kernel, tmp_path, "i686")
