"""A machine's CPUs as they are written down: ``N[,max=N][,sockets=N][,cores=N][,threads=N]``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Self

from tetrarch._words import options, shown, split
from tetrarch.errors import ValueProblem

__all__ = ["VCPUS_MAX", "CpusSpec"]

#: APIC ID 255 is the broadcast, and the I/O APIC reaches no larger ones.
VCPUS_MAX: Final = 255

_COUNT = re.compile(r"[0-9]{1,9}")
#: From the largest to the smallest; in the order in which QEMU, too, fills up what is not given.
_LEVELS: Final = ("sockets", "cores", "threads")
_FILLED_FIRST: Final = ("cores", "sockets", "threads")


@dataclass(frozen=True)
class CpusSpec:
    """How many vCPUs, and how those lie that there can be: ``sockets * cores * threads == max``."""

    count: int = 1
    """In the machine at first."""
    sockets: int = 1
    cores: int = 1
    """Of a socket."""
    threads: int = 1
    """Of a core."""

    @classmethod
    def parse(cls, value: object) -> Self:
        """Of a number or its text. What is not given of the topology follows from the rest; cores
        of one socket by default. Raises ValueProblem."""
        if isinstance(value, cls):
            return cls.parse(str(value))  # its values are checked as those that are written down
        text, *words = split("" if isinstance(value, bool) else str(value))
        if not _COUNT.fullmatch(text) or int(text) < 1:
            raise ValueProblem(f"{value!r} is no number of CPUs", mend="give 1 or more")
        count = int(text)
        known = (*_LEVELS, "max")
        given = {name: _level(name, told) for name, told in options(words, known, "CPUs")}
        most = given.pop("max", count)
        if max(count, most) > VCPUS_MAX:
            raise ValueProblem(
                f"{max(count, most)} CPUs are more than a machine can have",
                mend=f"give {VCPUS_MAX} or less",
            )
        if most < count:
            raise ValueProblem(
                f"{count} CPUs are more than the {most} of max", mend=f"give max={count} or more"
            )
        spec = cls(count, **_filled(most, given))
        if spec.apic_id(most - 1) >= VCPUS_MAX:
            raise ValueProblem(
                f"{value!r} needs APIC IDs up to {spec.apic_id(most - 1)}, and "
                f"{VCPUS_MAX - 1} is the last",
                mend="let cores and threads be powers of two, or give fewer",
            )
        return spec

    @property
    def max(self) -> int:
        """How many there can be: the others are plugged in while the machine runs."""
        return self.sockets * self.cores * self.threads

    def place(self, cpu: int) -> tuple[int, int, int]:
        """Socket, core and thread of the vCPU with that number."""
        core, thread = divmod(cpu, self.threads)
        socket, core = divmod(core, self.cores)
        return socket, core, thread

    def apic_id(self, cpu: int) -> int:
        """Of the vCPU with that number: a field of bits for each level (Intel SDM 3A, 9.9.2)."""
        socket, core, thread = self.place(cpu)
        thread_bits = (self.threads - 1).bit_length()
        core_bits = (self.cores - 1).bit_length()
        return (socket << core_bits | core) << thread_bits | thread

    @property
    def apic_ids(self) -> list[int]:
        """Of all that there can be."""
        return [self.apic_id(cpu) for cpu in range(self.max)]

    def __str__(self) -> str:
        words = [str(self.count)]
        if self.max != self.count:
            words.append(f"max={self.max}")
        if (self.sockets, self.threads) != (1, 1):
            words += [f"{name}={getattr(self, name)}" for name in _LEVELS]
        return ",".join(words)


def _level(name: str, value: str | None) -> int:
    if value is None or not _COUNT.fullmatch(value) or int(value) < 1:
        raise ValueProblem(f"{name} is {shown(value)}", mend="give a number from 1 on")
    return int(value)


def _filled(count: int, given: dict[str, int]) -> dict[str, int]:
    missing = [name for name in _FILLED_FIRST if name not in given]
    product = math.prod(given.values())
    if count % product or not (missing or product == count):
        said = " times ".join(f"{value} {name}" for name, value in given.items())
        raise ValueProblem(
            f"{count} CPUs are no {'multiple of ' if missing else ''}{said}",
            mend=f"give numbers whose product is {count}",
        )
    rest = count // product
    for name in missing:
        given[name], rest = rest, 1
    return given
