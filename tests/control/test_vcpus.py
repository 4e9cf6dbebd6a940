"""CPUs that come and go by QMP, as QEMU's commands have it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.control.conftest import Make
from tests.machine import guests

from tetrarch.control.client import Client, ControlError

LIMIT_S = 60


def test_cpus_are_listed_come_by_where_they_lie_and_go(make: Make, socket_path: Path) -> None:
    vm = make(guests.watch_cpu_1(), cpus="1,max=4,sockets=2,threads=2")
    vm.start()
    with Client(socket_path) as client:
        listed = client.execute("query-hotpluggable-cpus")
        place = {"socket-id": 0, "core-id": 0, "thread-id": 1}
        assert listed[0] == {"type": "host-x86_64-cpu", "vcpus-count": 1, "props": place}
        assert [cpu.get("qom-path") for cpu in listed] == [
            *(None, None, None),
            "/machine/unattached/cpu[0]",
        ]
        driver = listed[0]["type"]
        client.execute("device_add", {"driver": driver, "id": "more", **place})
        client.execute("device_add", {"driver": driver})
        shown = {cpu["cpu-index"]: cpu for cpu in client.execute("query-cpus-fast")}
        assert shown.keys() == {0, 1, 2}
        assert shown[1]["qom-path"] == "/machine/peripheral/more"
        assert shown[2]["props"] == {"socket-id": 1, "core-id": 0, "thread-id": 0}
        for cpu in shown.values():
            assert Path(f"/proc/self/task/{cpu['thread-id']}").exists()
        info = {"command-line": "info registers -a"}
        found = re.findall(r"CPU#(\d)", client.execute("human-monitor-command", info))
        assert found == ["0", "1", "2"]
        client.execute("device_del", {"id": "/machine/peripheral/more"})
        vm.console.send("8")
        gone = client.next_event("DEVICE_DELETED", timeout=LIMIT_S)
        assert gone["data"] == {"device": "more", "path": "/machine/peripheral/more"}
        assert [cpu["cpu-index"] for cpu in client.execute("query-cpus-fast")] == [0, 2]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("device_add", {"id": "cpu0"}, "there is a CPU 'cpu0' already"),
        ("device_add", {"socket-id": 0, "core-id": 0, "thread-id": 0}, "CPU 0 is in the machine"),
        ("device_add", {"socket-id": 7, "core-id": 0, "thread-id": 0}, "there is no such CPU"),
        ("device_add", {"core-id": 1}, "there is no such CPU; query-hotpluggable-cpus lists them"),
        ("device_add", {"node-id": 1}, "Property 'host-x86_64-cpu.node-id' not found"),
        ("device_del", {"id": "cpu0"}, "CPU 0 stays in its machine"),
        ("device_del", {"id": "cpu1"}, "Device 'cpu1' not found"),
        ("x-registers", {"cpu-index": 1}, "Parameter 'cpu-index' expects a CPU number"),
    ],
)
def test_what_cannot_be_is_told(
    make: Make, socket_path: Path, command: str, arguments: dict[str, object], message: str
) -> None:
    vm = make(guests.watch_cpu_1(), cpus="1,max=2")
    vm.start()
    if command == "device_add":
        arguments = {"driver": "host-x86_64-cpu", **arguments}
    with Client(socket_path) as client, pytest.raises(ControlError, match=re.escape(message)):
        client.execute(command, arguments)
