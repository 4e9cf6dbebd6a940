"""The errors that Tetrarch reports: each message is one line with cause and mend."""

__all__ = [
    "BootError",
    "ConfigError",
    "GuestCrash",
    "HostError",
    "ImageError",
    "StateError",
    "TetrarchError",
]


class TetrarchError(Exception):
    """What every error that Tetrarch raises on purpose has in common."""


class ConfigError(TetrarchError):
    """An option, or a combination of options, that makes no machine."""


class HostError(TetrarchError):
    """The host cannot give what the machine needs."""


class BootError(TetrarchError):
    """A kernel, initrd or command line that cannot be booted."""


class ImageError(TetrarchError):
    """A guest image that cannot be found, fetched, built or read."""


class StateError(TetrarchError):
    """Saved device state that this version cannot load."""


class GuestCrash(TetrarchError):
    """The guest ended abnormally: a triple fault or a panic.

    ``dump`` holds registers and code bytes as text, for a report.
    """

    def __init__(self, message: str, dump: str = "") -> None:
        super().__init__(message)
        self.dump = dump
