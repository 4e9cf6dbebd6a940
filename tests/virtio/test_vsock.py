"""The socket device where its process is short of something; what it does else is Rust's to test
(``crates/virtio/src/vsock/tests.rs``)."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

LIMIT_S = 60

# The limit is the process's, which has to be one of its own.
_WITHOUT_DESCRIPTORS = """
import os, resource, sys, time
from pathlib import Path
from tests.virtio.driver import Driver, Mmio
from tests.virtio.test_balloon import Wire
from tetrarch._native import Vm
from tetrarch.virtio.mmio import VirtioMmio
from tetrarch.virtio.vsock import VsockKind

vm = Vm("bt", 16 << 20)
device = VirtioMmio(VsockKind(vm, Path(sys.argv[1])), Wire())
driver = Driver(vm, Mmio(device))
driver.start(3)
driver.offer(0, [(0x40_0000, 4096, True)])
held = []
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    print("none left", flush=True)
sys.stdin.readline()
before = time.process_time()
time.sleep(1)
print("idle" if time.process_time() - before < 0.5 else "busy", driver.used_index(0), flush=True)
for descriptor in held:
    os.close(descriptor)
driver.wait(0)
print(int.from_bytes(vm.read_memory(0x40_0000 + 20, 4), "little"))
"""


def test_who_connects_waits_until_the_process_has_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "vsock"
    with (
        subprocess.Popen(
            [sys.executable, "-c", _WITHOUT_DESCRIPTORS, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        socket.socket(socket.AF_UNIX) as client,
        socket.socket(socket.AF_UNIX) as other,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "none left\n"
        client.connect(str(path))
        client.sendall(b"CONNECT 1234\n")
        other.connect(str(path))
        out, err = process.communicate("go\n", LIMIT_S)
    # Its thread has slept meanwhile; then the guest is asked for the port.
    assert out == "idle 0\n1234\n", err
    assert err.count("\n") == 1, err
    assert f"programs that connect to {path} wait" in err
    assert "raise the limit of open files: ulimit -n" in err
