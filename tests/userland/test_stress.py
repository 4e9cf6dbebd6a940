"""stress-ng checks its own work, by all its stressors of some classes, each on four vCPUs."""

from __future__ import annotations

import os
import re

import pytest
from tests.userland.debian import DebianRoot
from tests.userland.test_userland import FULL, Userland

from tetrarch.images import CachedGuest

# Vectors and strings are in these. There is nothing to swap to, and one alone has the probes.
CLASSES = "--class cpu,cpu-cache,memory,vm --exclude swap,uprobe --sequential 4"
OTHERS = "--syscall 4 --sysbadaddr 4 --sysinfo 4 --enosys 4 --uprobe 1"
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
