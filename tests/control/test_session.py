"""The public client of QMP, qemu.qmp, with the control socket of a machine."""

import asyncio
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient
from tests.control.conftest import Make
from tests.machine import guests

from tetrarch import HostError, Machine, MachineStateError, StopReason

LIMIT_S = 30


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[QMPClient]:
    client = QMPClient("tests")
    await client.connect(str(path))
    try:
        yield client
    finally:
        with suppress(EOFError):  # the machine may have hung up first
            await client.disconnect()


def session(path: Path, talk: Callable[[QMPClient], Coroutine[Any, Any, None]]) -> None:
    """Lets ``talk`` use a client that has negotiated."""

    async def run() -> None:
        async with asyncio.timeout(LIMIT_S), connected(path) as client:
            await talk(client)

    asyncio.run(run())


async def event(client: QMPClient, name: str) -> Any:
    """The next event, which is to be ``name``; its data."""
    message = await client.events.get()
    assert message["event"] == name
    assert set(message) <= {"event", "data", "timestamp"}
    return message.get("data")


def started(make: Make, **options: object) -> Machine:
    vm = make(**options)
    vm.start()
    vm.console.expect("up", LIMIT_S)
    return vm


def test_socket_is_for_its_user_alone(make: Make, socket_path: Path) -> None:
    with make() as vm:
        vm.start()
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    assert not socket_path.exists(), "it goes with the machine"


