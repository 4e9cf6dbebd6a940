"""A virtual machine of VMware's, as its .vmx file has it, as a configuration of ours.

The file is lines of ``name = "value"``; names are told apart without regard to case. VMware
documents few of them: what they mean and what holds where one is missing is as libvirt has it
(src/vmx/vmx.c), where that knows them. What switches itself off or only describes is no loss.
"""

from __future__ import annotations

import re
from typing import Any, Final

from tetrarch.errors import ConfigError
from tetrarch.foreign.carried import CARDS, Carried
from tetrarch.foreign.viewers import VNC_PORT, carry_port

__all__ = ["import_vmx"]

_LINE: Final = re.compile(r'\s*([A-Za-z.][\w.:\-]*)\s*=\s*"((?:[^"])*)"\s*')
#: A byte that a value cannot have stands as | and two hexadecimal digits.
_ESCAPED: Final = re.compile(r"\|([0-9A-Fa-f]{2})")

#: Controller -> bus of ours. Of SCSI there is VMware's own, and what it was is said.
_BUSES: Final = {"scsi": "pvscsi", "sata": "ahci", "ide": "ide", "nvme": "nvme"}
_SCSI: Final = "pvscsi"
#: A machine has one of these at least.
_ALWAYS: Final = frozenset(
    {"config.version", "virtualhw.version", "memsize", "guestos", "displayname"}
)
_UNITS: Final = 64
_CARDS: Final = 10
_DISKS: Final = frozenset({"", "disk", "scsi-harddisk", "ata-harddisk", "nvme-harddisk"})
_DISCS: Final = frozenset({"cdrom-image"})
_DRIVES_OF_HOST: Final = frozenset({"cdrom-raw", "atapi-cdrom"})

#: What says how a machine was or is shown, or what VMware does beside it.
_SAYS_NOTHING: Final = re.compile(
    r"\.encoding|config\.version|virtualhw\.(version|productcompatibility)|guestos(\.detailed.*)?|"
    r"annotation|cleanshutdown|softpoweroff|extendedconfigfile|nvram|vmxstats\.filename|"
    r"(powertype|gui|mks|monitor|tools|toolsinstallmanager|sched|migrate|vmotion|replay|isolation|"
    r"checkpoint|snapshot|unity|vc|vm|ulm|numa|policy|log|logging|answer|time)\..*|"
    r"pcibridge\d+\..*|vmci0\..*|uuid\.(location|action)|vc\.uuid|migrate\.hostlog|scsi\d+\.shared.*|"
    r".*\.(pcislotnumber|redo|addresstype|generatedaddress(offset)?|linkstatepropagation\..*|"
    r"uptcompatibility|wakeonpcktrcv|checkmacaddress|allowguestconnectioncontrol|autodetect|"
    r"exclusive|clientdevice|vcpu\..*|sas.wwid|ctkenabled|shares|throughputcap|devices)|"
    r"floppy\d\..*|svga\..*|remotedisplay\.(maxconnections|vnc\..*)|acpi\..*|cpuid\.(?!corespersocket).*|numvcpus|memsize|displayname|"
    r"mem\.hotadd|memhotadd.*|vcpu\.hotadd|hgfs\..*|disk\.enableuuid|chipset\..*|roamingvm\..*|"
    r"virtualssd.*|rtc\..*|serial\d+\.(yieldonmsrread|startconnected|trynorxloss)"
)


def import_vmx(text: str) -> Carried:
    """Raises ConfigError for what is no such file."""
    values: dict[str, str] = {}
    names: dict[str, str] = {}
    carried = Carried()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            carried.lose(f"line {number}: {line}", 'it is not name = "value"')
            continue
        names[found[1].lower()] = found[1]
        values[found[1].lower()] = _ESCAPED.sub(lambda code: chr(int(code[1], 16)), found[2])
    if not _ALWAYS & set(values):
        raise ConfigError(
            "this is no virtual machine of VMware's",
            mend='name a .vmx file: lines of name = "value"',
        )
    _Reader(values, names, carried)
    return carried


