"""What the machine is (QEMU, qapi/machine.json)."""

from __future__ import annotations

from typing import Any

from tetrarch.control.command import command
from tetrarch.control.human import human_command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError
from tetrarch.machine.machine import Machine
from tetrarch.virtio.balloon import BalloonKind

__all__ = [
    "balloon",
    "human_monitor_command",
    "query_balloon",
    "query_cpus_fast",
    "query_name",
    "query_target",
]


@command("query-name")
def query_name(monitor: Monitor) -> dict[str, str]:
    return {"name": monitor.machine.config.name}


@command("query-target")
def query_target(monitor: Monitor) -> dict[str, str]:
    return {"arch": "x86_64"}


@command("query-cpus-fast")
def query_cpus_fast(monitor: Monitor) -> list[dict[str, Any]]:
    threads = monitor.machine.vcpu_threads
    return [
        {
            "cpu-index": index,
            "qom-path": f"/machine/unattached/cpu[{index}]",
            "thread-id": threads[index] if index < len(threads) else 0,
            "props": {"socket-id": index, "core-id": 0, "thread-id": 0},
            "target": "x86_64",
        }
        for index in range(monitor.machine.config.cpus.count)
    ]


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
    if not 0 <= index < monitor.machine.config.cpus.count:
        raise QmpError("Parameter 'cpu-index' expects a CPU number")
    return human_command(monitor.machine, command_line, index)


def _balloon(machine: Machine) -> BalloonKind:
    if not machine.config.balloon:
        raise QmpError("No balloon device has been activated", "DeviceNotActive")
    return machine.balloon
