"""A libvirt domain, as virsh dumpxml shows it, as a configuration of ours.

The elements are those of libvirt's "Domain XML format" (docs/formatdomain.rst).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tetrarch.errors import ConfigError
from tetrarch.foreign.carried import CARDS, Carried
from tetrarch.foreign.cpu import carry_cpu
from tetrarch.foreign.viewers import carry_path, carry_port
from tetrarch.foreign.xml_tree import Element, parse_xml

__all__ = ["import_libvirt"]

#: Sizes; libvirt's default is KiB.
_UNITS = {
    "b": 1,
    "bytes": 1,
    "kb": 10**3,
    "k": 1 << 10,
    "kib": 1 << 10,
    "mb": 10**6,
    "m": 1 << 20,
    "mib": 1 << 20,
    "gb": 10**9,
    "g": 1 << 30,
    "gib": 1 << 30,
    "tb": 10**12,
    "t": 1 << 40,
    "tib": 1 << 40,
}
#: What every machine has, or what says nothing of the machine.
_SATISFIED = {
    "uuid",
    "title",
    "description",
    "metadata",
    "on_poweroff",
    "on_crash",
    "resource",
    "seclabel",
}
_SATISFIED_DEVICES = {"emulator", "rng", "controller"}
#: Its models that there are; the first is a VGA with nothing beside it.
_SCREENS = {"vga": "vga", "vmvga": "svga"}
_BUSES = {"virtio": "virtio", "sata": "ahci", "ide": "ide", "nvme": "nvme"}


def import_libvirt(text: str) -> Carried:
    """Raises ConfigError for what is no domain."""
    root = parse_xml(text)
    if root.tag in ("domainsnapshot", "domstatus"):
        root = root.take("domain") or root
    if root.tag != "domain":
        raise ConfigError(
            f"the outermost tag is <{root.tag}>, and no <domain>",
            mend="take what virsh dumpxml prints",
        )
    return _Reader(root).carried


class _Reader:
    def __init__(self, domain: Element) -> None:
        self.carried = Carried()
        kind = domain.attribute("type")
        if kind in ("kvm", "qemu"):
            self.carried.set("engine", {"kvm": "kvm", "qemu": "bt"}[kind], f"type={kind}")
        elif kind:
            self.carried.lose(f"type={kind}", "the best engine of the host is taken")
        domain.attribute("id")
        if (name := domain.take_text("name")) is not None:
            self.carried.set("name", name, "<name>")
        self._size(domain)
        if (processor := domain.take("cpu")) is not None:
            self._cpu(processor)
        if (system := domain.take("os")) is not None:
            self._system(system)
        if (devices := domain.take("devices")) is not None:
            self._devices(devices)
        restarts = domain.take_text("on_reboot")
        self.carried.set(
            "on_reset",
            "restart" if restarts in (None, "restart") else "end",
            "<on_reboot>" if restarts else "libvirt's default",
        )
        domain.children = [child for child in domain.children if child.tag not in _SATISFIED]
        self._lose_rest(domain)

    def _lose_rest(self, element: Element, why: str = "there is nothing like it") -> None:
        for child in element.children:
            self.carried.lose(f"line {child.line}: {_shown(child)}", why)

    def _size(self, domain: Element) -> None:
        if (memory := domain.take("memory")) is not None:
            memory_unit = memory.attribute("unit", "KiB")
            size = _bytes(memory.text, memory_unit)
            source = f"line {memory.line}: {_shown(memory)}"
            if size is None:
                self.carried.lose(source, "it is no size")
            else:
                # As libvirt does: up to whole KiB, and here to whole pages.
                self.carried.set("memory", f"{-(-size // 4096) * 4}K", "<memory>")
        if (current := domain.take("currentMemory")) is not None and memory is not None:
            size = _bytes(current.text, current.attribute("unit", "KiB"))
            if size != _bytes(memory.text, memory_unit):
                what = f"line {current.line}: <currentMemory>"
                self.carried.lose(what, "the balloon begins empty")
        if (vcpu := domain.take("vcpu")) is not None:
            count, topology = vcpu.attribute("current") or vcpu.text, self._topology(domain)
            later = f",max={vcpu.text}" if count != vcpu.text else ""
            self.carried.set("cpus", f"{count}{later}{topology}", "<vcpu>")
            vcpu.attributes.pop("placement", None)
            self.carried.lose_keys(f"line {vcpu.line}: <vcpu>", vcpu.attributes)

    def _topology(self, domain: Element) -> str:
        """``<cpu><topology sockets= dies= cores= threads=/></cpu>``, as ``cpus`` has it."""
        processor = next((child for child in domain.children if child.tag == "cpu"), None)
        topology = None if processor is None else processor.take("topology")
        if topology is None:
            return ""
        shown = f"line {topology.line}: {_shown(topology)}"
        levels = {name: topology.attribute(name, "1") for name in ("sockets", "cores", "threads")}
        if any(value != "1" for value in topology.attributes.values()):
            self.carried.lose(shown, "there are sockets, cores and threads alone")
            return ""
        return "".join(f",{name}={value}" for name, value in levels.items())

    def _cpu(self, processor: Element) -> None:
        """``<cpu mode= match=><model>NAME</model><feature policy= name=/></cpu>``"""
        where, mode = f"line {processor.line}: <cpu>", processor.attribute("mode", "custom")
        for known in ("match", "check", "migratable"):
            processor.attribute(known)
        model = processor.take("model")
        name = mode if model is None or mode != "custom" else model.text
        changes = []
        for feature in processor.take_all("feature"):
            policy = feature.attribute("policy", "require")
            if policy != "optional":
                changes.append((feature.attribute("name"), policy in ("force", "require")))
        if name != "custom":
            carry_cpu(self.carried, name, changes, where)
        elif changes:
            self.carried.lose(where, "it has features, and no model")
        self.carried.lose_keys(where, processor.attributes)
        processor.take("vendor")
        self._lose_rest(processor)

    def _system(self, system: Element) -> None:
        for tag, option in (("kernel", "kernel"), ("initrd", "initrd"), ("cmdline", "append")):
            if (text := system.take_text(tag)) is not None:
                self.carried.set(option, text, f"<{tag}>")
        if (kind := system.take("type")) is not None:
            architecture = kind.attribute("arch", "x86_64")
            if architecture != "x86_64":
                self.carried.lose(f"arch={architecture}", "the machine is an x86-64 one")
            if "microvm" in kind.attribute("machine"):
                self.carried.set("virtio", "mmio", "machine=microvm")
        self._firmware(system)
        for boot in system.take_all("boot"):
            shown = _shown(boot)
            if boot.attribute("dev") not in ("", "hd"):
                self.carried.lose(f"line {boot.line}: {shown}", "firmware goes its own way")
        self._lose_rest(system)

    def _firmware(self, system: Element) -> None:
        """``<loader>IMAGE</loader><nvram>VARIABLES</nvram>``, or ``<os firmware='efi'>``."""
        loader, variables = system.take("loader"), system.take("nvram")
        chosen = system.attribute("firmware")
        if loader is not None and loader.text:
            self.carried.add_firmware(loader.text, "<loader>")
        elif chosen:
            name = {"efi": "ovmf", "bios": "seabios"}.get(chosen, chosen)
            self.carried.add_firmware(name, f"firmware={chosen}")
        if loader is not None and loader.attribute("secure") == "yes":
            self.carried.lose(f"line {loader.line}: <loader secure=yes>", "there is no SMM")
        if variables is None or not variables.text:
            return
        if variables.attribute("format", "raw") == "raw" and self.carried.has("firmware"):
            self.carried.add_firmware(variables.text, "<nvram>")
        else:
            self.carried.lose(f"line {variables.line}: <nvram>", "it is no raw file of firmware's")

    def _devices(self, devices: Element) -> None:
        for disk in devices.take_all("disk"):
            self._disk(disk)
        for interface in devices.take_all("interface"):
            self._interface(interface)
        self._consoles(devices)
        for channel in devices.take_all("channel"):
            self._channel(channel)
        for filesystem in devices.take_all("filesystem"):
            self._filesystem(filesystem)
        for device in devices.take_all("input"):
            kind, bus = device.attribute("type"), device.attribute("bus")
            if bus == "virtio":
                self.carried.add("input", kind, f"<input type={kind}>")
            elif bus != "ps2":
                self.carried.lose(f"line {device.line}: <input> at {bus}", "bus virtio is there")
        for balloon in devices.take_all("memballoon"):
            if balloon.attribute("model") == "none":
                self.carried.set("balloon", False, "<memballoon model=none>")
        for vsock in devices.take_all("vsock"):
            self.carried.lose(
                f"line {vsock.line}: <vsock>", "the host's end is a Unix socket: vsock = PATH"
            )
        for index, video in enumerate(devices.take_all("video")):
            self._video(video, first=index == 0)
        for graphics in devices.take_all("graphics"):
            self._graphics(graphics)
        devices.children = [one for one in devices.children if one.tag not in _SATISFIED_DEVICES]
        self._lose_rest(devices)

    def _video(self, video: Element, *, first: bool) -> None:
        """``<video><model type='vga' vram='16384' heads='1'/></video>``"""
        model, where = video.take("model"), f"line {video.line}: <video>"
        kind = "" if model is None else model.attribute("type")
        if kind == "none":
            return
        if not first:
            self.carried.lose(where, "there is one screen")
            return
        self.carried.set("screen", _SCREENS.get(kind, "vga"), where)
        if kind not in _SCREENS:
            self.carried.lose(f"{where} {kind}", "it is a VGA")
        if model is not None:
            if model.attribute("heads", "1") != "1":
                self.carried.lose(f"{where}: heads", "there is one")
            # How much memory it has is the screen's own affair.
            for known in ("vram", "ram", "vgamem", "vram64", "primary"):
                model.attribute(known)
            self.carried.lose_keys(where, model.attributes)
            self._lose_rest(model)
        for tag in ("address", "alias", "driver"):
            video.take(tag)
        self._lose_rest(video)

    def _graphics(self, graphics: Element) -> None:
        """``<graphics type='vnc' port='5901' listen='127.0.0.1'/>``, or ``<listen>`` in it."""
        kind, where = graphics.attribute("type"), f"line {graphics.line}: <graphics>"
        if kind != "vnc":
            self.carried.lose(f"{where} {kind}", "viewers come by VNC")
            return
        if graphics.attribute("passwd"):
            self.carried.lose(f"{where}: passwd", "give display a password-file")
        host, path = graphics.attribute("listen"), graphics.attribute("socket")
        for listen in graphics.take_all("listen"):
            match listen.attribute("type"):
                case "address":
                    host = listen.attribute("address", host)
                case "socket":
                    path = listen.attribute("socket")
                case other:
                    self.carried.lose(f"{where}: listen {other}", "it is an address or a socket")
        # -1 is an old way to say that libvirt chooses one; 0 is a free one here.
        port, chosen = graphics.attribute("port", "-1"), graphics.attribute("autoport") == "yes"
        if path:
            carry_path(self.carried, path, where)
        else:
            carry_port(self.carried, host, "0" if chosen or port == "-1" else port, where)
        self.carried.lose_keys(where, graphics.attributes)
        self._lose_rest(graphics)

    def _disk(self, disk: Element) -> None:
        source, target = disk.take("source"), disk.take("target")
        bus = "" if target is None else target.attribute("bus")
        name = "" if target is None else target.attribute("dev")
        where = f"line {disk.line}: disk {name}".strip()
        kind, device = disk.attribute("type"), disk.attribute("device", "disk")
        path = ""
        if source is not None:
            path = source.attribute(
                {"file": "file", "block": "dev", "vhostuser": "path"}.get(kind, "")
            )
        if device == "cdrom" and path:
            self.carried.add(
                "cdrom", {"path": path, "bus": "ide" if bus == "ide" else "ahci"}, name
            )
        elif device == "floppy" and path:
            readonly = {"readonly": True} if disk.take("readonly") is not None else {}
            self.carried.add("floppy", {"path": path, **readonly}, name)
        elif device not in ("disk", "lun") or not path:
            what = "an empty drive" if not path and device != "disk" else f"a {kind} {device}"
            self.carried.lose(where, f"{what} cannot be")
            return
        elif kind == "vhostuser":
            self.carried.add("disk", {"vhost-user": path}, name)
        else:
            table: dict[str, Any] = {"path": path, "bus": _BUSES.get(bus, "virtio")}
            if bus not in _BUSES:
                self.carried.lose(f"{where}: bus={bus}", "it is a virtio disk")
            table |= self._disk_options(disk, where)
            self.carried.add("disk", table, name)
        for tag in ("address", "alias", "boot", "backingStore", "readonly", "driver", "serial"):
            disk.take(tag)
        self._lose_rest(disk)

    def _disk_options(self, disk: Element, where: str) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if (driver := disk.take("driver")) is not None:
            options["format"] = driver.attribute("type", "raw")
            cache, error = driver.attribute("cache"), driver.attribute("error_policy")
            if cache in ("none", "directsync"):
                options["cache"] = "none"
            if error in ("stop", "enospace"):
                options["werror"] = "stop"
            for known in ("name", "io", "discard", "detect_zeroes", "iothread", "queues"):
                driver.attribute(known)
            self.carried.lose_keys(f"{where}: <driver>", driver.attributes)
        if disk.take("readonly") is not None:
            options["readonly"] = True
        if disk.take("transient") is not None:
            options["snapshot"] = True
        if (tune := disk.take("iotune")) is not None:
            for tag, option in (("total_bytes_sec", "bps"), ("total_iops_sec", "iops")):
                if (rate := tune.take_text(tag)) not in (None, "0"):
                    options[option] = rate
            self._lose_rest(tune, "reads and writes have one limit")
        return options

    def _interface(self, interface: Element) -> None:
        kind, where = interface.attribute("type"), f"line {interface.line}: interface"
        source, target = interface.take("source"), interface.take("target")
        device = "" if target is None else target.attribute("dev")
        table: dict[str, Any]
        forwards: list[str] = []
        match kind:
            case "user":
                forwards = self._forwards(interface, where)
                table = {"user": True, "forward": forwards} if forwards else {"user": True}
            case "ethernet" if device:
                table = {"tap": device}
            case "bridge" if device and source is not None:
                table = {"tap": device, "bridge": source.attribute("bridge")}
            case "vhostuser" if source is not None:
                table = {"vhost-user": source.attribute("path")}
            case "bridge":
                self.carried.lose(where, "its tap has no name; give <target dev='NAME'/>")
                return
            case _:
                self.carried.lose(where, f"a network of type {kind or 'none'} is none here")
                return
        if (mac := interface.take("mac")) is not None:
            table["mac"] = mac.attribute("address")
        if (mtu := interface.take("mtu")) is not None:
            table["mtu"] = mtu.attribute("size")
        model = interface.take("model")
        name = "virtio" if model is None else model.attribute("type")
        if name in CARDS and "vhost-user" not in table:
            table["model"] = CARDS[name]
            if (size := table.pop("mtu", None)) is not None:
                self.carried.lose(f"{where}: mtu {size}", "the card tells its guest none")
        elif not name.startswith("virtio"):
            self.carried.lose(f"{where}: model {name}", "it is a virtio card")
        driver = interface.take("driver")
        several = "tap" in table and table.get("model") != "e1000"
        if driver is not None and several and (queues := driver.attribute("queues")):
            table["queues"] = queues
        self.carried.add("net", table, f"interface {device or kind}")
        for tag in ("address", "alias", "boot", "backend", "driver", "guest"):
            interface.take(tag)
        self._lose_rest(interface)

    def _forwards(self, interface: Element, where: str) -> list[str]:
        """passt's forwarded ports."""
        found = []
        for forward in interface.take_all("portForward"):
            address = forward.attribute("address", "0.0.0.0")
            host = f"[{address}]" if ":" in address else address
            if forward.attribute("proto") != "tcp":
                self.carried.lose(f"{where}: <portForward>", "only TCP is forwarded")
                continue
            for ports in forward.take_all("range"):
                first = ports.attribute("start")
                if ports.attribute("end", first) != first or ports.attributes.pop("exclude", ""):
                    self.carried.lose(f"line {ports.line}: <range>", "ports are given one by one")
                else:
                    found.append(f"{host}:{first}:{ports.attribute('to', first)}")
        return found

    def _consoles(self, devices: Element) -> None:
        """The first serial line; <console type=pty> is the same one once more."""
        for index, serial in enumerate(devices.take_all("serial")):
            if index == 0:
                self._console(serial, lambda text: self.carried.set("console", text, "<serial>"))
            else:
                self.carried.lose(f"line {serial.line}: <serial>", "there is one serial line")
        for console in devices.take_all("console"):
            target = console.take("target")
            if target is not None and target.attribute("type") == "virtio":
                self._console(
                    console, lambda text: self.carried.add("virtio_console", text, "<console>")
                )

    def _console(self, element: Element, take: Callable[[str], None], name: str = "") -> None:
        source = element.take("source")
        kind = element.attribute("type")
        path = "" if source is None else source.attribute("path")
        match kind:
            case "file":
                text = f"file={path}"
            case "unix" if source is not None and source.attribute("mode") != "connect":
                text = f"socket={path}"
            case "stdio" | "null":
                text = "stdio" if kind == "stdio" else "none"
            case "pty":
                # libvirt makes it up; a terminal here is the one of tetrarch run.
                return
            case _:
                self.carried.lose(
                    f"line {element.line}: <{element.tag} type={kind}>",
                    "it can be a file, or a socket that the machine listens at",
                )
                return
        take(f"{text},name={name}" if name else text)

    def _channel(self, channel: Element) -> None:
        target = channel.take("target")
        name = "" if target is None else target.attribute("name")
        if target is None or target.attribute("type") != "virtio" or not name:
            self.carried.lose(f"line {channel.line}: {_shown(channel)}", "there are virtio's ports")
            return
        self._console(
            channel, lambda text: self.carried.add("virtio_console", text, f"channel {name}"), name
        )

    def _filesystem(self, filesystem: Element) -> None:
        where = f"line {filesystem.line}: <filesystem>"
        source, target = filesystem.take("source"), filesystem.take("target")
        driver = filesystem.take("driver")
        directory = "" if source is None else source.attribute("dir")
        if filesystem.attribute("type", "mount") != "mount" or not directory:
            self.carried.lose(where, "only directories are shared")
            return
        if driver is None or driver.attribute("type") != "virtiofs":
            self.carried.lose(f"{where}: 9p", "it is shared by virtiofs")
        table: dict[str, Any] = {"directory": directory}
        if target is not None and (tag := target.attribute("dir")):
            table["tag"] = tag
        if filesystem.take("readonly") is not None:
            table["readonly"] = True
        self.carried.add("share", table, "<filesystem>")
        for tag in ("address", "alias", "binary"):
            filesystem.take(tag)
        self._lose_rest(filesystem)


def _bytes(text: str, unit: str) -> int | None:
    known = _UNITS.get(unit.lower())
    if known is None or not text.isascii() or not text.isdigit() or len(text) > 20:
        return None
    return int(text) * known


def _shown(element: Element) -> str:
    words = [f"{name}={value}" for name, value in element.attributes.items()]
    return f"<{' '.join([element.tag, *words])}>"
