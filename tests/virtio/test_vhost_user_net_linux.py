"""Linux and a network card by vhost-user: a neighbour in Python, whom it pings."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from tests.virtio import back_end
from tests.virtio.back_end import BackEnd, Request
from tests.virtio.test_blk_linux import shell

from tetrarch import Machine
from tetrarch.images import CachedGuest
from tetrarch.machine.config import VirtioTransport

HEADER = 12
MAC, IP = b"\x02\0\0\0\0\x42", bytes([10, 0, 0, 1])


def checksum(data: bytes) -> bytes:
    total: int = sum(
        struct.unpack(f">{len(data) // 2}H", data.ljust(len(data) + len(data) % 2, b"\0"))
    )
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2, "big")


def reply(frame: bytes) -> bytes | None:
    """To a question for the neighbour's address (RFC 826), and to an echo (RFC 792)."""
    source, kind = frame[6:12], frame[12:14]
    if kind == b"\x08\x06" and frame[38:42] == IP:
        return source + MAC + frame[12:20] + b"\0\2" + MAC + IP + frame[22:32]
    if kind == b"\x08\0" and frame[23] == 1 and frame[34] == 8 and frame[30:34] == IP:
        echo = frame[38 : 14 + int.from_bytes(frame[16:18], "big")]
        sums = checksum(bytes(4) + echo)
        addresses = IP + frame[26:30]
        return source + MAC + frame[12:26] + addresses + bytes(2) + sums + echo
    return None


@pytest.mark.parametrize("virtio", ["pci", "mmio"])
def test_neighbour_answers(
    debian_guest: CachedGuest, tmp_path: Path, virtio: VirtioTransport
) -> None:
    with BackEnd(tmp_path / "net", protocol=back_end.REPLY_ACK) as end:

        def answer(request: Request) -> bytes | None:
            if request.ring == 0:
                return None
            frame = reply(request.readable[HEADER:])
            if frame is not None and end.kept:
                # One buffer, of which the header says so.
                header = bytes(10) + (1).to_bytes(2, "little")
                end.finish(end.kept.pop(0), header + frame)
            return b""

        end.answer = answer
        with Machine(
            engine="bt",
            kernel=debian_guest.kernel,
            initrd=debian_guest.initrd,
            net=f"vhost-user={tmp_path}/net,mac=02:00:00:00:00:07",
            virtio=virtio,
        ) as vm:
            ask = shell(vm)
            assert "02:00:00:00:00:07" in ask("cat /sys/class/net/eth0/address")
            ask("ip address add 10.0.0.2/24 dev eth0")
            assert "0% packet loss" in ask("ping -c 3 -i 0.1 -s 1000 10.0.0.1")
            end.hang_up()
            ask("until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done")
            vm.console.send("poweroff -f\n")
            assert vm.wait(60).ok
