"""What the machine is (QEMU, qapi/machine.json)."""

from __future__ import annotations

from typing import Any, Final

from tetrarch.control.command import command
from tetrarch.control.human import human_command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError
from tetrarch.machine.balloon import Balloon
from tetrarch.machine.machine import Machine

__all__ = [
    "CPU_DRIVER",
    "balloon",
    "human_monitor_command",
    "query_balloon",
    "query_cpus_fast",
    "query_hotpluggable_cpus",
    "query_name",
    "query_target",
]


#: What device_add calls a CPU.
CPU_DRIVER: Final = "host-x86_64-cpu"


@command("query-name")
def query_name(monitor: Monitor) -> dict[str, str]:
    return {"name": monitor.machine.config.name}


@command("query-target")
def query_target(monitor: Monitor) -> dict[str, str]:
    return {"arch": "x86_64"}


@command("query-cpus-fast")
def query_cpus_fast(monitor: Monitor) -> list[dict[str, Any]]:
    machine = monitor.machine
    threads = machine.pc.vcpus.native_ids
    return [
        {
            "cpu-index": number,
            "qom-path": _cpu_path(machine, number),
            "thread-id": threads.get(number, 0),
            "props": _cpu_place(machine, number),
            "target": "x86_64",
        }
        for number in machine.pc.vcpus.numbers
    ]


@command("query-hotpluggable-cpus")
def query_hotpluggable_cpus(monitor: Monitor) -> list[dict[str, Any]]:
    """All that there can be, those first that are not in the machine; the others have a path."""
    machine = monitor.machine
    there = machine.pc.vcpus.numbers
    return [
        {
            "type": CPU_DRIVER,
            "vcpus-count": 1,
            "props": _cpu_place(machine, number),
            **({"qom-path": _cpu_path(machine, number)} if number in there else {}),
        }
        for number in sorted(range(machine.config.cpus.max), key=lambda number: number in there)
    ]


def _cpu_place(machine: Machine, number: int) -> dict[str, int]:
    socket, core, thread = machine.config.cpus.place(number)
    return {"socket-id": socket, "core-id": core, "thread-id": thread}


def _cpu_path(machine: Machine, number: int) -> str:
    """Of one that has come later with its name, which device_del takes."""
    name = machine.pc.vcpus.names.get(number)
    if number < machine.config.cpus.count and name == f"cpu{number}":
        return f"/machine/unattached/cpu[{number}]"
    return f"/machine/peripheral/{name}"


@command("balloon")
def balloon(monitor: Monitor, value: int) -> None:
    """How many bytes of its RAM the guest is to keep; the balloon takes the rest."""
    memory = monitor.machine.config.memory
    if value <= 0:
        raise QmpError("Parameter 'value' expects a size")
    _balloon(monitor.machine).target = max(memory - value, 0)


@command("query-balloon")
def query_balloon(monitor: Monitor) -> dict[str, int]:
    return {"actual": monitor.machine.config.memory - _balloon(monitor.machine).actual}


@command("human-monitor-command")
def human_monitor_command(monitor: Monitor, command_line: str, cpu_index: int | None = None) -> str:
    """Text for people, which programs had better not read."""
    index = cpu_index or 0
    if index not in monitor.machine.pc.vcpus.numbers:
        raise QmpError("Parameter 'cpu-index' expects a CPU number")
    return human_command(monitor.machine, command_line, index)


def _balloon(machine: Machine) -> Balloon:
    if not machine.config.balloon:
        raise QmpError("No balloon device has been activated", "DeviceNotActive")
    return machine.balloon
