"""Ballooning: the guest's own driver takes pages from it, and the host has them back.

They go by src/tetrarch/platforms/vmware/balloon.py; virtio has src/tetrarch/virtio/balloon.py.
"""

import time
from pathlib import Path

from tetrarch import Machine

MIB = 1 << 20


def resident() -> int:
    """What this process, guest memory included, has of the host's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // MIB


with Machine(engine="bt", platform="vmware", memory="512M", agent=True) as vm:
    vm.start()
    vm.exec(["sh", "-c", "dd if=/dev/zero of=/tmp/file bs=1M count=200; rm /tmp/file"])
    print(f"a guest that has used its memory: {resident()} MiB are the host's to pay for")
    vm.balloon.target = 256 * MIB
    while vm.balloon.actual < vm.balloon.target:
        time.sleep(0.5)
    left = vm.exec(["sh", "-c", "grep MemAvailable /proc/meminfo"]).stdout.decode().split()[1]
    print(f"balloon of {vm.balloon.actual // MIB} MiB: {resident()} MiB")
    print(f"the guest, with {int(left) // 1024} MiB available, runs on")
    vm.kill()
