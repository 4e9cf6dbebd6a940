"""A million datagrams each way: every one arrives, or whoever dropped it has counted it."""

from __future__ import annotations

import re
import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from tests.net.namespace import in_namespace, ip, need_root
from tests.net.test_linux import made, shell
from tests.programs import initrd_with
from tests.virtio.driver import wait_until

from tetrarch import Machine
from tetrarch.images import CachedGuest

COUNT: Final = 1_000_000
SIZE: Final = 64
HOST, GUEST, PORT = "10.8.0.1", "10.8.0.2", 9000
#: A socket's room for what its program has not taken, whatever the limit of the system is
#: (asm-generic/socket.h).
ROOM: Final = 16 << 20
SO_RCVBUFFORCE: Final = 33
#: The host waits for the card after so many: a tap keeps more than that.
AHEAD: Final = 400
LIMIT_S: Final = 600
STRAGGLERS_S: Final = 2

# The number 0 says that it is over.
SEND: Final = f"""
socket(S, 2, 2, 17); $to = pack("Sna4x8", 2, {PORT}, pack("C4", split(/\\./, "{HOST}")));
for ($ARGV[0] .. $ARGV[1]) {{ send(S, pack("N", $_) x {SIZE // 4}, 0, $to) == {SIZE} or die $! }}
"""
RECEIVE: Final = f"""
socket(S, 2, 2, 17); setsockopt(S, 1, {SO_RCVBUFFORCE}, pack("i", {ROOM}));
bind(S, pack("Sna4x8", 2, {PORT}, "")) or die $!;
open(F, ">/tmp/ready"); close(F);
while (1) {{
    recv(S, $d, 2 * {SIZE}, 0); $n = unpack("N", $d); last if !$n; $came++;
    $bad++ if length($d) != {SIZE} || $n > {COUNT} || vec($seen, $n, 1); vec($seen, $n, 1) = 1;
}}
print "came ", $came + 0, " bad ", $bad + 0, "\\n";
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    need_root,
    pytest.mark.skipif(shutil.which("ip") is None, reason="no ip: apt-get install iproute2"),
]


@dataclass
class Frames:
    """What one of those on the way has counted, by the guest's ways."""

    sent: int
    sent_dropped: int
    received: int
    received_dropped: int


def of_tap() -> Frames:
    """The host's kernel, at t0."""
    text = Path("/proc/thread-self/net/dev").read_text()
    (line,) = (line for line in text.splitlines() if line.strip().startswith("t0:"))
    counts = [int(word) for word in line.partition(":")[2].split()]
    # Bytes, packets, errors, dropped, and four others, each way: what comes in was sent.
    return Frames(counts[1], counts[2] + counts[3], counts[9], counts[10] + counts[11])


def of_card(machine: Machine) -> Frames:
    stats = machine.stats()["net0"]
    sent, received = (
        sum(stats[name] for name in stats if name.startswith(f"{way}_dropped"))
        for way in ("sent", "received")
    )
    return Frames(stats["sent"], sent, stats["received"], received)


def of_guest(ask: Callable[[str], str]) -> Frames:
    names = "tx_packets tx_dropped rx_packets rx_dropped"
    said = ask(f"echo =$(cd /sys/class/net/eth0/statistics && cat {names})")
    found = re.search(r"=(\d+) (\d+) (\d+) (\d+)", said)
    assert found is not None
    return Frames(*map(int, found.groups()))


def overflows(sockets: str) -> int:
    """Datagrams for which the socket at PORT had no room, by the last column of /proc/net/udp."""
    (line,) = (line for line in sockets.splitlines() if f":{PORT:04X} " in line)
    return int(line.split()[-1])


class Receiver(threading.Thread):
    """The host's end."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.came = bytearray(COUNT + 1)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
        self.socket.settimeout(LIMIT_S)
        self.socket.bind((HOST, PORT))

    def run(self) -> None:
        while number := self._number():
            self.came[number] += 1
        # The end may overtake some: a CPU of the host's takes it while another is busy with them.
        self.socket.settimeout(STRAGGLERS_S)
        with suppress(TimeoutError):
            while True:
                self.came[self._number()] += 1

    def _number(self) -> int:
        return int.from_bytes(self.socket.recv(2 * SIZE)[:4])


def send_to_guest(first: int, last: int) -> None:
    """Numbers, no faster than the card takes them from the tap."""
    before = of_tap()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect((GUEST, PORT))
        for number in range(first, last + 1):
            sender.send(number.to_bytes(4) * (SIZE // 4))
            if number % AHEAD == 0:
                wait_until(lambda: gone(before) >= number, "the card takes nothing")  # noqa: B023


def gone(before: Frames) -> int:
    """Frames that are in the tap no more."""
    now = of_tap()
    return now.received + now.received_dropped - before.received - before.received_dropped


@in_namespace
def test_each_of_a_million_packets_is_accounted_for(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    scripts = {"send": SEND, "receive": RECEIVE}
    initrd = initrd_with(debian_guest, ["perl"], tmp_path, scripts)
    with made(debian_guest, initrd=initrd, net="tap=t0", memory="512M") as vm:
        ip(f"addr add {HOST}/24 dev t0")
        vm.start()
        ask = shell(vm, LIMIT_S)
        ask(f"ip addr add {GUEST}/24 dev eth0 && ping -c 1 {HOST}")

        receiver = Receiver()
        receiver.start()
        ask(f"perl /bin/send 1 {COUNT}")
        frames = of_guest(ask).sent
        wait_until(lambda: of_tap().sent >= frames, "frames are on their way")
        ask("perl /bin/send 0 0")
        receiver.join(LIMIT_S)
        lost = overflows(Path("/proc/thread-self/net/udp").read_text())
        receiver.socket.close()
        counted = f"{of_guest(ask)}, {of_card(vm)}, {of_tap()}, {lost} of the socket"
        assert (sum(receiver.came) + lost, max(receiver.came)) == (COUNT, 1), counted

        ask("(perl /bin/receive >/tmp/came 2>&1 &)")
        ask("until [ -e /tmp/ready ]; do sleep 0.1; done")
        before = of_tap()
        send_to_guest(1, COUNT)
        wait_until(lambda: gone(before) >= COUNT, "frames are on their way")
        dropped = of_tap().received_dropped - before.received_dropped
        lost = overflows(ask("cat /proc/net/udp"))
        send_to_guest(0, 0)
        said = ask("until [ -s /tmp/came ]; do sleep 0.1; done; cat /tmp/came")
        found = re.search(r"came (\d+) bad (\d+)", said)
        assert found is not None, said
        assert (int(found[1]) + lost + dropped, int(found[2])) == (COUNT, 0)

        # Guest, card and host have counted the same frames. What nobody asked for came to the card.
        # Linux counts what it has sent when it takes the buffer back: with the next one received.
        def settled() -> bool:
            ask(f"ping -c 1 {HOST}")
            return of_guest(ask).sent == of_card(vm).sent

        wait_until(settled, "the guest has its buffers back")
        guest, card, tap = of_guest(ask), of_card(vm), of_tap()
        assert (guest.sent, card.sent) == (card.sent, tap.sent)
        assert (guest.sent_dropped, card.sent_dropped, tap.sent_dropped) == (0, 0, 0)
        assert (card.received, guest.received) == (
            tap.received,
            card.received - card.received_dropped,
        )
        assert min(guest.sent, guest.received + dropped) > COUNT
