"""A firmware's image: a file that lies at the end of the first 4 GiB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self
from uuid import UUID

from tetrarch.boot.source import Source
from tetrarch.errors import ConfigError, ValueProblem
from tetrarch.firmware.spec import FirmwareSpec

__all__ = ["FOUR_GIB", "SIZE_MAX", "FirmwareImage", "is_variables"]

FOUR_GIB: Final = 1 << 32
#: SeaBIOS has 128 KiB at least; behind 16 MiB from the end the APICs lie.
SIZE_MIN: Final = 64 << 10
SIZE_MAX: Final = 16 << 20
PAGE: Final = 4096
#: A processor's first instruction is this far from the end (Intel SDM 3A, 10.1.4).
RESET_VECTOR: Final = 16
#: What of the end is also below 1 MiB, where code of 16 bits runs.
LOW_BYTES: Final = 128 << 10
LOW_END: Final = 1 << 20
#: How a volume of variables begins: zeros, gEfiSystemNvDataFvGuid, and behind its length a word
#: (UEFI Platform Initialization 1.7, volume 3, 3.2.1).
VARIABLES_GUID: Final = UUID("fff12b8d-7696-4c8b-a985-2747075b4f50").bytes_le
GUID_AT: Final = 16
SIGNATURE: Final = b"_FVH"
SIGNATURE_AT: Final = 40


def is_variables(data: bytes) -> bool:
    """Whether it begins with a volume of firmware variables."""
    return data.startswith(VARIABLES_GUID, GUID_AT) and data.startswith(SIGNATURE, SIGNATURE_AT)


@dataclass(frozen=True)
class FirmwareImage:
    data: bytes

    @classmethod
    def read(cls, spec: FirmwareSpec) -> Self:
        """Raises BootError or ConfigError for what is no firmware."""
        try:
            path = spec.file
        except ValueProblem as problem:
            raise ConfigError(f"firmware: {problem.cause}", mend=problem.mend) from None
        with Source.open(path, "firmware") as source:
            if not SIZE_MIN <= source.size <= SIZE_MAX or source.size % PAGE:
                raise source.error(
                    f"has {source.size} bytes: an image has {SIZE_MIN >> 10} KiB to "
                    f"{SIZE_MAX >> 20} MiB, in whole pages",
                    mend="name a firmware image, such as bios-256k.bin",
                )
            data = source.read(0, source.size)
            if len(set(data[-RESET_VECTOR:])) == 1:
                raise source.error(
                    "has no code where a processor begins, 16 bytes before its end",
                    mend="name the image with the code, such as OVMF_CODE_4M.fd",
                )
            if spec.variables is not None and is_variables(data):
                raise source.error(
                    "has its variables in itself",
                    mend="name the image with the code alone, such as OVMF_CODE_4M.fd",
                )
        return cls(data)

    @property
    def base(self) -> int:
        return FOUR_GIB - len(self.data)

    @property
    def is_seabios(self) -> bool:
        """It starts no kernel by itself, but the ROM of firmware/linux_rom.py."""
        return b"SeaBIOS (version " in self.data

    @property
    def low(self) -> tuple[int, bytes]:
        """Address and bytes of the copy below 1 MiB."""
        data = self.data[-LOW_BYTES:]
        return LOW_END - len(data), data
