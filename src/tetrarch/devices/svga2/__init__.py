"""VMware's SVGA II, for two dimensions (Linux, drivers/gpu/drm/vmwgfx/device_include/svga_reg.h).

One file each: its registers, the queue of commands, pictures of the pointer, and the device.
"""

from tetrarch.devices.svga2.device import Svga2
from tetrarch.devices.svga2.queue import FIFO_BYTES
from tetrarch.devices.svga2.registers import VRAM_BYTES, Svga2State

__all__ = ["FIFO_BYTES", "VRAM_BYTES", "Svga2", "Svga2State"]
