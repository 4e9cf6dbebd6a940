"""CPUs that are put into a machine that runs, and taken out, by QMP."""

from __future__ import annotations

from typing import Any, Final

from tetrarch.control.client import Client
from tetrarch.errors import MachineStateError

__all__ = ["plug_vcpu", "vcpu_name"]

_LEVELS: Final = ("socket-id", "core-id", "thread-id")


def plug_vcpu(client: Client, number: int | None) -> int:
    """Puts the CPU of that number in, the first that is not there if it is None; its guest is
    told. Gives its number. Raises MachineStateError where all are there, or it can have none of
    that number, ControlError for what the machine refuses."""
    cpus = _cpus(client)
    if number is None:
        free = [one for one, cpu in enumerate(cpus) if "qom-path" not in cpu]
        if not free:
            raise MachineStateError(
                f"all {len(cpus)} CPUs that the machine can have are in it",
                mend="start it with more: --cpus N,max=M",
            )
        number = free[0]
    if not 0 <= number < len(cpus):
        raise MachineStateError(
            f"the machine can have no CPU {number}: they are 0 to {len(cpus) - 1}",
            mend="name one of them, or start it with more: --cpus N,max=M",
        )
    cpu = cpus[number]
    client.execute("device_add", {"driver": cpu["type"], "id": f"cpu{number}", **cpu["props"]})
    return number


def vcpu_name(client: Client, number: int) -> str:
    """What device_del calls a CPU. Raises MachineStateError where it is not in the machine."""
    cpus = _cpus(client)
    path = cpus[number].get("qom-path", "") if 0 <= number < len(cpus) else ""
    if not path:
        there = ", ".join(str(one) for one, cpu in enumerate(cpus) if "qom-path" in cpu)
        raise MachineStateError(
            f"there is no CPU {number} in the machine", mend=f"name one of {there}"
        )
    parent, _, name = path.rpartition("/")
    return name if parent == "/machine/peripheral" else f"cpu{number}"


def _cpus(client: Client) -> list[dict[str, Any]]:
    """All that there can be, by number: they are numbered as they lie."""
    cpus: list[dict[str, Any]] = client.execute("query-hotpluggable-cpus")
    return sorted(cpus, key=lambda cpu: [cpu["props"][level] for level in _LEVELS])
