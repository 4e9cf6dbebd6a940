"""A machine in a notebook: what a cell shows of it, and its console while it runs.

A cell that ends with a machine shows a table. ``show_console(vm)`` shows the last lines that the
guest has said and renews them as it says more: the kernel is free meanwhile.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tetrarch.machine.machine import Machine

__all__ = ["console_html", "machine_html", "show_console"]

#: A cell is not renewed more often: each time goes over the network to a browser.
_EVERY_S: Final = 0.2
_LINES: Final = 25


def machine_html(vm: Machine) -> str:
    """What a cell shows of a machine."""
    config = vm.config
    rows: dict[str, object] = {
        "name": config.name,
        "engine": vm.engine,
        "phase": vm.phase.value,
        "memory": f"{config.memory >> 20} MiB",
        "CPUs": str(config.cpus),
        "has run": f"{vm.uptime:.1f} s",
    }
    if vm.status is not None:
        rows["ended"] = vm.status
    cells = (
        f"<tr><th>{name}</th><td>{html.escape(str(row))}</td></tr>" for name, row in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def console_html(text: str, lines: int = _LINES) -> str:
    """The last lines of a console. A guest may say what it likes: it is text, and no markup."""
    shown = text.replace("\r", "").splitlines()[-lines:]
    return f"<pre>{html.escape(chr(10).join(shown))}</pre>"


def show_console(vm: Machine, lines: int = _LINES) -> None:
    """Shows the console of a machine in the cell, and renews it until the machine has ended.

    Raises ImportError outside of IPython.
    """
    from IPython.display import HTML, display  # type: ignore[import-not-found, unused-ignore]

    console = vm.console
    said = threading.Event()

    def shown() -> Any:
        return HTML(console_html(console.text, lines))

    handle = display(shown(), display_id=True)
    update: Callable[[Any], object] = handle.update

    def follow() -> None:
        with console.watched(said.set):
            while not console.closed:
                said.wait()
                said.clear()
                update(shown())
                time.sleep(_EVERY_S)
        update(shown())

    threading.Thread(target=follow, name="notebook-console", daemon=True).start()
