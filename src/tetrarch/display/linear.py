"""What a linear frame buffer shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tetrarch.devices.ramfb import FrameBuffer, Ramfb
from tetrarch.display.display import Shown
from tetrarch.display.frame import POINT_BYTES, Cursor, Frame
from tetrarch.display.screen import Screen
from tetrarch.errors import MachineStateError

__all__ = ["RamfbSource", "linear_frame", "linear_screen"]

#: "XR24" and "AR24": words of 32 bits, blue lowest (Linux, include/uapi/drm/drm_fourcc.h).
FORMATS: Final = (0x3432_5258, 0x3432_5241)
#: Of a side; and of all of it, in bytes. There are copies of it while somebody watches.
SIDE_MAX: Final = 16384
BYTES_MAX: Final = 64 << 20


def linear_frame(
    place: FrameBuffer, read: Callable[[int, int], bytes], refused: type[Exception]
) -> Frame:
    """``read`` gives guest memory, and raises ``refused`` for what is none.

    Raises MachineStateError for a frame buffer that cannot be.
    """
    row = POINT_BYTES * place.width
    # A guest may leave the length of a line to its width.
    stride = place.stride or row
    sane = place.width <= SIDE_MAX and place.height <= SIDE_MAX and row <= stride
    if place.format not in FORMATS or not sane or stride * place.height > BYTES_MAX:
        raise MachineStateError(
            f"the guest's frame buffer is {place.width} by {place.height} of format "
            f"{place.format:#x}, which is not shown",
            mend="let the guest use 32 bits a point",
        )
    try:
        data = read(place.address, stride * (place.height - 1) + row)
    except refused as error:
        raise MachineStateError(
            f"the guest's frame buffer at {place.address:#x} is not in its memory",
            mend="wait until it has set up another",
        ) from error
    if stride != row:
        data = b"".join(data[at : at + row] for at in range(0, stride * place.height, stride))
    return Frame(place.width, place.height, data)


def linear_screen(
    place: FrameBuffer, read: Callable[[int, int], bytes], refused: type[Exception]
) -> Screen:
    """As ``linear_frame``, as a picture."""
    return linear_frame(place, read, refused).screen()


class RamfbSource:
    """The frame buffer of UEFI firmware, and of who goes on with it."""

    def __init__(
        self, ramfb: Ramfb, read: Callable[[int, int], bytes], refused: type[Exception]
    ) -> None:
        self._ramfb, self._read, self._refused = ramfb, read, refused

    def still(self) -> Frame | None:
        place = self._ramfb.frame_buffer
        return None if place is None else linear_frame(place, self._read, self._refused)

    def look(self) -> Shown | None:
        frame = self.still()
        return None if frame is None else (frame, None)

    def cursor(self) -> Cursor | None:
        return None
