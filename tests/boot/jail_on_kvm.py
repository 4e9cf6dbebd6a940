"""Runs in the outer system: a confined guest on engine kvm uses disks, is reset, and ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tetrarch import block, connect
from tetrarch.remote import RemoteMachine

LIMIT_S = 600
SIZE = 8 << 20


def cli(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "tetrarch", *words], check=True, timeout=LIMIT_S)


def use(vm: RemoteMachine, device: str) -> None:
    # As in tests/nodes.py.
    script = (
        f"n=0; until (: </dev/{device}) 2>/dev/null || [ $((n += 1)) = 600 ]; do sleep 0.1; done; "
        "head -c 1000000 /dev/urandom > /tmp/data; "
        f"dd if=/tmp/data of=/dev/{device} bs=64k conv=fsync 2>/dev/null; "
        f"echo 3 > /proc/sys/vm/drop_caches; head -c 1000000 /dev/{device} | cmp - /tmp/data"
    )
    done = vm.exec(["sh", "-c", script], timeout=LIMIT_S)
    assert done.code == 0, (device, done)


def main() -> None:
    images = {"vda": "/tmp/a.qcow2", "nvme0n1": "/tmp/b.img,bus=nvme"}
    for image in (*images.values(), "/tmp/later.qcow2"):
        block.create(Path(image.partition(",")[0]), SIZE)
    disks = [word for image in images.values() for word in ("--disk", image)]
    guest = ("--kernel", "/suite/vmlinuz", "--initrd", "/suite/initrd", "--memory", "384M")
    cli("run", "--detach", "--name", "web", "--engine", "kvm", "--cpus", "2", *guest, *disks)
    vm = connect("web")
    for device in images:
        use(vm, device)
    print("the disks have what was written", flush=True)
    cli("attach-disk", "--device", "later", "web", "/tmp/later.qcow2")
    use(vm, "vdb")
    cli("detach", "web", "later")
    print("a disk came and went")
    for task in Path(f"/proc/{vm.about.pid}/task").iterdir():
        lines = (line.partition(":\t") for line in (task / "status").read_text().splitlines())
        status = {key: value for key, _, value in lines}
        print(f"thread {status['Name']} has seccomp {status['Seccomp']}")
    vm.reset()
    use(vm, "vda")
    print("and it was reset")
    cli("stop", "web")
    cli("logs", "web")


main()
