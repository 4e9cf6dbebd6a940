"""What the machine is (QEMU, qapi/machine.json)."""

from __future__ import annotations

from tetrarch.control.command import command
from tetrarch.machine.machine import Machine

__all__ = ["query_name"]


@command("query-name")
def query_name(vm: Machine) -> dict[str, str]:
    return {"name": vm.config.name}
