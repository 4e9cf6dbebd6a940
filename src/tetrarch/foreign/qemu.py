"""A command line of QEMU as a configuration of ours.

What QEMU adds by itself (a network card, a CD drive, a screen) is not carried over, and only what
was asked for is named where it is lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tetrarch.foreign.carried import Carried
from tetrarch.foreign.cpu import carry_cpu
from tetrarch.foreign.qemu_disks import QemuDisks
from tetrarch.foreign.qemu_lines import QemuLines
from tetrarch.foreign.qemu_nets import QemuNets
from tetrarch.foreign.qemu_words import Option, options_of
from tetrarch.foreign.viewers import VNC_PORT, carry_path, carry_port

__all__ = ["import_qemu"]

#: What holds here anyway.
_SATISFIED = {
    "no-user-config": "",
    "nodefaults": "",
    "nographic": "",
    "enable-sync-profile": "",
    "no-fd-bootchk": "",
    "monitor": "none",
    "parallel": "none",
    "balloon": "virtio",
}
_SATISFIED_DEVICES = (
    "virtio-rng",
    "virtio-balloon",
    "virtio-serial",
    "pcie-root-port",
    "pci-bridge",
)
_OF_FIRMWARE = ("boot", "option-rom", "L")
#: SeaBIOS as QEMU brings it.
_SEABIOS = ("bios.bin", "bios-256k.bin")
_DEBUG_EXIT_PORT = 0xF4


def import_qemu(words: Sequence[str]) -> Carried:
    """Raises ConfigError where ``words`` are no command line of QEMU."""
    return _Reader(list(options_of(words))).carried


class _Reader:
    def __init__(self, options: Sequence[Option]) -> None:
        self.carried = carried = Carried()
        # QEMU's defaults, where they are others than ours.
        carried.set("memory", "128M", "QEMU's default")
        carried.set("on_reset", "restart", "QEMU's default")
        self._q35 = any("q35" in (one.value or "") for one in options if one.name in _MACHINE)
        self._lines = QemuLines(carried)
        self._disks = QemuDisks(carried, self._lines, "ahci" if self._q35 else "ide")
        self._nets = QemuNets(carried, self._lines)
        # What is referred to by its name may stand behind that.
        for option in sorted(options, key=_order):
            if "$" in (option.value or ""):
                carried.lose(str(option), "a variable of the shell is not known")
            self._option(option)
        self._disks.finish()
        self._nets.finish()

    def _option(self, option: Option) -> None:
        name = option.name
        if (take := self._TAKERS.get(name)) is not None:
            take(self, option)
        elif name == "device":
            self._device(option)
        elif any(part.option(option) for part in (self._disks, self._nets, self._lines)):
            pass
        elif name not in _SATISFIED or (option.value or "") != _SATISFIED[name]:
            other = "firmware goes its own way" if name in _OF_FIRMWARE else ""
            self.carried.lose(str(option), other or "there is nothing like it")

    def _device(self, option: Option) -> None:
        keys = option.keys("driver")
        kind = keys.get("driver", "")
        if any(
            part.device(kind, keys, str(option)) for part in (self._disks, self._nets, self._lines)
        ):
            return
        if kind.startswith(_SATISFIED_DEVICES):
            return
        if match := re.fullmatch(r"virtio-(keyboard|mouse|tablet)(-pci|-device)?", kind):
            self.carried.add("input", match[1], str(option))
        elif kind == "isa-debug-exit" and _number(keys.get("iobase", "0x501")) == _DEBUG_EXIT_PORT:
            self.carried.set("debug_exit", True, str(option))
        elif kind.startswith("vhost-vsock"):
            self.carried.lose(str(option), "the host's end is a Unix socket: vsock = PATH")
        else:
            self.carried.lose(str(option), "there is no such device")

    def _memory(self, option: Option) -> None:
        keys = option.keys("size")
        size = keys.pop("size", "")
        self.carried.set("memory", size, f"-m {size}")
        self.carried.lose_keys("-m", keys, "memory is not plugged in")

    def _cpus(self, option: Option) -> None:
        keys = option.keys("cpus")
        count = keys.pop("cpus", "")
        for level in _OTHER_LEVELS:
            if keys.get(level) == "1":
                del keys[level]
        if keys.get("maxcpus") == count:
            del keys["maxcpus"]
        most = keys.pop("maxcpus", "")
        levels = {level: keys.pop(level) for level in _LEVELS if level in keys}
        if not count:
            total = 1
            for value in levels.values():
                total *= min(int(value), 1 << 16) if value.isascii() and value.isdecimal() else 1
            count = most or str(total)
        topology = "".join(f",{level}={value}" for level, value in levels.items())
        if keys and levels:
            # Their product is of more CPUs, or of levels that are not here.
            self.carried.lose(f"-smp: {topology[1:]}", "it goes with the rest")
            topology = ""
        later = f",max={most}" if most else ""
        self.carried.set("cpus", f"{count}{later}{topology}", str(option))
        self.carried.lose_keys("-smp", keys)

    def _accelerator(self, option: Option) -> None:
        self._engine(option.keys("accel").get("accel", "kvm"), option)

    def _engine(self, accelerators: str, option: Option) -> None:
        engines = {"kvm": "kvm", "tcg": "bt"}
        if self.carried.has("engine") and option.name == "accel":
            engine = "auto"  # QEMU takes the first that it can have
        else:
            engine = engines.get(accelerators, "auto" if ":" in accelerators else "")
        if engine:
            self.carried.set("engine", engine, str(option))
        else:
            self.carried.lose(str(option), "the best engine of the host is taken")

    def _machine(self, option: Option) -> None:
        keys = option.keys("type")
        kind = keys.pop("type", "")
        if kind.startswith("microvm"):
            self.carried.set("virtio", "mmio", str(option))
        elif kind and not kind.startswith(("pc", "q35")):
            self.carried.lose(f"-{option.name} {kind}", "there is one machine, a PC")
        if accelerators := keys.pop("accel", ""):
            self._engine(accelerators, option)
        self.carried.lose_keys(f"-{option.name}", keys)

    def _cpu(self, option: Option) -> None:
        """-cpu MODEL[,+FEATURE][,-FEATURE][,FEATURE=on|off]"""
        name, *words = (option.value or "").split(",")
        changes = []
        for word in words:
            feature, _, value = word.lstrip("+-").partition("=")
            off = word.startswith("-") or value in ("off", "no", "false")
            changes.append((feature, not off))
        carry_cpu(self.carried, name, changes, "-cpu")

    def _name(self, option: Option) -> None:
        keys = option.keys("guest")
        name = keys.pop("guest", "")
        self.carried.set("name", name, f"-name {name}")
        self.carried.lose_keys("-name", {k: v for k, v in keys.items() if k != "debug-threads"})

    def _action(self, option: Option) -> None:
        keys = option.keys()
        if (reboot := keys.pop("reboot", None)) is not None:
            self.carried.set("on_reset", "end" if reboot == "shutdown" else "restart", str(option))
        self.carried.lose_keys("-action", keys)

    def _control(self, option: Option) -> None:
        """-qmp unix:PATH,server=on"""
        kind, _, rest = (option.value or "").partition(":")
        path, *words = rest.split(",")
        if kind == "unix" and any(word in ("server", "server=on") for word in words):
            self.carried.set("control", path, str(option))
        else:
            self.carried.lose(str(option), "the control socket is a Unix socket that listens")

    def _gdb(self, option: Option) -> None:
        """-gdb tcp:[HOST]:PORT, unix:PATH,server=on"""
        kind, _, rest = (option.value or "").partition(":")
        place, *words = rest.split(",")
        if kind == "tcp":
            self.carried.set("gdb", place.removeprefix(":"), str(option))
        elif kind == "unix" and any(word in ("server", "server=on") for word in words):
            self.carried.set("gdb", Path(place), str(option))
        else:
            self.carried.lose(str(option), "gdb is served at a TCP port or a Unix socket")

    def _screen(self, option: Option) -> None:
        """-vga KIND"""
        kind = option.value or ""
        if kind == "std":
            self.carried.set("screen", "vga", str(option))
        elif kind == "vmware":
            self.carried.set("screen", "svga", str(option))
        elif kind != "none":
            self.carried.lose(str(option), "there is nothing like it")

    def _display(self, option: Option) -> None:
        """-display none, vnc=PLACE"""
        kind, _, place = (option.value or "").partition("=")
        if kind == "vnc":
            self._vnc_at(place, str(option))
        elif option.value != "none":
            self.carried.lose(str(option), "there is nothing like it")

    def _vnc_at(self, text: str, source: str) -> None:
        """[HOST]:DISPLAY or unix:PATH, and options."""
        place, *words = text.split(",")
        host, _, number = place.rpartition(":")
        if place == "none":
            return
        if words:
            self.carried.lose(f"{source}: {','.join(words)}", "it is shown without")
        if place.startswith("unix:"):
            carry_path(self.carried, place.removeprefix("unix:"), source)
        elif not number.isascii() or not number.isdecimal() or len(number) > 5:
            self.carried.lose(source, "it is no place for viewers")
        else:
            carry_port(self.carried, host or "*", str(VNC_PORT + int(number)), source)

    def _bios(self, option: Option) -> None:
        """-bios FILE, in QEMU's own directory where it is a name alone."""
        path = option.value or ""
        self.carried.add_firmware("seabios" if path in _SEABIOS else path, str(option))

    def _as(self, name: str, option: Option) -> None:
        self.carried.set(name, option.value or "", f"-{option.name}")

    _TAKERS: dict[str, Callable[[_Reader, Option], None]] = {  # noqa: RUF012
        "m": _memory,
        "smp": _cpus,
        "accel": _accelerator,
        "enable-kvm": lambda self, option: self._engine("kvm", option),
        "machine": _machine,
        "M": _machine,
        "cpu": _cpu,
        "name": _name,
        "action": _action,
        "bios": _bios,
        "vga": _screen,
        "display": _display,
        "vnc": lambda self, option: self._vnc_at(option.value or "", str(option)),
        "qmp": _control,
        "qmp-pretty": _control,
        "gdb": _gdb,
        "s": lambda self, option: self.carried.set("gdb", "1234", "-s"),
        "S": lambda self, option: self.carried.lose("-S", "add gdb_wait, which needs gdb"),
        "no-reboot": lambda self, option: self.carried.set("on_reset", "end", "-no-reboot"),
        "kernel": lambda self, option: self._as("kernel", option),
        "initrd": lambda self, option: self._as("initrd", option),
        "append": lambda self, option: self._as("append", option),
    }


_MACHINE = ("machine", "M")
_LEVELS = ("sockets", "cores", "threads")
_OTHER_LEVELS = ("drawers", "books", "dies", "clusters", "modules")


def _order(option: Option) -> int:
    return 0 if option.name in ("chardev", "fsdev") else 2 if option.name == "device" else 1


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return -1
