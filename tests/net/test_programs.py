"""Cards under load and under other people's programs: iperf3, ethtool, tcpdump and QEMU."""

from __future__ import annotations

import json
import re
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pexpect
import pytest
from tests.net.namespace import in_namespace, ip, need_root
from tests.net.test_linux import PROMPT, made, shell
from tests.net.test_tap import link
from tests.programs import initrd_with
from tests.virtio.driver import wait_until

from tetrarch import Machine
from tetrarch._native import Vm
from tetrarch.images import CachedGuest
from tetrarch.net import NetSpec, open_network
from tetrarch.net.mac import stable_mac
from tetrarch.virtio import VirtioPci
from tetrarch.virtio.net import NetKind

pytestmark = pytest.mark.long

_SECONDS = 3


def figures(said: str) -> dict[str, Any]:
    """What ``iperf3 --json`` found, at its end."""
    end: dict[str, Any] = json.loads(said[said.index("{") : said.rindex("}") + 1])["end"]
    return end


def measure(ask: Callable[[str], str], options: str) -> dict[str, Any]:
    return figures(ask(f"iperf3 --json --time {_SECONDS} {options}"))


def drops(machine: Machine) -> dict[str, int]:
    """Frames that were lost; those that came before the driver did, or for nobody, are none."""
    stats = machine.stats()["net0"]
    return {
        name: count
        for name, count in stats.items()
        if "dropped" in name and not name.endswith("unwanted")
    }


