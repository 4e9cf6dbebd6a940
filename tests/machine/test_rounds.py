"""A guest that is saved and goes on again and again, while its disk, its loopback and its timers
work: what it checks itself has to be right in the end.

TETRARCH_ROUNDS says how often.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tests.nodes import can_be_opened
from tests.programs import initrd_with

from tetrarch import Machine, block
from tetrarch.images import CachedGuest

ROUNDS = int(os.environ.get("TETRARCH_ROUNDS", "100"))
LIMIT_S = 60
PROMPT = "root@tetrarch:~# "
DISK = 64 << 20

# Each block that was written is read back and its checksum compared, a few writes later.
FIO = (
    "fio --name=all --filename=/dev/vda --rw=randwrite --bsrange=4k-64k --direct=1 "
    "--ioengine=libaio --iodepth=16 --verify=crc32c --verify_backlog=64 --verify_fatal=1 "
    "--time_based --runtime=100000 --rate_iops=200 >/tmp/fio 2>&1"
)
# The daemon is on its own before it listens at port 5201: state 0A.
IPERF = (
    "iperf3 -s -D; until grep -q ':1451 .* 0A ' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done; "
    "iperf3 -c 127.0.0.1 -b 20M -t 80000 >/tmp/iperf 2>&1"
)
# Time goes on, and not by much more than was slept: the machine's clock stands with it.
TIMERS = r"""awk 'BEGIN { while (1) { getline line < "/proc/uptime"; close("/proc/uptime");
split(line, part, " "); now = part[1]; if (last && (now < last || now > last + 20))
print "time went from", last, "to", now > "/tmp/time"; last = now; system("sleep 0.05") } }'"""
LOADS = (FIO, IPERF, TIMERS)
# Else what they said last is to be read.
AT_WORK = (
    "! [ -e /tmp/ended ] && ! [ -e /tmp/time ] || "
    "{ tail -n 4 /tmp/fio /tmp/iperf /tmp/time; false; }"
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
]


def asker(machine: Machine) -> Callable[[str], str]:
    """A shell that has the prompt on its last line."""

    def ask(command: str) -> str:
        machine.console.send(f"{command}; echo st''atus $?\n")
        said = machine.console.expect("status 0", LIMIT_S)
        machine.console.expect(PROMPT, LIMIT_S)
        return said

    return ask


def test_guest_under_load_goes_on_round_after_round(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    disk, saved = tmp_path / "disk", tmp_path / "saved"
    block.create(disk, DISK, image_format="raw")
    initrd = initrd_with(debian_guest, ["fio", "iperf3"], tmp_path)
    image = f"{disk},format=raw"
    machine = Machine(engine="bt", kernel=debian_guest.kernel, initrd=initrd, disk=image)
    try:
        machine.start()
        machine.console.expect(PROMPT, LIMIT_S)
        ask = asker(machine)
        ask(f"until {can_be_opened('vda')}; do sleep 0.1; done")
        for load in LOADS:
            machine.console.send(f"({load}; echo ended >>/tmp/ended) &\n")
            machine.console.expect(PROMPT, LIMIT_S)
        for _ in range(ROUNDS):
            machine.pause()
            machine.save(saved)
            machine.kill()
            machine = Machine.restore(saved, disk=image)
            machine.start()
            ask = asker(machine)
            ask(f"sleep 0.5; {AT_WORK}")
        ask("! grep -i -E 'error|fail|verify:' /tmp/fio")
        ask("killall -INT fio; sleep 2; ! grep -q 'verify: bad' /tmp/fio; cat /tmp/fio")
        written = machine.stats()["disk0"]["wr_operations"]
        assert written > 0
        ask("! dmesg | grep -i -E 'oops|bug:|lockup|i/o error|call trace'")
    finally:
        with suppress(Exception):
            machine.kill()
