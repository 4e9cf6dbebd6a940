"""What a machine is made of, checked before anything is made.

The same model serves ``Machine(...)`` and the command line; what is wrong with
it is one line that names the option, the cause and the mend.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tetrarch.errors import ConfigError

__all__ = ["MIB", "MachineConfig", "make_config", "parse_size"]

MIB = 1 << 20
PAGE_SIZE = 4096

DEFAULT_MEMORY = 512 * MIB
# The boot data below 1 MiB and the smallest of kernels; less cannot start.
MEMORY_MIN = 4 * MIB
# 46 bits of physical address is what Linux on x86 takes with 4-level paging
# (Documentation/x86/x86_64/mm.rst); no host of ours has as much.
MEMORY_MAX = 1 << 46
# APIC ID 255 is the broadcast, and the I/O APIC reaches no larger ones.
VCPUS_MAX = 255

# More digits than any size has would be an error of int() in Python's own words.
_SIZE = re.compile(r"^([0-9]{1,24})\s*([KMGT]?)(?:i?B)?$", re.IGNORECASE)
_COUNT = re.compile(r"^[0-9]{1,9}$")
_UNITS = {"K": 1 << 10, "": MIB, "M": MIB, "G": 1 << 30, "T": 1 << 40}


class ValueProblem(ValueError):
    """What is wrong with one value, and what mends it."""

    def __init__(self, cause: str, mend: str) -> None:
        super().__init__(f"{cause}; {mend}")
        self.cause = cause
        self.mend = mend


def parse_size(value: object) -> int:
    """Bytes in "512M", "2G", or a bare number, which counts MiB."""
    match = None if isinstance(value, bool) else _SIZE.match(str(value).strip())
    if match is None:
        raise ValueProblem(f"{value!r} is no size", mend="write 512M, 2G or a number of MiB")
    size = int(match[1]) * _UNITS[match[2].upper()]
    if size % PAGE_SIZE:
        raise ValueProblem(f"{value!r} is no multiple of 4 KiB", mend="round it up")
    if size < MEMORY_MIN:
        raise ValueProblem(
            f"{value!r} is too little for a machine", mend=f"give {MEMORY_MIN // MIB}M or more"
        )
    if size > MEMORY_MAX:
        raise ValueProblem(
            f"{value!r} is more than a machine can address", mend="give less than 64T"
        )
    return size


def _cpu_count(value: object) -> int:
    if isinstance(value, bool) or not _COUNT.match(str(value)) or int(str(value)) < 1:
        raise ValueProblem(f"{value!r} is no number of CPUs", mend="give 1 or more")
    count = int(str(value))
    if count > VCPUS_MAX:
        raise ValueProblem(
            f"{count} CPUs are more than a machine can have", mend=f"give {VCPUS_MAX} or less"
        )
    return count


def _text(value: object) -> object:
    if isinstance(value, str) and "\0" in value:
        raise ValueProblem("it holds a zero byte", mend="remove it")
    return value


def _path(value: object) -> object:
    if value == "" or (isinstance(value, str) and "\0" in value):
        raise ValueProblem(f"{value!r} is no file name", mend="name a file")
    return value


FilePath = Annotated[Path, BeforeValidator(_path)]


class MachineConfig(BaseModel):
    """One machine, as its user describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel: FilePath | None = None
    """bzImage or ELF vmlinux; None is the default guest."""
    initrd: FilePath | None = None
    append: Annotated[str, BeforeValidator(_text)] | None = None
    """The kernel's whole command line; None is the default one."""
    memory: Annotated[int, BeforeValidator(parse_size)] = Field(
        default=DEFAULT_MEMORY, validate_default=False
    )
    """In bytes; "512M", "2G", or a bare number of MiB when given."""
    cpus: Annotated[int, BeforeValidator(_cpu_count)] = 1
    engine: Literal["auto", "bt", "kvm"] = "auto"
    debug_exit: bool = False
    """A port 0xF4 with which the guest ends the run with a value."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "tetrarch"


# What pydantic's own checks say in its words, in ours: cause and mend.
_PROBLEMS = {
    "engine": ("is no engine", "there are auto, bt and kvm"),
    "name": ("is no name", "use up to 64 letters, digits, '.', '_' and '-'"),
    "debug_exit": ("is neither true nor false", "give one of them"),
}


def make_config(values: dict[str, Any]) -> MachineConfig:
    """The checked configuration. Raises ConfigError for the first option that is wrong."""
    try:
        return MachineConfig(**values)
    except ValidationError as error:
        raise _config_error(error) from None


def _config_error(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    option = str(first["loc"][0]) if first["loc"] else "configuration"
    problem = first.get("ctx", {}).get("error")
    if isinstance(problem, ValueProblem):
        return ConfigError(f"{option}: {problem.cause}", mend=problem.mend)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{option}: there is no such option", mend="remove it")
    if option in _PROBLEMS:
        cause, mend = _PROBLEMS[option]
        return ConfigError(f"{option}: {first['input']!r} {cause}", mend=mend)
    return ConfigError(f"{option}: {first['msg']}")