@need_root
@pytest.mark.skipif(shutil.which("ip") is None, reason="no ip: apt-get install iproute2")
@in_namespace
def test_two_guests_and_the_host_carry_iperf_over_a_bridge(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    initrd = initrd_with(debian_guest, ["iperf3", "ethtool"], tmp_path)
    ip("link add br0 type bridge")
    ip("addr add 10.8.0.1/24 dev br0")
    ip("link set br0 up")
    with ExitStack() as stack:
        machines = [
            stack.enter_context(
                made(debian_guest, initrd=initrd, net=f"tap=t{index},bridge=br0", memory="512M")
            )
            for index in (0, 1)
        ]
        for machine in machines:
            machine.start()
        one, two = map(shell, machines)
        for index, ask in enumerate((one, two)):
            ask("ip link set lo up")
            ask(f"ip addr add 10.8.0.{index + 2}/24 dev eth0")
        for address in ("10.8.0.1", "10.8.0.3"):
            assert "10 packets received" in one(f"ping -c 10 -i 0.1 -s 1400 {address}")

        # What Linux leaves to the card, by its own account.
        left = one("ethtool -k eth0")
        for feature in (
            "tx-checksum-ip-generic",
            "tx-tcp-segmentation",
            "tx-tcp6-segmentation",
            "rx-gro-hw",
        ):
            assert f"{feature}: on" in left, left

        server = subprocess.Popen(["iperf3", "-s", "-B", "10.8.0.1"], stdout=subprocess.DEVNULL)
        try:
            two("iperf3 -s -D")
            before = machines[0].stats()["net0"]
            for peer in ("10.8.0.1", "10.8.0.3"):
                for way in ("", "--reverse"):
                    end = measure(one, f"-c {peer} {way}")
                    assert end["sum_received"]["bytes"] > 1 << 20
            # Datagrams have numbers: iperf3 counts those that are missing.
            end = measure(one, "-c 10.8.0.1 --udp --bitrate 20M --length 1400")
            assert end["sum"]["packets"] > 1000
            assert end["sum"]["lost_packets"] <= end["sum"]["packets"] // 100
            after = machines[0].stats()["net0"]
            # Segmentation is left to the card: its frames are larger than the network's.
            frames = after["sent"] - before["sent"]
            assert after["sent_bytes"] - before["sent_bytes"] > 1514 * frames
        finally:
            server.kill()
            server.wait()
        assert [drops(machine) for machine in machines] == [{}, {}]


@need_root
@pytest.mark.skipif(shutil.which("ip") is None, reason="no ip: apt-get install iproute2")
@in_namespace
def test_every_pair_of_queues_that_ethtool_turns_on_is_used(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    initrd = initrd_with(debian_guest, ["iperf3", "ethtool"], tmp_path)
    with made(debian_guest, initrd=initrd, net="tap=t0,queues=3", memory="512M") as vm:
        ip("addr add 10.8.0.1/24 dev t0")
        vm.start()
        ask = shell(vm)
        ask("ip addr add 10.8.0.2/24 dev eth0")

        def packets() -> dict[str, int]:
            said = ask("ethtool -S eth0")
            return {
                name: int(count)
                for name, count in re.findall(r"([rt]x_queue_\d)_packets: (\d+)", said)
            }

        server = subprocess.Popen(["iperf3", "-s", "-B", "10.8.0.1"], stdout=subprocess.DEVNULL)
        try:
            # A driver takes as many as there are CPUs, and others when it is told to.
            for pairs in (3, 1, 2):
                ask(f"ethtool -L eth0 combined {pairs}")
                before = packets()
                # Connections are spread over the queues by their ports.
                end = measure(ask, "-c 10.8.0.1 --bidir --parallel 16")
                assert end["sum_received"]["bytes"] > 1 << 20
                after = packets()
                used = {name for name in after if after[name] > before.get(name, 0)}
                assert used == {
                    f"{way}_queue_{pair}" for way in ("rx", "tx") for pair in range(pairs)
                }, (pairs, before, after)
            # In the middle of frames, too.
            ask("(iperf3 -c 10.8.0.1 --bidir --parallel 4 --time 60 >/dev/null 2>&1 &)")
            turns = " ".join(f"{turn % 3 + 1}" for turn in range(30))
            ask(f"for pairs in {turns}; do ethtool -L eth0 combined $pairs && sleep 0.1; done")
            ask("killall iperf3; ping -c 3 10.8.0.1")
        finally:
            server.kill()
            server.wait()
        said = ask("dmesg")
        assert not re.search(r"BUG|Oops|WARNING|Call Trace|timed out", said), said


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no QEMU on this host")
def test_guest_of_qemu_joins_a_socket(debian_guest: CachedGuest, tmp_path: Path) -> None:
    path = tmp_path / "net"
    with made(debian_guest, net=f"socket={path}") as vm:
        vm.start()
        ask = shell(vm)
        ask("ip addr add 10.9.0.1/24 dev eth0")
        qemu = pexpect.spawn(
            "qemu-system-x86_64",
            [
                *("-accel", "tcg", "-m", "512", "-nodefaults", "-no-user-config"),
                *("-display", "none", "-serial", "stdio", "-kernel", str(debian_guest.kernel)),
                *("-initrd", str(debian_guest.initrd), "-append", "console=ttyS0 quiet"),
                *("-netdev", f"stream,id=n,server=off,addr.type=unix,addr.path={path}"),
                *("-device", "virtio-net-pci,netdev=n"),
            ],
            encoding="utf-8",
            timeout=180,
        )
        try:
            qemu.expect_exact(PROMPT)
            qemu.sendline("ip addr add 10.9.0.2/24 dev eth0")
            qemu.expect_exact(PROMPT)
            assert "5 packets received" in ask("ping -c 5 -s 1400 10.9.0.2")
            qemu.sendline("ping -c 5 -s 1400 10.9.0.1")
            qemu.expect_exact("5 packets received")
            # More than a frame each way.
            ask("httpd -p 80 -h /bin")
            qemu.sendline(
                "wget -q -O /tmp/got http://10.9.0.1/busybox && cmp /tmp/got /bin/busybox"
                " && echo the sa''me"
            )
            qemu.expect_exact("the same")
        finally:
            qemu.close(force=True)


@need_root
@pytest.mark.skipif(shutil.which("ip") is None, reason="no ip: apt-get install iproute2")
@in_namespace
def test_shaped_network_is_what_linux_sees_and_tcpdump_reads(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    initrd = initrd_with(debian_guest, ["iperf3"], tmp_path)
    path = tmp_path / "frames.pcap"
    net = f"tap=t0,delay=100ms,rate=4M,pcap={path}"
    with made(debian_guest, initrd=initrd, net=net, memory="512M") as vm:
        ip("addr add 10.8.0.1/24 dev t0")
        vm.start()
        ask = shell(vm)
        ask("ip addr add 10.8.0.2/24 dev eth0")
        said = ask("ping -c 5 10.8.0.1")
        assert "5 packets received" in said
        match = re.search(r"min/avg/max = ([0-9.]+)/", said)
        assert match is not None, said
        # There and back. No host is too slow for that.
        assert float(match[1]) >= 200
        server = subprocess.Popen(["iperf3", "-s", "-B", "10.8.0.1"], stdout=subprocess.DEVNULL)
        try:
            end = measure(ask, "-c 10.8.0.1 --udp --bitrate 40M --length 1400")
        finally:
            server.kill()
            server.wait()
        # What the network does not carry is lost, and the card has counted it.
        assert end["sum"]["lost_packets"] > end["sum"]["packets"] // 2
        assert vm.stats()["net0"]["sent_dropped_queue_full"] > 0
        ask("ip link set eth0 down")
    if shutil.which("tcpdump") is None:
        pytest.skip("no tcpdump on this host: tools/test-packages long")
    read = subprocess.run(
        ["tcpdump", "-nr", str(path), "icmp"], capture_output=True, text=True, check=False
    )
    assert read.returncode == 0, read.stderr
    assert read.stdout.count("ICMP echo request") == 5
    assert read.stdout.count("ICMP echo reply") == 5


@contextmanager
def echo(address: str) -> Iterator[int]:
    """The port of a server that gives back what it is sent."""

    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            # Of a card that is unplugged nothing is heard any more, not even an end.
            self.request.settimeout(60)
            with suppress(OSError):
                while data := self.request.recv(1 << 16):
                    self.request.sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server((address, 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@need_root
@pytest.mark.skipif(shutil.which("ip") is None, reason="no ip: apt-get install iproute2")
@pytest.mark.timeout(900)
@in_namespace
def test_card_is_plugged_in_and_out_of_a_guest_that_is_busy(debian_guest: CachedGuest) -> None:
    with made(debian_guest, net="tap=t0") as vm:
        ip("addr add 10.8.0.1/24 dev t0")
        assert isinstance(vm.engine_vm, Vm)
        vm.start()
        ask = shell(vm)
        ask("ip addr add 10.8.0.2/24 dev eth0")
        ask("ping -A -q -s 1400 10.8.0.1 >/tmp/answers & true")
        for turn in range(50):
            before = vm.stats()["net0"]
            network = open_network(NetSpec.parse("tap=t1"))
            card = NetKind(vm.engine_vm, network, "net7", stable_mac("plugged", turn))
            vm.attach_pci(VirtioPci(vm.engine_vm, card), name="net7")
            ip("addr add 10.9.0.1/24 dev t1")
            ask("until [ -e /sys/class/net/eth1 ]; do sleep 0.05; done")
            ask("ip addr add 10.9.0.2/24 dev eth1 && ip link set eth1 up")
            with echo("10.9.0.1") as port:
                ask(f"(nc 10.9.0.1 {port} </dev/zero >/dev/null &)")
                # It goes in the middle of frames both ways.
                wait_until(
                    lambda card=card: (
                        min(card.stats()["sent_bytes"], card.stats()["received_bytes"]) > 1 << 20
                    ),
                    "the card carries nothing",
                    120,
                )
                vm.detach("net7", timeout=120)
            ask("[ ! -e /sys/class/net/eth1 ] && killall nc")
            assert link("t1") is None
            after = vm.stats()["net0"]
            # The card that stays goes on meanwhile.
            assert min(after[way] - before[way] for way in ("sent", "received")) > 10
        ask("killall -INT ping; wait; grep ' 0% packet loss' /tmp/answers")
        said = ask("dmesg")
        assert not re.search(r"BUG|Oops|WARNING|Call Trace|blocked for more", said), said
        vm.console.send("poweroff -f\n")
        assert vm.wait(120).ok