class _Reader:
    def __init__(self, values: dict[str, str], names: dict[str, str], carried: Carried) -> None:
        """``names``: as they are written, by their small letters."""
        self._values, self._names, self.carried = values, names, carried
        self._read: set[str] = set()
        self.carried.set("platform", "vmware", "VMware")
        self._machine()
        for bus in _BUSES:
            for controller in range(4):
                self._drives(f"{bus}{controller}", _BUSES[bus])
        for number in range(2):
            self._floppy(f"floppy{number}")
        self._screen()
        self._viewers()
        for number in range(_CARDS):
            self._card(f"ethernet{number}")
        self._rest()

    def _take(self, name: str, default: str = "") -> str:
        self._read.add(name)
        return self._values.get(name, default)

    def _on(self, name: str, default: bool = False) -> bool:
        return self._take(name, "TRUE" if default else "FALSE").upper() == "TRUE"

    def _machine(self) -> None:
        if name := self._take("displayname"):
            # Names of ours are words.
            word = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:64]
            if word:
                self.carried.set("name", word, "displayName")
        memory = self._take("memsize", "32")
        self.carried.set("memory", f"{memory}M", "memsize")
        cpus, cores = self._take("numvcpus", "1"), self._take("cpuid.corespersocket", "1")
        # Longer ones are no number of CPUs, and int() refuses the longest.
        numbers = all(text.isdecimal() and len(text) < 10 for text in (cores, cpus))
        if numbers and int(cores) > 1 and int(cpus) % int(cores) == 0:
            sockets = int(cpus) // int(cores)
            self.carried.set("cpus", f"{cpus},sockets={sockets},cores={cores}", "numvcpus")
        elif cpus != "1":
            self.carried.set("cpus", cpus, "numvcpus")
        efi = self._take("firmware", "bios").lower() == "efi"
        self.carried.set("firmware", "ovmf" if efi else "seabios", "firmware")
        if self._on("uefi.secureboot.enabled"):
            self.carried.lose("uefi.secureBoot.enabled", "there is no secure boot")
        if self._on("hpet0.present"):
            self.carried.set("hpet", True, "hpet0.present")
        for key, value in self._values.items():
            if key.startswith("guestinfo."):
                self._read.add(key)
                self.carried.add("guestinfo", f"{self._names[key].partition('.')[2]}={value}", key)
        if self._take("uuid.bios"):
            self.carried.lose("uuid.bios", "a machine draws its own")

    def _drives(self, controller: str, bus: str) -> None:
        kind = self._take(f"{controller}.virtualdev")
        # IDE's two channels are always there.
        there = self._on(f"{controller}.present", default=controller.startswith("ide"))
        if there and controller.startswith("scsi") and kind.lower() != _SCSI:
            self.carried.lose(
                f"{controller}.virtualDev={kind or 'lsilogic'}",
                "its disks are at a PVSCSI controller",
            )
        for unit in range(_UNITS):
            name = f"{controller}:{unit}"
            if self._on(f"{name}.present") and there:
                self._drive(name, bus)
            else:
                self._forget(name)

    def _drive(self, name: str, bus: str) -> None:
        kind = self._take(f"{name}.devicetype").lower()
        path = self._take(f"{name}.filename")
        mode = self._take(f"{name}.mode", "persistent").lower()
        connected = self._on(f"{name}.startconnected", default=True)
        if kind in _DISKS:
            table: dict[str, Any] = {"path": path, "bus": bus}
            if mode.endswith("nonpersistent"):
                table["snapshot"] = True
            elif not mode.endswith("persistent"):
                self.carried.lose(f"{name}.mode={mode}", "what the guest writes is kept")
            if self._on(f"{name}.writethrough"):
                self.carried.lose(f"{name}.writeThrough", "the guest flushes what it must")
            self.carried.add("disk", table, name)
        elif kind in _DISCS and connected:
            place = bus if bus in ("ide", "pvscsi") else "ahci"
            self.carried.add("cdrom", {"path": path, "bus": place}, name)
        elif kind not in _DISCS:
            host = kind in _DRIVES_OF_HOST
            why = "a drive of the host" if host else "there is no such device"
            self.carried.lose(f"{name}.deviceType={kind}", why)
        self._forget(name)

    def _floppy(self, name: str) -> None:
        # The first is there unless it is switched off, and mostly without a disk.
        there = self._on(f"{name}.present", default=name == "floppy0")
        kind, path = self._take(f"{name}.filetype", "device"), self._take(f"{name}.filename")
        if there and kind.lower() == "file" and path:
            self.carried.add("floppy", {"path": path}, name)
        elif there and path:
            self.carried.lose(f"{name}.fileType={kind}", "a drive of the host")
        self._forget(name)

    def _card(self, name: str) -> None:
        if not self._on(f"{name}.present"):
            self._forget(name)
            return
        model = self._take(f"{name}.virtualdev", "vlance")
        carried = CARDS.get(model.lower())
        if carried is None:
            self.carried.lose(f"{name}.virtualDev={model}", "the card is virtio's")
        connection = self._take(f"{name}.connectiontype", "bridged").lower()
        network = self._take(f"{name}.networkname") or self._take(f"{name}.vnet")
        if connection != "nat":
            what = f"{name}.connectionType={connection}" + (f" {network}" if network else "")
            self.carried.lose(what, "the guest is behind the host's address; give it a tap")
        table: dict[str, Any] = {"user": True}
        if carried is not None:
            table["model"] = carried
        address = self._take(f"{name}.address") or self._take(f"{name}.generatedaddress")
        if address:
            table["mac"] = address
        self.carried.add("net", table, name)
        self._forget(name)

    def _screen(self) -> None:
        # Of few machines: the device brings the engines along.
        from tetrarch.devices.svga2.registers import HEIGHT_MAX, VRAM_BYTES, WIDTH_MAX

        if self._on("svga.present"):
            self.carried.set("screen", "svga", "svga.present")
        for name, most, why in (
            ("svga.vramsize", VRAM_BYTES, f"the screen has {VRAM_BYTES >> 20} MiB of memory"),
            ("svga.maxwidth", WIDTH_MAX, f"it has at most {WIDTH_MAX} points in a line"),
            ("svga.maxheight", HEIGHT_MAX, f"it has at most {HEIGHT_MAX} lines"),
            ("svga.numdisplays", 1, "there is one screen"),
        ):
            value = self._take(name)
            if value.isascii() and value.isdecimal() and int(value[:20]) > most:
                self.carried.lose(f"{self._names[name]}={value}", why)
        if self._on("mks.enable3d"):
            self.carried.lose(self._names["mks.enable3d"], "the screen has two dimensions")

    def _viewers(self) -> None:
        if not self._on("remotedisplay.vnc.enabled"):
            return
        port = self._take("remotedisplay.vnc.port", str(VNC_PORT))
        # Without an address it is all that the host has.
        host = self._take("remotedisplay.vnc.ip", "*")
        secrets = [
            self._names[name]
            for name in ("remotedisplay.vnc.password", "remotedisplay.vnc.key")
            if self._take(name)
        ]
        for name in secrets:
            # Without it the screen would be anybody's.
            self.carried.lose(name, f"no display; give --display vnc={port},password-file=FILE")
        if not secrets:
            carry_port(self.carried, host, port, "RemoteDisplay.vnc")

    def _forget(self, name: str) -> None:
        """What else is said of a device that was carried over, or is not there."""
        prefix = f"{name}."
        self._read.update(key for key in self._values if key.startswith(prefix))

    def _rest(self) -> None:
        there = {
            key.removesuffix(".present"): value.upper() == "TRUE"
            for key, value in self._values.items()
            if key.endswith(".present")
        }
        absent = {name for name, present in there.items() if not present}
        told: set[str] = set()
        for key, value in self._values.items():
            device = key.partition(".")[0]
            if (
                key in self._read
                or _SAYS_NOTHING.fullmatch(key)
                or {device.partition(":")[0], key.rpartition(".")[0]} & absent
            ):
                continue
            if not there.get(device):
                self.carried.lose(f"{key}={value}", "there is nothing like it")
            elif device not in told:
                told.add(device)
                self.carried.lose(device, "there is nothing like it")
