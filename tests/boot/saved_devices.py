"""A Linux guest with a device of each kind, saved on one engine and gone on with on another.

Runs in the test's own process, and by itself in a system that has both engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tetrarch import Machine, MemoryConsole, block
from tetrarch.console.spec import PortSpec
from tetrarch.machine.config import EngineName, InputOption

PROMPT = "root@tetrarch:~# "
# Images by what the guest finds them as.
DISKS = {
    "vda": "virtio.img",
    "vdb": "virtio.qcow2",
    "nvme0n1": "nvme.qcow2",
    "sda": "ahci.img",
    "sdb": "ide.img",
}
# Input devices by the name that Linux gives them.
INPUTS: dict[InputOption, str] = {
    "keyboard": "Tetrarch keyboard",
    "mouse": "Tetrarch mouse",
    "tablet": "Tetrarch tablet",
}
_DISK_BYTES = 8 << 20
_TEXT = b"what is on the disc\n"
# Devices of the guest's that do something all the time, and leave a file when it is wrong.
LOADS = (
    # The clock goes on, and by not much more than was slept: it stands with the machine.
    "while :; do read t u </proc/uptime; t=${t%.*}; "
    "[ -z $o ] || [ $t -ge $o -a $((t - o)) -lt WAIT ] || echo from $o to $t >/tmp/wrong-time; "
    "o=$t; sleep 0.1; done",
    # The same computation has the same sum.
    "while :; do s=$(seq 20000 | md5sum | head -c 32); [ ${k:=$s} = $s ] || "
    "echo $s >/tmp/wrong-sum; done",
)


class Guest:
    """What asks a guest's shell, on whatever engine it is."""

    def __init__(self, machine: Machine, limit: float) -> None:
        self.machine, self._limit = machine, limit

    def ask(self, command: str) -> str:
        self.machine.console.send(f"{command}; echo st''atus $?\n")
        said = self.machine.console.expect("status ", self._limit)
        code = self.machine.console.expect("\n", self._limit)
        self.machine.console.expect(PROMPT, self._limit)
        assert code.strip() == "0", f"{command}: {said}{code}"
        return said


def configuration(folder: Path, port: MemoryConsole) -> dict[str, Any]:
    """What is the host's of such a machine."""
    return {
        "disk": [f"{folder / name},bus={Path(name).stem}" for name in DISKS.values()],
        "cdrom": f"{folder / 'disc.iso'},bus=ahci",
        "floppy": folder / "floppy.img",
        "net": [f"socket={folder / 'switch'}", f"socket={folder / 'switch'}"],
        "vsock": folder / "vsock",
        "virtio_console": PortSpec(port, "org.example.port"),
    }


def goes_from_engine_to_engine(
    engines: Sequence[EngineName],
    kernel: Path,
    initrd: Path,
    folder: Path,
    limit: float,
    say: Callable[[str], None] = print,
) -> None:
    for name in DISKS.values():
        block.create(folder / name, _DISK_BYTES)
    (folder / "disc.iso").write_bytes(_TEXT.ljust(2048 * 512, b"\0"))
    (folder / "floppy.img").write_bytes(bytes(1440 << 10))
    saved, port = folder / "saved", MemoryConsole()
    first = Machine(
        engine=engines[0],
        cpu="portable",
        cpus=2,
        memory="512M",
        kernel=kernel,
        initrd=initrd,
        hpet=True,
        vga=True,
        input=tuple(INPUTS),
        **configuration(folder, port),
    )
    with first as machine:
        machine.start()
        machine.console.expect(PROMPT, limit)
        guest = Guest(machine, limit)
        _begin(guest, limit)
        _check(guest, port, engines[0], limit)
        machine.pause()
        machine.save(saved)
    say(f"saved on {engines[0]}")
    for number, engine in enumerate(engines[1:], 1):
        port = MemoryConsole()
        with Machine.restore(saved, engine=engine, **configuration(folder, port)) as machine:
            machine.start()
            guest = Guest(machine, limit)
            _check(guest, port, f"{number}{engine}", limit)
            if number == len(engines) - 1:
                guest.ask("killall sleep 2>/dev/null; ! ls /tmp/wrong-*")
                guest.ask("! dmesg | grep -i -E 'oops|bug:|lockup|i/o error|call trace'")
                say(f"goes on on {engine}")
                machine.console.send("poweroff -f\n")
                assert machine.wait(limit).ok
                break
            machine.pause()
            machine.save(saved)
        say(f"goes on on {engine}, and saved there")


