"""The screen as a picture (QEMU, qapi/ui.json)."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, Literal

from tetrarch._files import write_all
from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError

__all__ = ["query_vnc", "screen", "screendump"]


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


@command("query-vnc")
def query_vnc(monitor: Monitor) -> dict[str, Any]:
    """Where the display is, and who watches."""
    server = monitor.machine.display
    if server is None:
        return {"enabled": False}
    place = server.spec.place
    if place.path is not None:
        address = {"host": str(place.path), "service": "", "family": "unix"}
    else:
        host, _, port = server.address.rpartition(":")
        address = _address(host.strip("[]"), port)
    viewers = [_address(viewer.host, str(viewer.port)) for viewer in server.viewers]
    clients = [viewer | {"websocket": False} for viewer in viewers]
    auth = "vnc" if server.has_password else "none"
    return {"enabled": True, **address, "auth": auth, "clients": clients}


def _address(host: str, port: str) -> dict[str, Any]:
    if not host:  # by a Unix socket, which has none
        return {"host": "", "service": "", "family": "unix"}
    return {"host": host, "service": port, "family": "ipv6" if ":" in host else "ipv4"}
