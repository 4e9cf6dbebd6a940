"""A machine's screen, keyboard and pointer for viewers: the remote framebuffer protocol."""

from tetrarch._lazy import lazy_names

__all__ = ["DisplaySpec", "VncServer"]

_HOMES = {
    "DisplaySpec": "tetrarch.vnc.spec",
    "VncServer": "tetrarch.vnc.server",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())
