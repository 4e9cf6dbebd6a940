"""A machine steered from another process: QMP on a Unix socket, and a client of it."""

from tetrarch._lazy import lazy_names

__all__ = ["Client", "ControlError", "ControlServer"]

_HOMES = {
    "Client": "tetrarch.control.client",
    "ControlError": "tetrarch.control.client",
    "ControlServer": "tetrarch.control.server",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())
