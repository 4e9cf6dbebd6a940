"""What a machine's screen shows."""

from tetrarch._lazy import lazy_names

__all__ = ["Display", "Screen"]

_HOMES = {
    "Display": "tetrarch.display.display",
    "Screen": "tetrarch.display.screen",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())
