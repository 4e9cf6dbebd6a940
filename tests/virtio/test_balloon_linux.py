"""Linux gives memory back by the balloon, and the host's memory follows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.virtio.driver import wait_until
from tests.virtio.host_memory import with_resident

from tetrarch import Machine
from tetrarch.images import CachedGuest
from tetrarch.platforms.named import PLATFORMS, PlatformName

PROMPT = "root@tetrarch:~# "
MIB = 1 << 20
# So that there is room beside what is filled for 64 MiB: so much can Linux hold as free
# pages that it is reporting (mm/page_reporting.c), 32 at a time of 2 MiB each, which nobody
# gets meanwhile. On a busy host that lasts long enough for the guest to run out of memory.
MEMORY = 512 * MIB
BALLOON = 256 * MIB
LIMIT_S = 200


class Guest:
    def __init__(self, make: Callable[[], Machine]) -> None:
        self.vm, self.resident = with_resident(make)

    def ask(self, command: str) -> str:
        self.vm.console.send(command + "; echo status $?\n")
        said = self.vm.console.expect(PROMPT, LIMIT_S)
        assert "status 0" in said, said
        return said

    def fill(self) -> None:
        """Has the guest use as much as the balloon takes."""
        self.ask(f"dd if=/dev/zero of=/tmp/x bs=1M count={BALLOON // MIB}")
        assert self.resident() > MEMORY - BALLOON

    def free(self) -> None:
        self.ask("rm /tmp/x")

    def go_to(self, target: int) -> None:
        self.vm.balloon.target = target
        wait_until(
            lambda: self.vm.balloon.actual == target, f"a balloon of {target} bytes", LIMIT_S
        )


def down_and_up(guest: Guest, times: int) -> None:
    for _ in range(times):
        guest.fill()
        guest.free()
        guest.go_to(BALLOON)
        # What is in the balloon is not here, wherever the rest of the memory is.
        assert guest.resident() <= MEMORY - BALLOON
        guest.go_to(0)
    guest.fill()
    guest.free()


def started(debian_guest: CachedGuest, platform: PlatformName = "pc") -> Guest:
    guest = Guest(
        lambda: Machine(
            engine="bt",
            platform=platform,
            kernel=debian_guest.kernel,
            initrd=debian_guest.initrd,
            memory=MEMORY >> 20,
        )
    )
    guest.vm.start()
    guest.vm.console.expect(PROMPT, LIMIT_S)
    guest.ask("mount -o remount,size=90% /tmp")
    return guest


def test_memory_of_the_host_follows_the_balloon(debian_guest: CachedGuest, tmp_path: Path) -> None:
    guest = started(debian_guest)
    with guest.vm as vm:
        down_and_up(guest, 2)
        # Free pages come back by themselves.
        guest.fill()
        full = guest.resident()
        guest.free()
        wait_until(
            lambda: guest.resident() < full - BALLOON // 2, "a report of free pages", LIMIT_S
        )
        guest.ask("head -c 1000000 /dev/hwrng | wc -c")
        stats = vm.balloon.stats(LIMIT_S)
        found = re.search(r"MemTotal: +(\d+) kB", guest.ask("cat /proc/meminfo"))
        assert found is not None
        assert stats["total"] == int(found[1]) << 10
        assert 0 < stats["free"] <= stats["available"] < stats["total"]
        guest.go_to(BALLOON)
        vm.save(tmp_path / "saved")
    guest = Guest(lambda: Machine.restore(tmp_path / "saved"))
    with guest.vm as vm:
        vm.start()
        assert (vm.balloon.target, vm.balloon.actual) == (BALLOON, BALLOON)
        assert guest.resident() <= MEMORY - BALLOON
        guest.go_to(0)
        guest.fill()
        assert vm.balloon.stats(LIMIT_S)["total"] == stats["total"]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_balloon_goes_down_and_up_twenty_times(
    debian_guest: CachedGuest, platform: PlatformName
) -> None:
    guest = started(debian_guest, platform)
    with guest.vm:
        # Meanwhile the guest uses memory, and has in it what it has put there.
        guest.ask("head -c 20000000 /dev/urandom >/tmp/kept; touch /tmp/turns")
        guest.ask(
            "(while cp /tmp/kept /tmp/copy && cmp /tmp/kept /tmp/copy; do echo >>/tmp/turns; "
            "rm /tmp/copy; done; touch /tmp/over) & true"
        )
        down_and_up(guest, 20)
        guest.ask("[ ! -e /tmp/over ] && [ $(wc -l </tmp/turns) -ge 20 ]")


@pytest.mark.long
@pytest.mark.parametrize("platform", PLATFORMS)
def test_guest_that_runs_out_takes_its_memory_back(
    debian_guest: CachedGuest, platform: PlatformName
) -> None:
    guest = started(debian_guest, platform)
    with guest.vm as vm:
        if platform == "vmware":
            # Its driver does so where it is told to alone.
            guest.ask("rmmod vmw_balloon; modprobe vmw_balloon vmwballoon_shrinker_enable=1")
        guest.go_to(400 * MIB)
        guest.ask("dd if=/dev/zero of=/tmp/x bs=1M count=200")
        assert vm.balloon.actual < 300 * MIB
        guest.ask("! dmesg | grep -i 'out of memory'")
