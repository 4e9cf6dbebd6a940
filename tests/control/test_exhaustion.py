"""A process without descriptors, or with more of them than select(2) counts."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch.sockets import SocketDirectory
from tetrarch.testing import pvh_kernel

LIMIT_S = 60
#: A machine with four sockets. It says how much of a CPU it takes in a second without descriptors,
#: in which all of them are called.
WITHOUT = """
import os, resource, sys, time
from pathlib import Path
from tetrarch import Machine
from tetrarch.console.shared import SharedConsole

kernel, place = Path(sys.argv[1]), Path(sys.argv[2])
shared = SharedConsole(place / "console")
port = f"socket={place}/port"
with Machine(
    kernel=kernel, memory="16M", engine="bt", console=shared, virtio_console=port,
    control=place / "control", gdb=place / "gdb",
) as vm:
    vm.start()
    while "up" not in shared.text:
        time.sleep(0.01)
    vm.pause()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, limits[1]))
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        print("none left", flush=True)
    sys.stdin.readline()
    before = time.process_time()
    time.sleep(1)
    print("busy" if time.process_time() - before > 0.5 else "idle", flush=True)
    sys.stdin.readline()
    for descriptor in taken:
        os.close(descriptor)
    sys.stdin.readline()
"""

#: A machine in a process that has more than 1024 files open.
WITH_MANY = """
import os, resource, sys, threading
from pathlib import Path
from tetrarch import Machine

limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
for _ in range(1100):
    os.open("/dev/null", os.O_RDONLY)
kernel, place = Path(sys.argv[1]), Path(sys.argv[2])
with Machine(kernel=kernel, memory="16M", engine="bt", console="stdio", gdb=place / "gdb") as vm:
    vm.start()
    met = threading.Event()
    point = vm.breakpoint(int(sys.argv[3]), lambda hit: met.set())
    print("runs", file=sys.stderr, flush=True)
    assert met.wait(60)
    point.remove()
    print("met", file=sys.stderr, flush=True)
    vm.wait(60)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    with SocketDirectory() as directory:
        yield directory


def start(program: str, place: Path, code: bytes, *words: str) -> subprocess.Popen[str]:
    kernel = place / "kernel"
    kernel.write_bytes(pvh_kernel(code))
    return subprocess.Popen(
        [sys.executable, "-c", program, str(kernel), str(place), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def connect(stack: ExitStack, path: Path) -> socket.socket:
    client = stack.enter_context(socket.socket(socket.AF_UNIX))
    client.settimeout(LIMIT_S)
    client.connect(str(path))
    return client


def test_who_connects_waits_until_there_are_descriptors(place: Path) -> None:
    code = guests.say(b"up\n") + guests.ENDLESS_LOOP
    with ExitStack() as stack:
        process = stack.enter_context(start(WITHOUT, place, code))
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "none left\n"
        clients = {
            name: [connect(stack, place / name) for _ in range(2)]
            for name in ("control", "console", "port", "gdb")
        }
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "idle\n"
        process.stdin.write("\n")
        process.stdin.flush()
        for one in clients["control"]:
            assert "QMP" in json.loads(one.makefile("rb").readline())
        for one in clients["console"]:
            one.shutdown(socket.SHUT_WR)
            assert one.makefile("rb").readline() == b"up\n"
        clients["gdb"][0].sendall(b"$?#3f")
        assert clients["gdb"][0].recv(1) == b"+"
        assert clients["port"][1].recv(100).startswith(b"tetrarch: the console has a client")
        _, said = process.communicate("\n", LIMIT_S)
    assert process.returncode == 0, said
    told = [line for line in said.splitlines() if "ulimit -n" in line]
    assert len(told) == 4, said
    assert "Traceback" not in said


def test_number_of_a_descriptor_can_be_any(place: Path) -> None:
    behind_input = 0x10_0000 + guests.ECHO.index(b"\xba\xf8")
    with (
        start(WITH_MANY, place, guests.ECHO, str(behind_input)) as process,
        ExitStack() as stack,
    ):
        assert process.stdin is not None
        assert process.stderr is not None
        assert process.stdout is not None
        assert process.stderr.readline() == "runs\n"
        process.stdin.write("a")
        process.stdin.flush()
        assert process.stderr.readline() == "met\n"
        assert process.stdout.read(1) == "a"
        gdb = connect(stack, place / "gdb")
        gdb.sendall(b"$?#3f")
        assert gdb.recv(1) == b"+"
        gdb.sendall(b"$k#6b")
        _, said = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, said) == (0, "")
