"""stress-ng checks its own work, by all its stressors of some classes, each on four vCPUs."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pexpect
import pytest
from tests.userland.debian import DebianRoot
from tests.userland.test_userland import FULL, Userland

from tetrarch.images import CachedGuest

# Vectors and strings are in these. There is nothing to swap to, and one alone has the probes.
CLASSES = "--class cpu,cpu-cache,memory,vm --exclude swap,uprobe --sequential 4"
OTHERS = "--syscall 4 --sysbadaddr 4 --sysinfo 4 --enosys 4 --uprobe 1"
QEMU = "qemu-system-x86_64"
IN_QEMU_S = 7200
COMPLAINTS = r"soft lockup|hard LOCKUP|rcu.*stall|BUG:|WARNING:|Oops|Kernel panic"


@pytest.mark.long
@pytest.mark.timeout(0)
def test_every_stressor_of_four_classes(debian_guest: CachedGuest) -> None:
    """TETRARCH_STRESS_S seconds in all, 1800 if it does not say."""
    debian = DebianRoot(FULL)
    debian.build()
    # What it would run: where it runs nothing, it names them all the same.
    told = debian.run(f"stress-ng {CLASSES} --dry-run")[1]
    stressors = re.findall(r"\b4 [a-z]", told.rpartition("dispatching hogs:")[2])
    assert len(stressors) > 100, told
    seconds = float(os.environ.get("TETRARCH_STRESS_S", "1800"))
    each = max(1, round(seconds / len(stressors)))
    guest = Userland(debian, debian_guest, memory="3G", cpus=4)
    try:
        mount = "busybox mount -t debugfs debug /sys/kernel/debug"
        assert guest.run("tracing", mount, 60)[0] == 0
        for name, which in (("classes", CLASSES), ("others", OTHERS)):
            command = f"stress-ng {which} --verify --timeout {each} --vm-bytes 64M --oomable"
            # Some come to their end late, where four of them have to be waited for.
            code, said = guest.run(name, command, 2 * seconds + 3600)
            print(said)
            wrong = [line for line in said.splitlines() if re.search(r"fail:|error:", line)]
            assert (code, wrong) == (0, [])
        assert guest.run("dmesg", f"busybox dmesg | busybox grep -E '{COMPLAINTS}'", 60)[1] == ""
    finally:
        guest.close()


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"no {QEMU}; install qemu-system-x86")
def test_stressors_of_four_classes_end_as_they_do_in_qemu(debian_guest: CachedGuest) -> None:
    """A second each, of which QEMU needs most for other things."""
    debian = DebianRoot(FULL)
    debian.build()
    command = f"stress-ng {CLASSES} --verify --timeout 1 --vm-bytes 16M --oomable"
    guest = Userland(debian, debian_guest, memory="3G", cpus=4)
    try:
        ours = guest.run("classes", command, IN_QEMU_S)
    finally:
        guest.close()
    theirs = in_qemu(debian_guest.kernel, debian.initrd, command)
    assert (ours[0], outcome(ours[1])) == (theirs[0], outcome(theirs[1]))


def in_qemu(kernel: Path, initrd: Path, command: str) -> tuple[int, str]:
    machine = ["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "4", "-m", "3G", "-nodefaults"]
    machine += ["-display", "none", "-serial", "stdio", "-no-reboot"]
    guest = ["-kernel", str(kernel), "-initrd", str(initrd), "-append", "console=ttyS0 quiet"]
    qemu = pexpect.spawn(QEMU, [*machine, *guest], timeout=600, encoding="utf-8", echo=False)
    try:
        qemu.expect_exact("=== ready")
        qemu.sendline(f"classes {command}")
        qemu.expect_exact("=== begin classes")
        qemu.expect(r"=== end classes (\d+)\s", timeout=IN_QEMU_S)
        return int(qemu.match[1]), (qemu.before or "").replace("\r", "")
    finally:
        qemu.close(force=True)


def outcome(said: str) -> dict[str, list[str]]:
    """Which stressors ran, which were left out and why, and what failed; no figures."""
    lines = [re.sub(r"^stress-ng: (\w+): +\[\d+\] ", r"\1: ", line) for line in said.splitlines()]
    return {
        "ran": [line for line in lines if "dispatching hogs:" in line],
        "skipped": sorted(line for line in lines if "will be skipped" in line),
        "wrong": sorted(line for line in lines if re.search(r"fail:|error:", line)),
        "end": [line.split(" in ")[0] for line in lines if "run completed" in line],
    }
