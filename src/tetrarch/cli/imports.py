"""``tetrarch import``: a file for --config of a machine that another monitor runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tetrarch._files import read_text, write_all
from tetrarch.errors import ConfigError
from tetrarch.foreign import (
    Carried,
    import_firecracker,
    import_libvirt,
    import_qemu,
    import_vmx,
    is_qemu,
    words_of_script,
)

if TYPE_CHECKING:
    from tetrarch.machine.config import MachineConfig

__all__ = ["firecracker", "libvirt", "qemu", "vmx", "vmx_machine"]


def qemu(words: Sequence[str], output: Path | None) -> None:
    """A command line, or the only word is a file that has it."""
    if len(words) == 1 and not words[0].startswith("-") and not is_qemu(words[0]):
        _file(Path(words[0]), _script, "command line of QEMU", output)
    else:
        _write(import_qemu(words), Path(), "From a command line of QEMU.", output)


def firecracker(path: Path, output: Path | None) -> None:
    _file(path, import_firecracker, "Firecracker configuration", output)


def libvirt(path: Path, output: Path | None) -> None:
    _file(path, import_libvirt, "libvirt domain", output)


def vmx(path: Path, output: Path | None) -> None:
    _file(path, import_vmx, "virtual machine of VMware's", output)


def vmx_machine(path: Path) -> MachineConfig:
    """To be run as it is; what is not carried over is named on standard error."""
    text = read_text(path, "virtual machine of VMware's")
    with _about(path):
        carried = import_vmx(text)
        try:
            return carried.finish(path.parent.absolute())
        finally:
            _name_lost(carried)


def _script(text: str) -> Carried:
    return import_qemu(words_of_script(text))


def _file(path: Path, take: Callable[[str], Carried], what: str, output: Path | None) -> None:
    text = read_text(path, what)
    heading = " ".join(f"From {path.name}, a {what}.".split())
    with _about(path):
        _write(take(text), path.parent, heading, output)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """What is wrong is told with the file's name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.cause}", mend=error.mend) from None


def _write(carried: Carried, directory: Path, heading: str, output: Path | None) -> None:
    """The file on standard output, and what is not in it on standard error, also where nothing
    is left to run."""
    try:
        text = carried.toml(carried.finish(directory.absolute()), heading)
    finally:
        _name_lost(carried)
    if output is None:
        print(text, end="")
    else:
        write_all(output, text.encode())


def _name_lost(carried: Carried) -> None:
    for lost in carried.lost:
        print(f"tetrarch: not carried over: {lost}", file=sys.stderr)
