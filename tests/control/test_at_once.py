"""Clients that want the same at the same moment: one of them gets it."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.control.conftest import Make

from tetrarch import Machine
from tetrarch.control import Client, ControlError

ROUNDS = 40
CLIENTS = 4
Request = tuple[str, dict[str, Any]]


def at_once(clients: Sequence[Client], requests: Sequence[Request]) -> list[int]:
    """Which of the requests, each by a client of its own, was executed."""
    start = threading.Barrier(len(requests))
    done: list[int] = []

    def ask(number: int) -> None:
        start.wait()
        try:
            clients[number].execute(*requests[number])
        except ControlError:
            return
        done.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


@pytest.fixture
def vm(make: Make) -> Machine:
    """Whose guest does not run yet: nobody is asked to give a device up."""
    return make()


@pytest.fixture
def clients(vm: Machine, socket_path: Path) -> Iterator[Sequence[Client]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Client(socket_path)) for _ in range(CLIENTS)]


def test_an_image_has_one_name_and_one_device(
    vm: Machine, clients: Sequence[Client], tmp_path: Path
) -> None:
    images = [tmp_path / name for name in "abcd"]
    for image in images:
        image.write_bytes(bytes(1 << 20))
    for number in range(ROUNDS):
        node = f"n{number}"
        opened: list[Request] = [
            (
                "blockdev-add",
                {
                    "driver": "raw",
                    "node-name": node,
                    "file": {"driver": "file", "filename": str(image)},
                },
            )
            for image in images
        ]
        assert len(at_once(clients, opened)) == 1
        plugged: list[Request] = [
            ("device_add", {"driver": "virtio-blk-pci", "drive": node, "id": f"d{client}"})
            for client in range(CLIENTS)
        ]
        (device,) = at_once(clients, plugged)
        (shown,) = clients[0].execute("query-block")
        assert shown["qdev"] == f"/machine/peripheral/d{device}"
        vm.detach(f"d{device}")
        clients[0].execute("blockdev-del", {"node-name": node})
        # Nobody has one of them open any more.
        assert clients[0].execute("query-block") == []


def test_a_network_has_one_card_and_a_name_one_device(
    vm: Machine, clients: Sequence[Client], socket_path: Path
) -> None:
    address = {"type": "unix", "path": str(socket_path.with_name("net"))}
    for _ in range(ROUNDS):
        network: Request = ("netdev_add", {"type": "stream", "id": "net", "addr": address})
        assert len(at_once(clients, [network] * CLIENTS)) == 1
        cards: list[Request] = [
            ("device_add", {"driver": "virtio-net-pci", "netdev": "net", "id": f"c{client}"})
            for client in range(CLIENTS)
        ]
        (card,) = at_once(clients, cards)
        vm.detach(f"c{card}")
        clients[0].execute("netdev_del", {"id": "net"})
        device: Request = ("device_add", {"driver": "virtio-rng-pci", "id": "same"})
        assert len(at_once(clients, [device] * CLIENTS)) == 1
        vm.detach("same")


def test_images_and_devices_come_and_go_while_others_look_and_save(
    vm: Machine, clients: Sequence[Client], tmp_path: Path
) -> None:
    vm.start()
    image, saved = tmp_path / "image", tmp_path / "saved"
    image.write_bytes(bytes(1 << 20))
    node = {"driver": "file", "node-name": "n", "filename": str(image)}
    done = threading.Event()

    def come_and_go() -> None:
        for number in range(20):
            device = {"driver": "virtio-rng-pci", "id": f"d{number}"}
            clients[0].execute("device_add", device)
            for _ in range(20):
                clients[0].execute("blockdev-add", node)
                clients[0].execute("blockdev-del", {"node-name": "n"})
        done.set()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        while not done.is_set():
            clients[1].execute("query-block")
            clients[1].execute("query-blockstats")
            clients[1].execute("x-save", {"protocol": f"file:{saved}"})
            with Machine.restore(saved, console="none") as restored:
                assert not restored.running
    finally:
        thread.join()
