"""What the limits of this process leave for a machine (setrlimit(2)).

They are looked at before a machine is made: where malloc gets nothing more, the native core can
only abort, and no line with the cause would be seen.
"""

from __future__ import annotations

import resource
from pathlib import Path

from tetrarch.errors import HostError

__all__ = ["check_limits"]

_MIB = 1 << 20

# Beside guest memory, as VmPeak of a run shows: two views of the translated code (192 MiB each, in
# engine bt alone), for each thread an arena of malloc (64 MiB, and as much again until it is
# aligned) and a stack of 8 MiB.
_SPACE_OF = {"bt": 512 * _MIB, "kvm": 128 * _MIB}
_SPACE_OF_A_VCPU = 136 * _MIB
# Tables of blocks, the heap, stacks.
_DATA = 48 * _MIB
_DATA_OF_A_VCPU = 16 * _MIB


def check_limits(engine: str, memory: int, cpus: int) -> None:
    """Raises HostError where a limit leaves too little for a machine of ``memory`` bytes."""
    # Guest memory is shared, so it is no data.
    for limit, kept_in, needed, name, option in (
        (
            resource.RLIMIT_AS,
            "VmSize",
            memory + _SPACE_OF[engine] + cpus * _SPACE_OF_A_VCPU,
            "address space",
            "-v",
        ),
        (resource.RLIMIT_DATA, "VmData", _DATA + cpus * _DATA_OF_A_VCPU, "data", "-d"),
    ):
        allowed, _ = resource.getrlimit(limit)
        if allowed == resource.RLIM_INFINITY:
            continue
        left = max(allowed - _status(kept_in), 0)
        if left < needed:
            less = ", or ask for less with --memory" if option == "-v" else ""
            raise HostError(
                f"the limit of this process's {name} leaves {left // _MIB} MiB, and a machine of "
                f"{memory // _MIB} MiB needs {needed // _MIB}",
                f"raise it: ulimit {option} {(allowed + needed - left) >> 10}{less}",
            )


def _status(name: str) -> int:
    """A size of this process in bytes (proc(5), /proc/pid/status)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0
