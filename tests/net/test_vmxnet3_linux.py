"""Linux uses VMXNET3 cards by VMware's own driver."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from tests.net.card_traffic import carries, copied_at, need_ip, takes_large_frames
from tests.net.namespace import in_namespace, ip, need_root
from tests.net.test_linux import HOST, PAGE, made, shell, web
from tests.net.test_programs import drops
from tests.programs import initrd_with

from tetrarch import Machine
from tetrarch._native import Vm
from tetrarch.cards import Vmxnet3Card
from tetrarch.images import CachedGuest
from tetrarch.net import NetSpec, open_network
from tetrarch.net.mac import format_mac, stable_mac

__all__ = ["web"]

COMPLAINTS = r"BUG|Oops|WARNING|Call Trace|tx hang|: resetting|error 0x|blocked for more"


@pytest.mark.usefixtures("need_passt")
def test_guest_on_vmware_gets_a_page_and_goes_on_in_another_process(
    debian_guest: CachedGuest, web: int, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    net = "user,model=vmxnet3"
    with Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        name="one",
        net=net,
        platform="vmware",
        cpus=2,
    ) as vm:
        vm.start()
        ask = shell(vm)
        assert format_mac(stable_mac("one", 0)) in ask("cat /sys/class/net/eth0/address")
        log = ask("dmesg | grep vmxnet3")
        assert "# of Tx queues : 2, # of Rx queues : 2" in log
        assert "intr type 3, mode 0, 3 vectors allocated" in log
        assert "NIC Link is Up 10000 Mbps" in log
        said = ask(f"wget -q -O /tmp/page http://{HOST}:{web}/ && wc -c </tmp/page")
        assert f"{len(PAGE)}" in said
        assert not [name for name in vm.stats()["net0"] if "malformed" in name]
        vm.save(saved)
    with Machine.restore(saved, net=net) as vm:
        vm.start()
        vm.console.send("\n")
        ask = shell(vm)
        said = ask(f"wget -q -O /tmp/page http://{HOST}:{web}/ && wc -c </tmp/page")
        assert f"{len(PAGE)}" in said
        log = ask("dmesg")
        assert not re.search(COMPLAINTS, log), log


@pytest.mark.long
@need_root
@need_ip
@pytest.mark.timeout(900)
@in_namespace
def test_offloads_on_and_off_carry_iperf_and_copies_unharmed(
    standard_guest: CachedGuest, tmp_path: Path
) -> None:
    initrd = initrd_with(standard_guest, ["iperf3", "ethtool"], tmp_path)
    data = bytes(hashlib.shake_256(b"copied").digest(24 << 20))
    net = "tap=t0,model=vmxnet3"
    with made(standard_guest, initrd=initrd, net=net, cpus=2, memory="512M") as vm:
        ip("addr add 10.8.0.1/24 dev t0")
        vm.start()
        ask = shell(vm)
        with copied_at(ask, data, tmp_path / "www") as digest:
            assert "driver: vmxnet3" in ask("ethtool -i eth0")
            left = ask("ethtool -k eth0")
            for feature in (
                "rx-checksumming",
                "tx-checksum-ip-generic",
                "tx-tcp-segmentation",
                "tx-tcp6-segmentation",
                "large-receive-offload",
                "rx-vlan-offload",
            ):
                assert f"{feature}: on" in left, left
            for features in ("", "lro off", "tso off", "tx off", "rx off", "sg off"):
                carries(ask, features, digest)
            # What the card has counted, by queue.
            said = ask("ethtool -S eth0")
            sent = [int(count) for count in re.findall(r"ucast pkts tx: (\d+)", said)]
            came = [int(count) for count in re.findall(r"ucast pkts rx: (\d+)", said)]
            assert len(sent) == len(came) == 2
            assert min(*sent, *came) > 100
            assert not re.search(r"pkts (tx|rx) err: +[1-9]", said), said
            takes_large_frames(ask, "lro on tso on rx on tx on sg on")
        assert drops(vm) == {}
        log = ask("dmesg")
        assert not re.search(COMPLAINTS, log), log


@pytest.mark.long
@need_root
@need_ip
@pytest.mark.timeout(600)
@in_namespace
def test_the_line_serves_and_the_link_goes(debian_guest: CachedGuest) -> None:
    options = {"append_extra": "pci=nomsi", "net": "tap=t0,model=vmxnet3"}
    with made(debian_guest, cpus=2, **options) as vm:  # type: ignore[arg-type]
        ip("addr add 10.8.0.1/24 dev t0")
        vm.start()
        ask = shell(vm)
        assert "intr type 1" in ask("dmesg | grep vmxnet3")
        ask("ip addr add 10.8.0.2/24 dev eth0")
        assert "200 packets received" in ask("ping -c 200 -i 0.01 -s 1400 10.8.0.1")
        ip("link del t0")
        ask("until dmesg | grep 'NIC Link is Down'; do sleep 0.1; done")
        assert "0" in ask("cat /sys/class/net/eth0/carrier")
        log = ask("dmesg")
        assert not re.search(COMPLAINTS, log), log


@pytest.mark.long
@need_root
@need_ip
@pytest.mark.timeout(900)
@in_namespace
def test_card_outlives_sleep_and_comes_and_goes(standard_guest: CachedGuest) -> None:
    with made(standard_guest, net="tap=t0,model=vmxnet3") as vm:
        ip("addr add 10.8.0.1/24 dev t0")
        assert isinstance(vm.engine_vm, Vm)
        vm.start()
        ask = shell(vm)
        ask("ip addr add 10.8.0.2/24 dev eth0")
        # All that a guest does to its devices when it sleeps, and when it wakes again.
        for _ in range(3):
            ask("echo devices > /sys/power/pm_test && echo freeze > /sys/power/state")
            assert "5 packets received" in ask("ping -c 5 10.8.0.1")
        for turn in range(5):
            network = open_network(NetSpec.parse("tap=t1"))
            mac = stable_mac("plugged", turn)
            vm.attach_pci(Vmxnet3Card(vm.engine_vm, network, "net7", mac), name="net7")
            ip("addr add 10.9.0.1/24 dev t1")
            ask("until [ -e /sys/class/net/eth1 ]; do sleep 0.05; done")
            assert format_mac(mac) in ask("cat /sys/class/net/eth1/address")
            ask("ip addr add 10.9.0.2/24 dev eth1 && ip link set eth1 up")
            ask("ping -c 3 10.9.0.1")
            ask("(ping -A -q -w 30 10.9.0.1 >/dev/null 2>&1 &)")
            vm.detach("net7", timeout=120)
            ask("[ ! -e /sys/class/net/eth1 ]")
        log = ask("dmesg")
        assert not re.search(COMPLAINTS, log), log
