"""gdb at a machine: the remote protocol over a socket."""

from tetrarch._lazy import lazy_names

__all__ = ["GdbServer", "GdbSpec"]

_HOMES = {
    "GdbServer": "tetrarch.gdb.server",
    "GdbSpec": "tetrarch.gdb.spec",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())
