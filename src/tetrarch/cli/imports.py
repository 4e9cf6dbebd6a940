"""``tetrarch import``: a file for --config of a machine that another monitor runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tetrarch._files import read_text, write_all
from tetrarch.block.spec import DiskFormat
from tetrarch.errors import ConfigError
from tetrarch.foreign import (
    Carried,
    NotCarried,
    export_ova,
    import_firecracker,
    import_libvirt,
    import_ova,
    import_qemu,
    import_vmx,
    is_qemu,
    words_of_script,
)
from tetrarch.images.progress import TerminalReporter

if TYPE_CHECKING:
    from tetrarch.machine.config import MachineConfig

__all__ = ["export", "firecracker", "libvirt", "ova", "qemu", "vmx", "vmx_machine"]


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


def ova(path: Path, output: Path | None, disks: Path | None, image_format: str) -> None:
    """Its disks are made in ``disks``, or else beside the output."""
    directory = disks or (output.parent if output is not None else Path())
    kind: DiskFormat = "raw" if image_format == "raw" else "qcow2"
    if image_format != kind:
        raise ConfigError(f"--format: {image_format!r} is none", mend="give raw or qcow2")
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory", mend="make it before")
    with _about(path):
        found = import_ova(path, directory.absolute(), kind, TerminalReporter().transfer)
        heading = " ".join(f"From {path.name}, an appliance.".split())
        _write(found.carried, directory, heading, output)


def export(path: Path, output: Path) -> None:
    """A machine and its disks as an appliance: of a file, or a disk that was installed here."""
    from tetrarch.images.store import DiskStore
    from tetrarch.machine.config import make_config
    from tetrarch.machine.config_file import load_config
    from tetrarch.machine.guest import with_installed_disk

    if path.suffix.lower() == ".vmx":
        config = vmx_machine(path)
    elif not path.exists() and DiskStore().find(str(path)) is not None:
        config = make_config({"name": str(path), "image": str(path)})
    else:
        config = load_config(path)
    config = with_installed_disk(config)
    _name(export_ova(config, output, TerminalReporter().transfer))


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
    _name(carried.lost)


def _name(things: Sequence[NotCarried]) -> None:
    for lost in things:
        print(f"tetrarch: not carried over: {lost}", file=sys.stderr)
