"""Which of the vCPUs that a machine can have are in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from tetrarch._native import EngineError
from tetrarch._patience import patience
from tetrarch.devices.acpi_pm import CPU_HOTPLUG_EVENT
from tetrarch.devices.cpu_hotplug import CpuHotplug
from tetrarch.errors import ConfigError, HostError, MachineStateError, StateError
from tetrarch.machine.cpus import CpusSpec
from tetrarch.machine.engine_errors import engine_cause, engine_mend

if TYPE_CHECKING:
    from tetrarch.devices import AcpiPm
    from tetrarch.machine.engine_vm import EngineVm
    from tetrarch.machine.threads import VcpuThreads

__all__ = ["PluggedVcpus"]


@dataclass
class _Plugged:
    name: str
    leaving: bool = False
    """The guest was asked to give it up."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when it is out, or nobody will take it out any more."""
    out: bool = False


class PluggedVcpus:
    """The engine has each vCPU from the start; one that is not in the machine has no thread.

    Locks: ``_plugging``, held by a program that puts one in; then ``_lock``, for a change of who is
    there. The engine, the registers and the threads are called without the latter.
    """

    def __init__(self, vm: EngineVm, cpus: CpusSpec, out: Callable[[str], object]) -> None:
        """``out`` is called with the name of a vCPU that was taken out."""
        self._vm = vm
        self._cpus = cpus
        self._out = out
        self._plugging = threading.Lock()
        self._lock = threading.Lock()
        self._there = {number: _Plugged(_name(number)) for number in range(cpus.count)}
        self._ended = False
        self._threads: VcpuThreads | None = None
        self.hotplug: CpuHotplug | None = None
        """Where the machine can have more than it has at first."""
        for number in range(cpus.count, cpus.max):
            vm.vcpu(number).set_present(False)

    def connect(self, threads: VcpuThreads, acpi: AcpiPm) -> None:
        """The threads that run the vCPUs, and what tells the guest."""
        self._threads = threads
        if self._cpus.max > self._cpus.count:
            event = partial(acpi.set_gpe, CPU_HOTPLUG_EVENT)
            self.hotplug = CpuHotplug(self._cpus.max, event, self._eject)
            self._show()

    @property
    def numbers(self) -> list[int]:
        """Of those that are there."""
        with self._lock:
            return sorted(self._there)

    @property
    def there(self) -> list[int] | None:
        """The same, for the guest's tables; None where no other can come."""
        return None if self.hotplug is None else self.numbers

    @property
    def names(self) -> dict[int, str]:
        """What those that are there are called, by number."""
        with self._lock:
            return {number: self._there[number].name for number in sorted(self._there)}

    @property
    def native_ids(self) -> dict[int, int]:
        """The host's numbers of the threads that run them, while they do."""
        return {} if self._threads is None else self._threads.native_ids

    # Coming and going.

    def plug(self, number: int | None = None, name: str | None = None) -> int:
        """Puts a vCPU into a machine that runs, the first that is not there if none is named, and
        tells the guest. Raises MachineStateError."""
        threads, hotplug = self._required()
        with self._plugging:
            with self._lock:
                number = self._free(number)
                name = _name(number) if name is None else name
                if any(plugged.name == name for plugged in self._there.values()):
                    raise ConfigError(f"there is a CPU {name!r} already", mend="name it otherwise")
            threads.wait_gone(number)
            try:
                self._vm.reset_vcpu(number)
            except EngineError as error:
                raise HostError(
                    f"CPU {number} cannot be plugged in: {engine_cause(error)}",
                    mend=engine_mend(error, "try it again"),
                ) from error
            with self._lock:
                self._there[number] = _Plugged(name)
            hotplug.set_there(number, True)
            threads.start_one(number)
            hotplug.announce(number)
        return number

    def _free(self, number: int | None) -> int:
        most = self._cpus.max
        if number is None:
            free = [one for one in range(most) if one not in self._there]
            if not free:
                raise MachineStateError(
                    f"all {most} CPUs that the machine can have are in it",
                    mend="make it with more: cpus N,max=M",
                )
            return free[0]
        if not 0 <= number < most:
            raise MachineStateError(
                f"the machine can have no CPU {number}: they are 0 to {most - 1}",
                mend="make it with more: cpus N,max=M",
            )
        if number in self._there:
            raise MachineStateError(f"CPU {number} is in the machine", mend="name another")
        return number

    def request_unplug(self, name: str) -> None:
        """Asks the guest to give a vCPU up; returns at once. Raises LookupError."""
        with self._lock:
            found = [number for number, one in self._there.items() if one.name == name]
        if not found:
            raise LookupError(f"Device '{name}' not found")
        self._request(found[0])

    def unplug(self, number: int, timeout: float | None) -> bool | None:
        """Takes a vCPU out when the guest has given it up. False: it has not in time; None: the
        machine has ended."""
        limit = patience(timeout)
        plugged = self._request(number)
        if not plugged.gone.wait(limit):
            return False
        return True if plugged.out else None

    def _request(self, number: int) -> _Plugged:
        _, hotplug = self._required()
        if number == 0:
            raise MachineStateError(
                "CPU 0 stays in its machine: the guest started on it", mend="name another"
            )
        with self._lock:
            plugged = self._there.get(number)
            if plugged is None:
                there = ", ".join(map(str, sorted(self._there)))
                raise MachineStateError(
                    f"there is no CPU {number} in the machine", mend=f"name one of {there}"
                )
            plugged.leaving = True
            if self._ended:
                plugged.gone.set()
                return plugged
        hotplug.request(number)
        return plugged

    def _eject(self, number: int) -> None:
        """The guest has given it up; nothing if it is not there: a guest may say so at any time."""
        threads, hotplug = self._required()
        with self._lock:
            plugged = None if number == 0 else self._there.pop(number, None)
        if plugged is None:
            return
        hotplug.set_there(number, False)
        threads.let_go(number)
        plugged.out = True
        plugged.gone.set()
        self._out(plugged.name)

    def _required(self) -> tuple[VcpuThreads, CpuHotplug]:
        if self._threads is None or self.hotplug is None:
            raise MachineStateError(
                f"the machine has {self._cpus.count} CPUs, and can have no others",
                mend="make it with cpus N,max=M",
            )
        return self._threads, self.hotplug

    # Life

    def reset(self) -> None:
        """Of those that the guest was asked to give up, a reset is an answer; no vCPU runs."""
        with self._lock:
            leaving = [number for number, plugged in self._there.items() if plugged.leaving]
        for number in leaving:
            self._eject(number)

    def close(self) -> None:
        """The machine has ended: nobody waits for its guest any longer."""
        with self._lock:
            self._ended = True
            for plugged in self._there.values():
                plugged.gone.set()

    def load(self, names: Mapping[int, str]) -> None:
        """Those of a saved machine, before it runs; raises StateError where they cannot be."""
        able = set(range(self._cpus.max)) if self.hotplug else set(range(self._cpus.count))
        if 0 not in names or not names.keys() <= able or len(set(names.values())) != len(names):
            raise StateError(
                "the saved machine's CPUs cannot be", mend="save it again: it is damaged"
            )
        with self._lock:
            self._there = {number: _Plugged(name) for number, name in names.items()}
        for number in range(self._cpus.max):
            self._vm.vcpu(number).set_present(number in names)
        self._show()

    def _show(self) -> None:
        if self.hotplug is not None:
            for number in range(self._cpus.max):
                self.hotplug.set_there(number, number in self._there)


def _name(number: int) -> str:
    return f"cpu{number}"
