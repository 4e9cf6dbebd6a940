"""The errors that Tetrarch raises on purpose: a cause, and what mends it."""

__all__ = [
    "BootError",
    "ConfigError",
    "HostError",
    "ImageError",
    "MachineStateError",
    "StateError",
    "TetrarchError",
    "ValueProblem",
]


class TetrarchError(Exception):
    """What every error that Tetrarch raises on purpose has in common.

    ``cause`` says what is wrong, ``mend`` what to do about it, empty where nothing
    can be done. As text it is both in one line: "cause; mend".
    """

    def __init__(self, cause: str, mend: str = "") -> None:
        # Names of files may hold line ends.
        text = f"{cause}; {mend}" if mend else cause
        super().__init__(" ".join(text.splitlines()))
        self.cause = cause
        self.mend = mend


class ConfigError(TetrarchError):
    """An option, or a combination of options, that makes no machine."""


class HostError(TetrarchError):
    """The host cannot give what the machine needs."""


class BootError(TetrarchError):
    """A kernel, initrd or command line that cannot be booted."""


class ImageError(TetrarchError):
    """A guest image that cannot be found, fetched, built or read."""


class MachineStateError(TetrarchError):
    """The machine is not in a state for what was asked: not started, or ended."""


class StateError(TetrarchError):
    """Saved state that this version cannot load."""


class ValueProblem(ValueError):
    """What is wrong with one value, and what mends it; becomes the ConfigError of an option."""

    def __init__(self, cause: str, mend: str) -> None:
        super().__init__(f"{cause}; {mend}")
        self.cause = cause
        self.mend = mend
        self.item: int | None = None
        """Of an option with several values: which it is."""
