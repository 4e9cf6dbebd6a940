"""Runs in the outer system: a guest on engine kvm writes to all disks, a network and a share."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import threading
from pathlib import Path

from tetrarch import Machine, block

PROMPT = "root@tetrarch:~# "
LIMIT_S = 1200
# Images by what the guest finds them as.
DISKS = {
    "vda": "virtio.img",
    "vdb": "virtio.qcow2",
    "nvme0n1": "nvme.qcow2",
    "sda": "ahci.img",
    "sdb": "ide.img",
}
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


def tree(root: Path) -> Path:
    """Files of many sizes in directories of many names; and an empty directory to copy them to."""
    Path("/tmp/taken").mkdir()
    for name in ("a", "b/c", "ä ö"):
        (root / name).mkdir(parents=True)
        for size in (0, 1, 4095, 4096, 4097, 300_000):
            (root / name / f"file {size}").write_bytes(os.urandom(size))
    return root


def hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def main() -> None:
    disks = []
    for name in DISKS.values():
        path = Path("/tmp", name)
        block.create(path, SIZE)
        disks.append(f"{path},bus={path.stem}")
    source = tree(Path("/tmp/shared"))
    sums = hashes(source)
    machine = Machine(
        engine="kvm",
        cpus=2,
        memory="512M",
        kernel="/suite/vmlinuz",
        initrd="/suite/initrd",
        disk=disks,
        net="tap=t0,queues=2",
        share=["/tmp/shared:shared,readonly", "/tmp/taken:taken"],
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
        for device in DISKS:
            # As in tests/nodes.py.
            ask(f"until (: </dev/{device}) 2>/dev/null; do sleep 0.1; done")
        with socket.create_server(("10.8.0.1", 0)) as server:
            thread = threading.Thread(target=echo, args=(server,))
            thread.start()
            port = server.getsockname()[1]
            jobs = " ".join(f"--name={name} --filename=/dev/{name}" for name in DISKS)
            # Meanwhile the network has a file both ways.
            ask("cat /bin/busybox /bin/busybox /bin/busybox >/tmp/sent")
            ask(f"(nc 10.8.0.1 {port} </tmp/sent >/tmp/got; echo $? >/tmp/over) & true")
            ask(f"{FIO} {jobs}")
            print("outer: every disk has what fio wrote", flush=True)
            ask("until [ -e /tmp/over ]; do sleep 0.2; done; cmp /tmp/sent /tmp/got")
            thread.join()
        ask("ping -A -c 200 -s 1400 10.8.0.1 | grep '200 packets received'")
        print("outer: the network has carried both ways", flush=True)
        ask("cp -a /mnt/shared /mnt/taken/ && ! touch /mnt/shared/new && sync")
        assert hashes(Path("/tmp/taken/shared")) == sums == hashes(source)
        print("outer: the shares have the same files", flush=True)
        queues = ask("ls -d /sys/class/net/eth0/queues/tx-*")
        assert "tx-1" in queues, queues
        # Linux may warn of the emulated CPU, whose CPUID and XSAVE differ: no device's affair.
        ask("! dmesg | grep -E 'I/O error|exception Emask|nvme.*timeout|NETDEV WATCHDOG|BUG:'")
        machine.console.send("poweroff -f\n")
        assert machine.wait(LIMIT_S).ok
    print("outer: the guest has powered off", flush=True)


if __name__ == "__main__":
    main()
