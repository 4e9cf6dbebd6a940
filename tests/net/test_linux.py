"""Linux uses network cards: the default guest, by its own driver."""

from __future__ import annotations

import hashlib
import http.server
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Unpack

import pytest
from tests.net.namespace import in_namespace, ip, need_root
from tests.net.pcap import frames_of
from tests.net.processes import passts

from tetrarch import Machine
from tetrarch._native import Vm
from tetrarch.images import CachedGuest
from tetrarch.machine.config import MachineOptions, VirtioTransport
from tetrarch.net import Flow, NetSpec, open_network
from tetrarch.net.mac import format_mac, stable_mac
from tetrarch.virtio import VirtioPci
from tetrarch.virtio.net import NetKind

PROMPT = "root@tetrarch:~# "
PAGE = b"a page of the host\n" * 20_000
#: What the network of a user's own calls the host.
HOST = "$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')"


def shell(machine: Machine, limit_s: float = 120) -> Callable[[str], str]:
    machine.console.expect(PROMPT, limit_s)

    def ask(command: str) -> str:
        machine.console.send(command + "; echo status $?\n")
        said = machine.console.expect(PROMPT, limit_s)
        assert "status 0" in said, said
        return said

    return ask


def made(guest: CachedGuest, **options: Unpack[MachineOptions]) -> Machine:
    files: MachineOptions = {"engine": "bt", "kernel": guest.kernel, "initrd": guest.initrd}
    return Machine(**(files | options))


