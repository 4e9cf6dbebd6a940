"""The screen as a picture (QEMU, qapi/ui.json)."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, Literal

from tetrarch._files import write_all
from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError

__all__ = ["screen", "screendump"]


@command("x-screen")
def screen(monitor: Monitor) -> dict[str, Any]:
    """Its size, its text, and a PNG file in base64: for a confined machine, which opens no file."""
    shown = monitor.machine.screen()
    png = base64.b64encode(shown.png()).decode()
    return {"width": shown.width, "height": shown.height, "text": shown.text, "png": png}


@command("screendump")
def screendump(
    monitor: Monitor,
    filename: str,
    device: str | None = None,
    head: int | None = None,
    format: Literal["ppm", "png"] = "ppm",  # noqa: A002
) -> None:
    """Into a file of that name. There is one screen, so none can be named."""
    machine = monitor.machine
    if not machine.config.vga:
        raise QmpError("There is no console to take a screendump from")
    if device is not None:
        raise QmpError(f"Device '{device}' not found", "DeviceNotFound")
    if head is not None:
        raise QmpError("'head' must be specified together with 'device'")
    shown = machine.screen()
    write_all(Path(filename), shown.png() if format == "png" else shown.ppm())
