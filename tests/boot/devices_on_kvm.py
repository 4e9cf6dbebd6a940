"""Runs in the outer system: a guest on engine kvm writes to all disks and a network at once."""

from __future__ import annotations

import socket
import subprocess
import threading
from pathlib import Path

from tetrarch import Machine, block

PROMPT = "root@tetrarch:~# "
LIMIT_S = 1200
DISKS = {"virtio": "vda", "nvme": "nvme0n1", "ahci": "sda", "ide": "sdb"}
# As in tests/storage/test_fio_linux.py, and smaller: an emulated CPU that has guests is slow.
SIZE = 8 << 20
FIO = (
    "fio --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=16 "
    "--verify=crc32c --do_verify=1 --verify_fatal=1 --output-format=terse --minimal"
)


def echo(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        while data := connection.recv(1 << 16):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def main() -> None:
    disks = []
    for bus in DISKS:
        path = Path(f"/tmp/{bus}.img")
        block.create(path, SIZE)
        disks.append(f"{path},bus={bus}")
    machine = Machine(
        engine="kvm",
        cpus=2,
        memory="512M",
        kernel="/suite/vmlinuz",
        initrd="/suite/initrd",
        disk=disks,
        net="tap=t0,queues=2",
    )
    with machine:
        subprocess.run(["busybox", "ip", "addr", "add", "10.8.0.1/24", "dev", "t0"], check=True)
        machine.start()
        machine.console.expect(PROMPT, LIMIT_S)

        def ask(command: str) -> str:
            machine.console.send(command + "; echo status $?\n")
            said = machine.console.expect(PROMPT, LIMIT_S)
            assert "status 0" in said, said
            return said

        ask("ip addr add 10.8.0.2/24 dev eth0")
        for device in DISKS.values():
            ask(f"until [ -b /dev/{device} ]; do sleep 0.1; done")
        with socket.create_server(("10.8.0.1", 0)) as server:
            thread = threading.Thread(target=echo, args=(server,))
            thread.start()
            port = server.getsockname()[1]
            jobs = " ".join(
                f"--name={bus} --filename=/dev/{device}" for bus, device in DISKS.items()
            )
            # Meanwhile the network has a file both ways.
            ask("cat /bin/busybox /bin/busybox /bin/busybox >/tmp/sent")
            ask(f"(nc 10.8.0.1 {port} </tmp/sent >/tmp/got; echo $? >/tmp/over) & true")
            ask(f"{FIO} {jobs}")
            print("outer: every disk has what fio wrote", flush=True)
            ask("until [ -e /tmp/over ]; do sleep 0.2; done; cmp /tmp/sent /tmp/got")
            thread.join()
        ask("ping -A -c 200 -s 1400 10.8.0.1 | grep '200 packets received'")
        print("outer: the network has carried both ways", flush=True)
        queues = ask("ls -d /sys/class/net/eth0/queues/tx-*")
        assert "tx-1" in queues, queues
        # Linux may warn of the emulated CPU, whose CPUID and XSAVE differ: no device's affair.
        ask("! dmesg | grep -E 'I/O error|exception Emask|nvme.*timeout|NETDEV WATCHDOG|BUG:'")
        machine.console.send("poweroff -f\n")
        assert machine.wait(LIMIT_S).ok
    print("outer: the guest has powered off", flush=True)


if __name__ == "__main__":
    main()