def test_machine_is_stopped_resumed_reset_and_ended(make: Make, socket_path: Path) -> None:
    vm = started(make, name="web")

    async def talk(client: QMPClient) -> None:
        assert await client.execute("query-name") == {"name": "web"}
        assert await client.execute("query-status") == {"status": "running", "running": True}
        assert await client.execute("stop") == {}
        assert await client.execute("stop") == {}
        assert await event(client, "STOP") is None
        assert await client.execute("query-status") == {"status": "paused", "running": False}
        await client.execute("cont")
        await client.execute("cont")
        await event(client, "RESUME")
        await client.execute("system_powerdown")
        await event(client, "POWERDOWN")
        await client.execute("system_reset")
        assert await event(client, "RESET") == {"guest": False, "reason": "host-qmp-system-reset"}
        vm.console.expect("up", LIMIT_S)
        assert await client.execute("quit") == {}
        assert await event(client, "SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}

    session(socket_path, talk)
    status = vm.wait(LIMIT_S)
    assert (status.reason, vm.resets) == (StopReason.STOPPED, 1)
    assert "quit" in status.detail


def test_stopped_machine_can_be_ended(make: Make, socket_path: Path) -> None:
    vm = started(make)

    async def talk(client: QMPClient) -> None:
        await client.execute("stop")
        await event(client, "STOP")
        assert await client.execute("quit") == {}
        assert await event(client, "SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}

    session(socket_path, talk)
    assert vm.wait(LIMIT_S).reason is StopReason.STOPPED


def test_device_that_its_guest_does_not_give_up_stays(make: Make, socket_path: Path) -> None:
    # This guest knows nothing of hot-plug.
    vm = started(make)

    async def talk(client: QMPClient) -> None:
        device = {"driver": "virtio-rng-pci", "id": "kept"}
        await client.execute("device_add", device)
        await client.execute("device_del", {"id": "kept"})
        await client.execute("device_del", {"id": "kept"})
        with pytest.raises(ExecuteError, match="Duplicate device ID 'kept'"):
            await client.execute("device_add", device)
        shown = await client.execute("human-monitor-command", {"command-line": "info pci"})
        assert 'id "kept"' in str(shown)
        await client.execute("stop")
        # Nothing came before: it is not out.
        await event(client, "STOP")
        await client.execute("cont")
        await event(client, "RESUME")

    session(socket_path, talk)
    assert vm.running


def test_machine_tells_what_it_is(make: Make, socket_path: Path) -> None:
    make()

    async def talk(client: QMPClient) -> None:
        assert await client.execute("query-status") == {"status": "prelaunch", "running": False}
        version: Any = await client.execute("query-version")
        assert set(version["qemu"]) == {"major", "minor", "micro"}
        assert version["package"].startswith("tetrarch")
        commands: Any = await client.execute("query-commands")
        assert {"query-commands", "quit", "system_reset"} < {entry["name"] for entry in commands}

    session(socket_path, talk)


@pytest.mark.parametrize(
    ("code", "data"),
    [
        (guests.POWER_OFF, {"guest": True, "reason": "guest-shutdown"}),
        (guests.CF9_RESET, {"guest": True, "reason": "guest-reset"}),
        (guests.TRIPLE_FAULT, {"guest": True, "reason": "guest-panic"}),
    ],
    ids=["power-off", "reset", "crash"],
)
def test_end_by_the_guest_is_told(
    make: Make, socket_path: Path, code: bytes, data: dict[str, object]
) -> None:
    vm = make(code, on_reset="end")

    async def talk(client: QMPClient) -> None:
        vm.start()
        assert await event(client, "SHUTDOWN") == data

    session(socket_path, talk)


def test_reset_by_the_guest_is_told(make: Make, socket_path: Path) -> None:
    vm = make(guests.reset_until(3, guests.CF9_RESET))

    async def talk(client: QMPClient) -> None:
        vm.start()
        for _ in range(2):
            assert await event(client, "RESET") == {"guest": True, "reason": "guest-reset"}
        await event(client, "SHUTDOWN")

    session(socket_path, talk)


@pytest.mark.parametrize(
    ("command", "arguments", "error_class", "words"),
    [
        ("fly", {}, "CommandNotFound", "fly"),
        ("qmp_capabilities", {}, "CommandNotFound", "already complete"),
        ("stop", {"now": True}, "GenericError", "'now' is unexpected"),
        ("cont", {}, "GenericError", "not been started"),
        ("device_add", {"driver": "nvme", "monitor": 1}, "GenericError", "drive property"),
        ("device_add", {"driver": "virtio-rng-pci", "id_": "x"}, "GenericError", "'.*id_' not"),
        ("device_add", {"driver": "virtio-rng-pci", "monitor": 1}, "GenericError", "monitor' not"),
        ("device_add", {"driver": "virtio-rng-pci", "id": "\ud800"}, "GenericError", "'id'"),
    ],
)
def test_command_that_cannot_be_is_refused(
    make: Make,
    socket_path: Path,
    command: str,
    arguments: dict[str, Any],
    error_class: str,
    words: str,
) -> None:
    make()

    async def talk(client: QMPClient) -> None:
        with pytest.raises(ExecuteError, match=words) as raised:
            await client.execute(command, arguments)
        assert raised.value.error.error.class_ == error_class
        assert await client.execute("query-status"), "the session goes on"

    session(socket_path, talk)


def test_several_clients_each_have_all_events(make: Make, socket_path: Path) -> None:
    started(make)

    async def run() -> None:
        async with (
            asyncio.timeout(LIMIT_S),
            connected(socket_path) as first,
            connected(socket_path) as second,
            connected(socket_path) as third,
        ):
            await asyncio.gather(*(client.execute("query-name") for client in (first, second)))
            await first.execute("stop")
            await second.execute("cont")
            for client in (first, second, third):
                await event(client, "STOP")
                await event(client, "RESUME")

    asyncio.run(run())


def test_client_that_goes_away_does_not_disturb_the_others(make: Make, socket_path: Path) -> None:
    vm = started(make)

    async def talk(client: QMPClient) -> None:
        for _ in range(100):
            async with connected(socket_path):
                pass
        status: Any = await client.execute("query-status")
        assert status["running"]

    session(socket_path, talk)
    assert vm.running


def test_machine_has_one_control_socket(make: Make, socket_path: Path) -> None:
    vm = make(control=None)
    vm.serve_control(socket_path)
    with pytest.raises(MachineStateError, match="has a control socket"):
        vm.serve_control(socket_path.with_name("other"))


def test_socket_of_a_living_machine_is_not_taken(make: Make, socket_path: Path) -> None:
    make()
    with pytest.raises(HostError, match=r"cannot listen on the control socket .*in use"):
        make()


def test_socket_of_a_dead_machine_is_replaced(make: Make, socket_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path))
    make()

    async def talk(client: QMPClient) -> None:
        assert await client.execute("query-status")

    session(socket_path, talk)


@pytest.mark.parametrize("name", ["/nonexistent/control", "/tmp/" + "x" * 200])
def test_place_where_no_socket_can_be_is_one_line(make: Make, name: str) -> None:
    with pytest.raises(HostError, match=r"cannot listen on the control socket .*; name another"):
        make(control=name)
