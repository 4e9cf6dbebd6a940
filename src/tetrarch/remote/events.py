"""What happens to a machine of another process, told here as if it were of this."""

from __future__ import annotations

import threading
from typing import Any

from tetrarch.control.client import Client
from tetrarch.errors import HostError
from tetrarch.machine.events import EVENTS, Events, MachineEvent

__all__ = ["RemoteEvents", "report"]

_NAMES = {name.upper().replace("-", "_"): name for name in EVENTS}


class RemoteEvents:
    """A connection that only listens, until the machine has ended or ``close``."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.told = Events(report)
        # A daemon: it waits for as long as the machine lives.
        threading.Thread(target=self._listen, name="remote-events", daemon=True).start()

    def close(self) -> None:
        self._client.close()

    def _listen(self) -> None:
        try:
            while True:
                message = self._client.next_event()
                if (name := _NAMES.get(message.get("event", ""))) is not None:
                    data: dict[str, Any] = message.get("data", {})
                    time = message["timestamp"]
                    seconds = time["seconds"] + time["microseconds"] / 1e6
                    self.told.hand_on(MachineEvent(name, data, seconds))
        except (HostError, OSError):  # it has ended, or nobody listens any more
            pass
        finally:
            self.told.end()
            self._client.close()


def report(error: BaseException) -> None:
    """What a listener has raised ends no machine of another process."""
    threading.excepthook(
        threading.ExceptHookArgs(
            (type(error), error, error.__traceback__, threading.current_thread())
        )
    )
