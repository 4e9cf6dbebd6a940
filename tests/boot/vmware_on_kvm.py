"""Runs in the outer system: a guest of VMware's on engine kvm."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import threading
import time
from pathlib import Path

from tests.vnc.viewer import Viewer

from tetrarch import Machine, block

PROMPT = "root@tetrarch:~# "
LIMIT_S = 1200
MIB = 1 << 20
LOG = (
    "Hypervisor detected: VMware",
    "DMI: VMware, Inc. VMware Virtual Platform",
    "vmware: TSC freq read from hypervisor",
    "vmware: hypercall mode: 0x00",  # the port
)
FIO = (
    "fio --name=all --filename=/dev/sda --rw=randwrite --bsrange=4k-64k --direct=1 "
    "--ioengine=libaio --iodepth=16 --verify=crc32c --do_verify=1 --verify_fatal=1 "
    "--output-format=terse --minimal"
)


def exchange(server: socket.socket, data: bytes, digests: list[str]) -> None:
    """Notes the hash of what who connects has, and then sends data there."""
    connection, _ = server.accept()
    with connection:
        got = hashlib.sha256()
        while some := connection.recv(1 << 16):
            got.update(some)
        digests.append(got.hexdigest())
        connection.sendall(data)


def main() -> None:
    block.create("/tmp/disk", 8 * MIB)
    machine = Machine(
        engine="kvm",
        platform="vmware",
        memory="512M",
        kernel="/suite/vmlinuz",
        initrd="/suite/initrd",
        disk="/tmp/disk,bus=pvscsi",
        net=["tap=t0,model=vmxnet3", "tap=t1,model=e1000"],
        display="vnc=/tmp/vnc",
    )
    with machine:
        for tap, network in (("t0", "10.8.0"), ("t1", "10.9.0")):
            address = f"{network}.1/24"
            subprocess.run(["busybox", "ip", "addr", "add", address, "dev", tap], check=True)
        machine.start()
        machine.console.expect(PROMPT, LIMIT_S)

        def ask(command: str) -> str:
            machine.console.send(command + "; echo status $?\n")
            said = machine.console.expect(PROMPT, LIMIT_S)
            assert "status 0" in said, said
            return said

        log = ask("dmesg")
        assert all(line in log for line in LOG), log
        print("outer: Linux has found VMware", flush=True)
        # As in tests/nodes.py.
        ask("until (: </dev/sda) 2>/dev/null; do sleep 0.1; done")
        ask("ls /sys/bus/pci/drivers/vmw_pvscsi | grep 0000")
        ask(FIO)
        print("outer: fio has found what it wrote to PVSCSI", flush=True)
        data = Path("/suite/initrd").read_bytes()
        for driver, network in (("vmxnet3", "10.8.0"), ("e1000", "10.9.0")):
            ask(
                f"card=$(ls /sys/bus/pci/drivers/{driver}/*/net) && "
                f"ip addr add {network}.2/24 dev $card && ip link set $card up"
            )
            ask(f"until ping -c 1 -w 9 {network}.1; do :; done")
            ask(f"ping -A -c 100 -s 1400 {network}.1 | grep '100 packets received'")
            digests = list[str]()
            with socket.create_server((f"{network}.1", 0)) as server:
                thread = threading.Thread(target=exchange, args=(server, data, digests))
                thread.start()
                ask(f"nc {network}.1 {server.getsockname()[1]} </bin/busybox >/tmp/got")
                thread.join()
            said = ask("sha256sum /tmp/got /bin/busybox")
            assert hashlib.sha256(data).hexdigest() in said, said
            assert digests[0] in said, (said, digests)
            ask("! dmesg | grep -E 'NETDEV WATCHDOG|Tx Unit Hang|BUG:'")
            print(f"outer: {driver} has carried both ways", flush=True)
        # As in tests/platforms/test_vmware_screen.py.
        ask("sh /bench/load; ls /sys/bus/pci/drivers/vmwgfx | grep 0000; grep vmwgfx /proc/fb")
        machine.console.send("kms_picture\n")
        machine.console.expect("drawn 1280x800", LIMIT_S)
        pattern = bytes(
            colour & 255 for y in range(800) for x in range(1280) for colour in (x ^ y, y, x)
        )
        with Viewer("/tmp/vnc") as viewer:
            viewer.until(lambda: viewer.pixels == pattern)
            assert machine.screen().pixels == pattern
            machine.console.send("rect 100 50 300 200 112233\n")
            machine.console.expect("drawn", LIMIT_S)
            changed = bytearray(pattern)
            for y in range(50, 250):
                at = 3 * (1280 * y + 100)
                changed[at : at + 900] = b"\x11\x22\x33" * 300
            viewer.until(lambda: viewer.pixels == bytes(changed))
        machine.console.send("end\n")
        machine.console.expect(PROMPT, LIMIT_S)
        print("outer: vmwgfx draws, and a viewer sees it", flush=True)
        ask("ls /sys/bus/pci/drivers/vmw_vmci | grep 0000")
        end = time.monotonic() + LIMIT_S
        machine.balloon.target = 64 * MIB
        while machine.balloon.actual < 64 * MIB:
            assert time.monotonic() < end
            time.sleep(0.1)
        ask("grep -E ': +[1-9][0-9]* .*vmw_vmci' /proc/interrupts")
        print("outer: VMCI's doorbell has woken the balloon", flush=True)
        machine.console.send("poweroff -f\n")
        assert machine.wait(LIMIT_S).ok
    print("outer: the guest has powered off", flush=True)


if __name__ == "__main__":
    main()