@pytest.fixture
def web() -> Iterator[int]:
    """The port of a server on the host's loopback that has one page."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(PAGE)))
            self.end_headers()
            self.wfile.write(PAGE)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.usefixtures("need_passt")
@pytest.mark.parametrize("virtio", ["pci", "mmio"])
def test_guest_gets_an_address_and_a_page_of_the_host(
    debian_guest: CachedGuest, web: int, tmp_path: Path, virtio: VirtioTransport
) -> None:
    path = tmp_path / "frames.pcap"
    with made(debian_guest, name="one", net=f"user,pcap={path}", virtio=virtio) as vm:
        vm.start()
        ask = shell(vm)
        assert format_mac(stable_mac("one", 0)) in ask("cat /sys/class/net/eth0/address")
        ask("grep nameserver /etc/resolv.conf")
        said = ask(f"wget -q -O /tmp/page http://{HOST}:{web}/ && wc -c </tmp/page")
        assert f"{len(PAGE)}" in said
        stats = vm.stats()["net0"]
        assert not [name for name in stats if "malformed" in name]
        ask("ip link set eth0 down")
    frames = frames_of(path)
    assert sum(map(len, frames)) > len(PAGE)
    assert any(b"GET / HTTP/1.1" in frame for frame in frames)
    # DHCP: what a client asks first (RFC 2131).
    assert any(frame[34:38] == bytes([0, 68, 0, 67]) for frame in frames)


@pytest.mark.usefixtures("need_passt")
def test_filter_says_which_flows_pass(debian_guest: CachedGuest, web: int) -> None:
    asked: list[Flow] = []

    def allows(flow: Flow) -> bool:
        asked.append(flow)
        return flow.destination_port != web

    with made(debian_guest, net=NetSpec("user", filter=allows)) as vm:
        vm.start()
        ask = shell(vm)
        ask(f"! nc -w 5 {HOST} {web} </dev/null")
        assert vm.stats()["net0"]["sent_dropped_filtered"] >= 1
    refused = [flow for flow in asked if flow.destination_port == web]
    assert len(refused) >= 1
    assert {flow.protocol for flow in refused} == {6}
    assert all(flow.outgoing for flow in refused)


def test_guests_at_one_socket_reach_each_other(debian_guest: CachedGuest, tmp_path: Path) -> None:
    net = f"socket={tmp_path / 'net'}"
    with ExitStack() as stack:
        machines = [
            stack.enter_context(made(debian_guest, name=name, net=net)) for name in ("one", "two")
        ]
        for machine in machines:
            machine.start()
        one, two = map(shell, machines)
        one("ip addr add 10.9.0.1/24 dev eth0")
        two("ip addr add 10.9.0.2/24 dev eth0")
        said = one("ping -c 3 10.9.0.2")
        assert "3 packets received" in said
        # More than a frame, and the other way.
        one("httpd -p 80 -h /bin")
        two("wget -q -O /tmp/got http://10.9.0.1/busybox && cmp /tmp/got /bin/busybox")
        stats = [machine.stats()["net0"] for machine in machines]
        dropped = [name for one in stats for name in one if "malformed" in name]
        assert not dropped


@pytest.mark.usefixtures("need_passt")
def test_what_a_filter_raises_ends_the_machine(debian_guest: CachedGuest) -> None:
    class Mistake(Exception):
        pass

    def allows(flow: Flow) -> bool:
        raise Mistake(str(flow))

    with made(debian_guest, net=NetSpec("user", filter=allows)) as vm:
        vm.start()
        with pytest.raises(Mistake, match=r"udp .* to .*:67"):
            vm.wait(120)


@need_root
@pytest.mark.skipif(shutil.which("ip") is None, reason="no ip: apt-get install iproute2")
@in_namespace
def test_guest_reaches_the_host_by_a_tap(debian_guest: CachedGuest) -> None:
    with made(debian_guest, net="tap=t0,queues=2") as vm:
        ip("addr add 10.8.0.1/24 dev t0")
        vm.start()
        ask = shell(vm)
        ask("ip addr add 10.8.0.2/24 dev eth0")
        assert "3 packets received" in ask("ping -c 3 10.8.0.1")
        with socket.create_server(("10.8.0.1", 0)) as server:
            server.settimeout(60)
            port = server.getsockname()[1]
            vm.console.send(f"nc 10.8.0.1 {port} </bin/busybox\n")
            connection, _ = server.accept()
            with connection, connection.makefile("rb") as file:
                got = file.read()
        vm.console.expect(PROMPT, 60)
        digest = hashlib.sha256(got).hexdigest()
        assert digest in ask("sha256sum /bin/busybox")
        stats = vm.stats()["net0"]
        assert stats["sent_bytes"] > len(got)
        assert not [name for name in stats if "malformed" in name]


@need_root
@pytest.mark.skipif(shutil.which("ip") is None, reason="no ip: apt-get install iproute2")
@in_namespace
def test_guest_sees_what_its_network_loses_and_how_slow_it_is(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    path = tmp_path / "frames.pcap"
    with made(debian_guest, net=f"tap=t0,delay=20ms,loss=25%,pcap={path}") as vm:
        ip("addr add 10.8.0.1/24 dev t0")
        vm.start()
        ask = shell(vm)
        ask("ip addr add 10.8.0.2/24 dev eth0")
        # Until an answer to ARP has come through.
        ask("until ping -c 1 -W 1 10.8.0.1; do :; done")
        said = ask("ping -c 200 -i 0.01 -W 1 -s 1000 10.8.0.1")
        found = re.search(r"200 packets transmitted, (\d+) packets received", said)
        assert found is not None, said
        received = int(found[1])
        # A quarter is lost each way, so that 112 come back; by chance never so few or many.
        assert 60 < received < 160
        # There and back. No host is too slow for that.
        fastest = re.search(r"min/avg/max = ([0-9.]+)/", said)
        assert fastest is not None, said
        assert float(fastest[1]) >= 40
        stats = vm.stats()["net0"]
        assert stats["sent_dropped_lost"] + stats["received_dropped_lost"] >= 200 - received
        ask("ip link set eth0 down")
    # The capture has what the guest sent, and what came to it. ICMP: 8 asks, 0 answers (RFC 792).
    types = [frame[34] for frame in frames_of(path) if len(frame) == 14 + 20 + 8 + 1000]
    assert (types.count(8), types.count(0)) == (200, received)


@pytest.mark.usefixtures("need_passt")
def test_restored_machine_has_its_network(
    debian_guest: CachedGuest, web: int, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    with made(debian_guest, net="user") as vm:
        vm.start()
        ask = shell(vm)
        address = ask("cat /sys/class/net/eth0/address")
        vm.save(saved)
    with Machine.restore(saved, net="user") as vm:
        vm.start()
        vm.console.send("\n")
        ask = shell(vm)
        assert ask("cat /sys/class/net/eth0/address") == address
        said = ask(f"wget -q -O /tmp/page http://{HOST}:{web}/ && wc -c </tmp/page")
        assert f"{len(PAGE)}" in said


@pytest.mark.usefixtures("need_passt")
def test_card_is_plugged_in_and_out(debian_guest: CachedGuest, web: int) -> None:
    before = passts()
    with made(debian_guest) as vm:
        assert isinstance(vm.engine_vm, Vm)
        vm.start()
        ask = shell(vm)
        ask("modprobe virtio_net")
        for turn in range(3):
            network = open_network(NetSpec.parse("user"))
            card = NetKind(vm.engine_vm, network, "net7", stable_mac("plugged", turn))
            vm.attach_pci(VirtioPci(vm.engine_vm, card), name="net7")
            ask("until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done")
            assert format_mac(stable_mac("plugged", turn)) in ask("cat /sys/class/net/eth0/address")
            ask("udhcpc -i eth0 -s /etc/udhcpc -q -n >/dev/null 2>&1")
            ask(f"wget -q -O /tmp/page http://{HOST}:{web}/ && rm /tmp/page")
            vm.detach("net7", timeout=120)
            ask("[ ! -e /sys/class/net/eth0 ]")
            assert passts() == before
