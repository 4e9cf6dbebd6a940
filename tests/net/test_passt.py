"""User networks: passt started, watched, ended."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from tests.net.card import Card
from tests.net.processes import passts
from tests.virtio.driver import wait_until

from tetrarch import HostError, Machine
from tetrarch.net import NetSpec, open_network
from tetrarch.testing import pvh_kernel

FORWARD = "user,forward={}:22"


@pytest.fixture
def port() -> int:
    """One that is free, as far as a test can know."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    return number


@pytest.mark.usefixtures("need_passt")
def test_network_ends_with_its_card(port: int) -> None:
    before = passts()
    card = Card(open_network(NetSpec.parse(FORWARD.format(port))))
    assert len(passts() - before) == 1
    # passt listens for the guest.
    socket.create_connection(("127.0.0.1", port), timeout=30).close()
    card.kind.close()
    assert passts() == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=30)


@pytest.mark.usefixtures("need_passt")
def test_network_that_no_card_took_ends_too() -> None:
    before = passts()
    network = open_network(NetSpec("user"))
    assert len(passts() - before) == 1
    network.close()
    assert passts() == before


@pytest.mark.usefixtures("need_passt")
def test_passt_that_dies_is_told_and_the_link_is_down() -> None:
    told: list[str] = []
    heard = threading.Event()

    def ended(cause: str) -> None:
        told.append(cause)
        heard.set()

    before = passts()
    card = Card(open_network(NetSpec("user"), ended))
    card.start(2)
    assert card.device.config(6, 2) == 1
    (pid,) = passts() - before
    os.kill(pid, signal.SIGKILL)
    assert heard.wait(30)
    assert told == ["passt has ended by signal 9"]
    wait_until(lambda: card.device.config(6, 2) == 0, "the link is not down")
    card.kind.close()


@pytest.mark.usefixtures("need_passt")
def test_passt_that_ends_with_its_card_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    card = Card(open_network(NetSpec("user"), told.append))
    close = card.kind.network.close

    def close_when_it_has_ended() -> None:
        for thread in threading.enumerate():
            if thread.name == "passt":
                thread.join(30)
        close()

    monkeypatch.setattr(card.kind.network, "close", close_when_it_has_ended)
    card.kind.close()
    assert told == []


def test_no_passt_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"no passt, .*; install it \(Debian: apt-get install"):
        open_network(NetSpec("user"))


@pytest.mark.usefixtures("need_passt")
def test_port_in_use_is_one_line(port: int) -> None:
    before = passts()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(HostError, match=f"cannot forward port {port} of 127.0.0.1: Address"):
            open_network(NetSpec.parse(FORWARD.format(port)))
    with pytest.raises(HostError, match=r"192\.0\.2\.77: .*; name an address of this host"):
        open_network(NetSpec.parse(f"user,forward=192.0.2.77:{port}:22"))
    assert passts() == before


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no route >&2; exit 3", "passt did not start: no route; give what"),
        ("exit 1", "passt did not start: it ended with code 1; give what"),
    ],
)
def test_passt_that_does_not_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str
) -> None:
    program = tmp_path / "passt"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(HostError) as raised:
        open_network(NetSpec("user"))
    assert str(raised.value).startswith(message)


@pytest.mark.usefixtures("need_passt")
def test_machine_that_is_not_made_leaves_no_passt(tmp_path: Path) -> None:
    before = passts()
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(b"\xf4"))
    with pytest.raises(HostError, match="cannot make the socket"):
        Machine(engine="bt", kernel=kernel, net="user", vsock=tmp_path / ("x" * 120))
    assert passts() == before
    with Machine(engine="bt", kernel=kernel, net=["user", "user"]):
        assert len(passts() - before) == 2
    assert passts() == before


@pytest.mark.usefixtures("need_passt")
def test_machine_says_that_its_network_has_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = passts()
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(b"\xf4"))
    with Machine(engine="bt", kernel=kernel, net="user", name="one"):
        (pid,) = passts() - before
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "has ended" in caplog.text, "nothing is said")
    (record,) = [one for one in caplog.records if "has ended" in one.message]
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "one: net0: passt has ended by signal 9; the link is down until the machine starts anew"
    )
