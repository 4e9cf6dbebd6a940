"""The screen as a picture. QEMU's screendump writes a file, which a confined machine cannot."""

from __future__ import annotations

import base64
from typing import Any

from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError
from tetrarch.errors import TetrarchError

__all__ = ["screen"]


@command("x-screen")
def screen(monitor: Monitor) -> dict[str, Any]:
    """Its size, its text, and a PNG file in base64."""
    try:
        shown = monitor.machine.screen()
    except TetrarchError as error:
        raise QmpError(str(error)) from error
    png = base64.b64encode(shown.png()).decode()
    return {"width": shown.width, "height": shown.height, "text": shown.text, "png": png}