def _begin(guest: Guest, limit: float) -> None:
    for device in (*DISKS, "sr0", "fd0"):
        # As in tests/nodes.py.
        guest.ask(f"until (: </dev/{device}) 2>/dev/null; do sleep 0.1; done")
    guest.ask("echo 1 >/proc/sys/net/ipv4/conf/all/accept_local")
    for card in (0, 1):
        guest.ask(f"ip addr add 10.8.0.{card + 1}/24 dev eth{card} && ip link set eth{card} up")
    guest.ask("until arping -q -c 1 -w 1 -I eth0 10.8.0.2; do :; done")
    guest.ask("port=$(basename $(dirname $(grep -l example /sys/class/virtio-ports/*/name)))")
    for descriptor, name in enumerate(INPUTS.values(), 3):
        # As descriptors of the shell, from now on: Linux keeps their events.
        guest.ask(f"file=$(grep -l '{name}' /sys/class/input/event*/device/name)")
        guest.ask("event=${file#/sys/class/input/}; event=${event%%/*}")
        guest.ask(f"exec {descriptor}</dev/input/$event")
    guest.ask("seq 500000 | head -c 3145728 >/tmp/pattern; kept=kept")
    for device in DISKS:
        guest.ask(f"dd if=/tmp/pattern of=/dev/{device} bs=64k oflag=direct")
    # What is under way on the slowest host takes this much of the guest's time.
    wait = str(int(limit))
    for load in LOADS:
        loop = load.replace("WAIT", wait)
        guest.machine.console.send(f"({loop}) 2>/dev/null &\n")
        guest.machine.console.expect(PROMPT, limit)


def _check(guest: Guest, port: MemoryConsole, mark: str, limit: float) -> None:
    """Each device does what it is for, and the shell's variable is there."""
    machine = guest.machine
    guest.ask('[ "$kept" = kept ]')
    for device in DISKS:
        # Past the guest's own cache.
        guest.ask(f"dd if=/dev/{device} bs=64k count=48 iflag=direct | cmp - /tmp/pattern")
        guest.ask(f"echo {mark} | dd of=/dev/{device} bs=512 seek=8192 conv=sync oflag=direct")
        said = guest.ask(f"dd if=/dev/{device} bs=512 skip=8192 count=1 iflag=direct")
        assert mark in said, said
    guest.ask("blockdev --flushbufs /dev/sr0; head -c 20 /dev/sr0 | grep -q 'on the disc'")
    guest.ask(f"echo {mark} | dd of=/dev/fd0 bs=512 seek=7 conv=sync,fsync")
    guest.ask("blockdev --flushbufs /dev/fd0")
    said = guest.ask("dd if=/dev/fd0 bs=512 skip=7 count=1")
    assert mark in said, said
    guest.ask("arping -q -c 2 -I eth0 10.8.0.2")
    guest.ask("head -c 64 /dev/hwrng | wc -c | grep -q 64")
    guest.ask(f"echo {mark} > /dev/$port")
    port.expect(mark, limit)
    guest.ask("hwclock -r -u || hwclock -u")
    machine.balloon.target = 32 << 20
    _until(lambda: machine.balloon.actual == 32 << 20, "the balloon takes 32 MiB", limit)
    machine.balloon.target = 0
    _until(lambda: machine.balloon.actual == 0, "the balloon gives them back", limit)
    for descriptor, each in enumerate(machine.inputs, 3):
        assert each.key("a" if each.model == "keyboard" else "left")
        # It goes down and up, each with its SYN_REPORT: four of struct input_event.
        guest.ask(f"dd bs=24 count=4 <&{descriptor} 2>/dev/null | wc -c | grep -q 96")
    assert machine.exec(["echo", mark], timeout=limit).stdout == f"{mark}\n".encode()
    # Processors come and go by the guest's own hand.
    guest.ask("echo 0 >/sys/devices/system/cpu/cpu1/online")
    guest.ask("echo 1 >/sys/devices/system/cpu/cpu1/online; [ $(nproc) = 2 ]")


def _until(met: Callable[[], bool], what: str, limit: float) -> None:
    end = time.monotonic() + limit
    while not met():
        assert time.monotonic() < end, what
        time.sleep(0.05)


if __name__ == "__main__":
    goes_from_engine_to_engine(
        ["bt", "kvm", "bt"],
        Path("/suite/vmlinuz"),
        Path("/suite/initrd"),
        Path("/tmp"),
        1200,
        lambda words: print(f"outer: {words}", flush=True),
    )
