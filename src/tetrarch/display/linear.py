"""What a linear frame buffer shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tetrarch.devices.ramfb import FrameBuffer
from tetrarch.display.screen import Screen
from tetrarch.errors import MachineStateError

__all__ = ["linear_screen"]

#: "XR24" and "AR24": words of 32 bits, blue lowest (Linux, include/uapi/drm/drm_fourcc.h).
FORMATS: Final = (0x3432_5258, 0x3432_5241)
PIXEL_BYTES: Final = 4
#: Of a side; and of all of it, in bytes.
SIDE_MAX: Final = 16384
BYTES_MAX: Final = 256 << 20


def linear_screen(
    place: FrameBuffer, read: Callable[[int, int], bytes], refused: type[Exception]
) -> Screen:
    """``read`` gives guest memory, and raises ``refused`` for what is none.

    Raises MachineStateError for a frame buffer that cannot be.
    """
    row = PIXEL_BYTES * place.width
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
    pixels = bytearray(3 * place.width * place.height)
    for part in range(3):  # red is behind green and blue
        pixels[part::3] = data[2 - part :: PIXEL_BYTES]
    return Screen(place.width, place.height, bytes(pixels))
