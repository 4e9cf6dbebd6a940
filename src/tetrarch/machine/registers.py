"""The registers of a vCPU by name: ``vm.vcpus[0].regs.rip``, ``vm.vcpus[0].fpu.xmm0``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from tetrarch.machine.lifecycle import Allow, allow_all

if TYPE_CHECKING:
    from tetrarch.machine.engine_vm import VcpuAccess

__all__ = ["FpuRegisters", "ModelRegisters", "Registers"]


class Registers(Mapping[str, int]):
    """General, segment, control and table registers as they were at one moment.

    As attributes or by name, also with ``dict(regs)``. What is assigned is set in the vCPU, and
    here. A segment is four: ``cs_selector``, ``cs_base``, ``cs_limit``, ``cs_attr``.
    """

    __slots__ = ("_allow", "_values", "_vcpu")

    def __init__(self, vcpu: VcpuAccess, allow: Allow = allow_all) -> None:
        object.__setattr__(self, "_allow", allow)
        object.__setattr__(self, "_vcpu", vcpu)
        object.__setattr__(self, "_values", vcpu.regs())

    def update(self, **values: int) -> None:
        """Sets several at once, or none where one cannot be. Raises EngineError."""
        self._allow("set_regs")
        self._vcpu.set_regs(values)
        self._values.update(values)

    if TYPE_CHECKING:
        _allow: Allow
        _vcpu: VcpuAccess
        _values: dict[str, int]

    def __getattr__(self, name: str) -> int:
        if name not in self._values:
            raise AttributeError(f"a vCPU has no register {name!r}")
        return self._values[name]

    def __setattr__(self, name: str, value: int) -> None:
        if name not in self._values:
            raise AttributeError(f"a vCPU has no register {name!r}")
        self.update(**{name: value})

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def __setitem__(self, name: str, value: int) -> None:
        self.update(**{name: value})

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __reduce__(self) -> tuple[type[dict[str, int]], tuple[dict[str, int]]]:
        """A copy, and what another process gets, are the values alone."""
        return dict, (self._values,)

    def __repr__(self) -> str:
        shown = " ".join(f"{name}={value:#x}" for name, value in self._values.items())
        return f"<Registers {shown}>"


class _Place(NamedTuple):
    """Where a register lies in an XSAVE image, and which component has it."""

    offset: int
    length: int
    component: int


_X87, _SSE, _AVX = 1, 2, 4
_XSTATE_BV = 512
_AVX_OFFSET = 576
# Intel SDM 1, 10.5.1 (the legacy region, 64-bit format) and 13.4.
_PLACES = {
    "fcw": _Place(0, 2, _X87),
    "fsw": _Place(2, 2, _X87),
    "ftw": _Place(4, 1, _X87),
    "fop": _Place(6, 2, _X87),
    "fip": _Place(8, 8, _X87),
    "fdp": _Place(16, 8, _X87),
    "mxcsr": _Place(24, 4, _SSE),
    **{f"st{number}": _Place(32 + 16 * number, 10, _X87) for number in range(8)},
    **{f"xmm{number}": _Place(160 + 16 * number, 16, _SSE) for number in range(16)},
}
_YMM = {f"ymm{number}": f"xmm{number}" for number in range(16)}


class FpuRegisters:
    """x87, SSE and AVX registers as they were at one moment; what is assigned is set in the vCPU.

    ``fcw``, ``fsw``, ``ftw`` (abridged: a bit for each that is in use), ``fop``, ``fip``, ``fdp``,
    ``st0`` to ``st7`` (80 bits), ``mxcsr``, ``xmm0`` to ``xmm15``, ``ymm0`` to ``ymm15``: numbers,
    the lowest lane in the lowest bits.
    """

    __slots__ = ("_allow", "_image", "_vcpu")

    def __init__(self, vcpu: VcpuAccess, allow: Allow = allow_all) -> None:
        object.__setattr__(self, "_allow", allow)
        object.__setattr__(self, "_vcpu", vcpu)
        object.__setattr__(self, "_image", bytearray(vcpu.xsave()))

    if TYPE_CHECKING:
        _allow: Allow
        _vcpu: VcpuAccess
        _image: bytearray

    def __getattr__(self, name: str) -> int:
        return sum(
            int.from_bytes(self._image[place.offset : place.offset + place.length], "little")
            << shift
            for place, shift in self._parts(name)
        )

    def __setattr__(self, name: str, value: int) -> None:
        parts = self._parts(name)
        if not 0 <= value < 1 << sum(place.length for place, _ in parts) * 8:
            raise OverflowError(f"{value:#x} does not fit {name}")
        self._allow("set_regs")
        for place, shift in parts:
            part = value >> shift & (1 << place.length * 8) - 1
            end = place.offset + place.length
            self._image[place.offset : end] = part.to_bytes(place.length, "little")
            # A component that is not said to be in the image is loaded as after reset.
            self._image[_XSTATE_BV] |= place.component
        self._vcpu.set_xsave(bytes(self._image))

    def _parts(self, name: str) -> list[tuple[_Place, int]]:
        """Each part of a register, and by how many bits it is moved up."""
        if name in _PLACES:
            return [(_PLACES[name], 0)]
        if name in _YMM and len(self._image) >= _AVX_OFFSET + 256:
            low = _PLACES[_YMM[name]]
            high = _Place(_AVX_OFFSET + low.offset - 160, 16, _AVX)
            return [(low, 0), (high, 128)]
        raise AttributeError(f"the vCPU has no FPU or vector register {name!r}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_PLACES, *_YMM]


class ModelRegisters:
    """Model-specific registers by number: ``vm.vcpus[0].msr[0xC000_0080]``."""

    def __init__(self, vcpu: VcpuAccess, allow: Allow = allow_all) -> None:
        self._vcpu = vcpu
        self._allow = allow

    def __getitem__(self, index: int) -> int:
        """Raises KeyError where the CPU has none of that number."""
        value = self._vcpu.msr(index)
        if value is None:
            raise KeyError(f"the CPU has no MSR {index:#x}")
        return value

    def __setitem__(self, index: int, value: int) -> None:
        """Raises KeyError where the CPU refuses the register or the value."""
        self._allow("set_regs")
        if not self._vcpu.set_msr(index, value):
            raise KeyError(f"the CPU refuses {value:#x} for the MSR {index:#x}")
