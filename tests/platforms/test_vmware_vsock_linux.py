"""Linux's VMCI transport: programs of the guest with AF_VSOCK and programs of the host."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tetrarch import Machine
from tetrarch.agent.capture import Completed
from tetrarch.images import CachedGuest, Initramfs

LIMIT_S = 120.0
SOURCE = Path(__file__).parent / "vsock_peer.c"
MIB = 1 << 20

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


class Linux:
    """A guest of Debian's kernel with the program ``peer``."""

    def __init__(self, guest: CachedGuest, folder: Path, append: str = "") -> None:
        self.path, self.folder = folder / "vsock", folder
        program = folder / "peer"
        subprocess.run(["gcc", "-O1", "-static", "-o", program, SOURCE], check=True, timeout=60)
        tree = Initramfs()
        tree.file("bin/peer", program.read_bytes(), 0o755)
        initrd = folder / "initrd.gz"
        initrd.write_bytes(guest.initrd.read_bytes() + tree.gzip())
        self.vm = Machine(
            engine="bt",
            platform="vmware",
            kernel=guest.kernel,
            initrd=initrd,
            vsock=self.path,
            append_extra=append,
            memory="512M",
        )
        self.vm.start()
        self._threads = ThreadPoolExecutor(64)

    def run(self, *command: str, data: bytes = b"") -> Completed:
        return self.vm.exec(command, data, timeout=LIMIT_S)

    def begin(self, *command: str, data: bytes = b"") -> Future[Completed]:
        return self._threads.submit(self.run, *command, data=data)

    def listen(self, port: int) -> socket.socket:
        """For what the guest sends to a port of the host."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self.path}_{port}")
        listener.listen(64)
        listener.settimeout(LIMIT_S)
        return listener

    def connect(self, port: int) -> socket.socket:
        """To a port of the guest, when somebody listens there."""
        for _ in range(1000):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(LIMIT_S)
            client.connect(str(self.path))
            client.sendall(b"CONNECT %d\n" % port)
            said = b""
            while not said.endswith(b"\n") and (more := client.recv(1)):
                said += more
            if said.startswith(b"OK "):
                return client
            client.close()
        raise AssertionError(f"nobody listens at {port}")


@pytest.fixture(scope="module")
def linux(standard_guest: CachedGuest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Linux]:
    guest = Linux(standard_guest, tmp_path_factory.mktemp("vsock"))
    yield guest
    guest.vm.kill()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seen(data: bytes) -> tuple[int, str]:
    return len(data), digest(data)


def rest(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def exchange(client: socket.socket, data: bytes) -> bytes:
    """Sends all of it, and reads until the other end has said all."""

    def send() -> None:
        with contextlib.suppress(OSError):  # what comes back is then not all, either
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    back = b""
    with contextlib.suppress(ConnectionResetError):
        while more := client.recv(1 << 16):
            back += more
    sender.join(LIMIT_S)
    return back


def test_drivers_bind_and_commands_come_by_them(linux: Linux) -> None:
    assert linux.run("ls", "/sys/bus/pci/drivers/vmw_vmci").stdout.startswith(b"0000:")
    modules = linux.run("lsmod").stdout.decode()
    assert "vmw_vsock_vmci_transport" in modules
    assert "vmw_vsock_virtio_transport" not in modules
    data = os.urandom(8 * MIB)
    assert digest(linux.run("cat", data=data).stdout) == digest(data)


@pytest.mark.parametrize("size", ["128", "5000", "65536", "262144", "1048576"])
def test_both_ends_send_at_once(linux: Linux, size: str) -> None:
    """With rings of a size, to a program of the host and to one of the guest."""
    total = 16 * MIB if int(size) > 1 << 14 else MIB // 4
    ours, theirs = (random.Random(seed).randbytes(total) for seed in (1, 2))
    with linux.listen(80) as listener:
        guest = linux.begin("peer", "connect", "80", size, data=theirs)
        client, _ = listener.accept()
        client.settimeout(LIMIT_S)
        with client:
            got = seen(exchange(client, ours))
        done = guest.result(LIMIT_S)
        assert (done.code, done.stderr, *seen(done.stdout)) == (0, b"", *seen(ours))
        assert got == seen(theirs)
    Path(f"{linux.path}_80").unlink()
    guest = linux.begin("peer", "listen", "90", size, data=theirs)
    with linux.connect(90) as client:
        got = seen(exchange(client, ours))
    done = guest.result(LIMIT_S)
    assert (done.code, done.stderr, *seen(done.stdout)) == (0, b"listening\n", *seen(ours))
    assert got == seen(theirs)


def test_twenty_connections_at_once(linux: Linux) -> None:
    data = [random.Random(number).randbytes(MIB // 2) for number in range(20)]
    with linux.listen(81) as listener, ThreadPoolExecutor(20) as pool:

        def serve() -> str:
            client, _ = listener.accept()
            client.settimeout(LIMIT_S)
            with client:
                text = rest(client)
                client.sendall(text)
            return digest(text)

        served = [pool.submit(serve) for _ in data]
        guests = [linux.begin("peer", "connect", "81", data=one) for one in data]
        got = [guest.result(LIMIT_S) for guest in guests]
        assert [digest(one.stdout) for one in got] == [digest(one) for one in data]
        assert sorted(one.result() for one in served) == sorted(digest(one) for one in data)
    Path(f"{linux.path}_81").unlink()


def test_what_nobody_listens_to(linux: Linux) -> None:
    done = linux.run("peer", "connect", "82")
    assert (done.code, done.stderr) == (1, b"connect: Connection reset by peer\n")
    done = linux.run("peer", "datagram", "82")
    assert (done.code, done.stderr) == (1, b"sendto: No route to host\n")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LIMIT_S)
        client.connect(str(linux.path))
        client.sendall(b"CONNECT 91\n")
        assert client.recv(1) == b""


def test_guest_that_closes_loses_nothing(linux: Linux) -> None:
    """Its kernel takes the queue pair back as soon as the program has ended."""
    with linux.listen(83) as listener:
        for _ in range(20):
            done = linux.begin("sh", "-c", "head -c 200000 /dev/zero | peer connect 83")
            client, _ = listener.accept()
            client.settimeout(LIMIT_S)
            with client:
                # So that it waits for nothing when it has written all.
                client.shutdown(socket.SHUT_WR)
                done.result(LIMIT_S)
                assert len(rest(client)) == 200_000
    Path(f"{linux.path}_83").unlink()


def test_program_that_goes_ends_the_guests(linux: Linux) -> None:
    with linux.listen(84) as listener:
        guest = linux.begin("sh", "-c", "yes | peer connect 84 >/dev/null")
        client, _ = listener.accept()
        client.settimeout(LIMIT_S)
        assert client.recv(100)
        client.close()
        assert b"send" in guest.result(LIMIT_S).stderr
    Path(f"{linux.path}_84").unlink()


def test_saved_guest_hears_that_its_connections_are_gone(
    standard_guest: CachedGuest, tmp_path: Path
) -> None:
    linux = Linux(standard_guest, tmp_path)
    with linux.listen(85) as listener:
        linux.run("sh", "-c", "peer connect 85 </dev/null >/tmp/out 2>&1 &")
        client, _ = listener.accept()
        with client:
            client.sendall(b"before\n")
            while linux.run("cat", "/tmp/out").stdout != b"before\n":
                pass
            saved = tmp_path / "saved"
            linux.vm.save(saved)
            linux.vm.kill()
    with Machine.restore(saved, vsock=linux.path) as vm:
        vm.start()
        linux.vm = vm
        assert linux.run("cat", "/tmp/out").stdout.startswith(b"before\n")
        assert linux.run("sh", "-c", "while pidof peer; do sleep 0.1; done").code == 0
        data = os.urandom(MIB)
        assert linux.run("cat", data=data).stdout == data


def test_guest_that_is_reset_has_none_either(linux: Linux) -> None:
    with linux.listen(86) as listener:
        linux.run("sh", "-c", "(sleep 1000 | peer connect 86) </dev/null >/dev/null 2>&1 &")
        client, _ = listener.accept()
        client.settimeout(LIMIT_S)
        with client:
            linux.run("sh", "-c", "(sleep 0.5; reboot -f) </dev/null >/dev/null 2>&1 &")
            assert rest(client) == b""
    Path(f"{linux.path}_86").unlink()
    data = os.urandom(MIB)
    assert linux.run("cat", data=data).stdout == data
