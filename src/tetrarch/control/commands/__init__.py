"""The commands of QMP, each a function; files are by topic, as QEMU's qapi/ has them."""

from tetrarch.control.command import COMMANDS
from tetrarch.control.commands import (
    block,
    breakpoints,
    control,
    descriptors,
    dump,
    inspect,
    machine,
    qdev,
    replay,
    run_state,
    save,
    screen,
    stats,
    vmware,
)

__all__ = [
    "COMMANDS",
    "block",
    "breakpoints",
    "control",
    "descriptors",
    "dump",
    "inspect",
    "machine",
    "qdev",
    "replay",
    "run_state",
    "save",
    "screen",
    "stats",
    "vmware",
]
