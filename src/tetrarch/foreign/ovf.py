"""An appliance's descriptor (DMTF's DSP0243, "Open Virtualization Format") as a configuration.

Elements are told apart by their local names: what VMware, VirtualBox and others write has the same
ones in the namespaces of OVF 1 and 2. Hardware is items with a type of CIM's
(CIM_ResourceAllocationSettingData, ResourceType).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from tetrarch.block.spec import DiskFormat
from tetrarch.errors import ConfigError
from tetrarch.foreign.carried import CARDS, Carried
from tetrarch.foreign.xml_tree import Element, parse_xml

__all__ = ["TYPES", "Medium", "Ovf", "import_ovf"]

#: ResourceType's numbers.
TYPES: Final = {
    "cpu": "3",
    "memory": "4",
    "ide": "5",
    "scsi": "6",
    "ethernet": "10",
    "floppy": "14",
    "cd": "15",
    "dvd": "16",
    "disk": "17",
    "storage": "20",
}
_CONTROLLERS: Final = {TYPES["ide"], TYPES["scsi"], TYPES["storage"]}
_NAMES: Final = {"1": "device", "23": "USB", "24": "screen", "35": "sound card"}
#: What says nothing of the machine, or is there in any.
_QUIET: Final = frozenset({"1", "13", "23", "24"})
_SATISFIED: Final = frozenset(
    {"Info", "Name", "OperatingSystemSection", "AnnotationSection", "VirtualHardwareSection"}
)
_MEGABYTES: Final = {"": 20, "byte": 0, "bytes": 0, "kilobytes": 10, "kb": 10} | dict.fromkeys(
    ("mb", "megabyte", "megabytes"), 20
)
_UNIT: Final = re.compile(r"bytes?\s*\*\s*2\s*\^\s*(\d{1,2})")
_GIGABYTES: Final = frozenset({"gb", "gigabyte", "gigabytes"})
_MEDIA_MAX: Final = 64
_BUSES: Final = frozenset({"virtio", "nvme", "pvscsi", "ahci", "ide"})


class Medium(NamedTuple):
    """A disk or a disc of the machine, and what it is made of."""

    kind: Literal["disk", "disc"]
    href: str
    """The file; none is an empty disk."""
    capacity: int
    path: Path
    """Where the configuration has it."""


@dataclass(frozen=True)
class Ovf:
    carried: Carried
    media: tuple[Medium, ...]
    files: dict[str, int | None]
    """All files that the descriptor names, and their sizes, where it says them."""


def import_ovf(text: str, directory: Path, image_format: DiskFormat = "qcow2") -> Ovf:
    """The machine, with its disks to be made in ``directory``. Raises ConfigError."""
    root = parse_xml(text)
    _localize(root)
    if root.tag != "Envelope":
        raise ConfigError(
            f"the outermost tag is <{root.tag}>, and no <Envelope>",
            mend="take an .ovf file, or an .ova file with one",
        )
    reader = _Reader(root, directory, image_format)
    return Ovf(reader.carried, tuple(reader.media), reader.sizes)


def _localize(root: Element) -> None:
    """Leaves the prefixes of namespaces out."""
    todo = [root]
    while todo:
        element = todo.pop()
        element.tag = element.tag.rpartition(":")[2]
        element.attributes = {
            name.rpartition(":")[2]: value for name, value in element.attributes.items()
        }
        todo.extend(element.children)


def _children(element: Element | None, tag: str) -> Iterator[Element]:
    return (child for child in (element.children if element else ()) if child.tag == tag)


def _text(element: Element, tag: str) -> str:
    return next((child.text for child in _children(element, tag)), "")


def _where(item: Element) -> str:
    return f"line {item.line}: {_text(item, 'ElementName') or f'<{item.tag}>'}"


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _shift(unit: str) -> int | None:
    """By how many bits a number in this unit is one of bytes (DSP0004, Annex C)."""
    found = _UNIT.fullmatch(unit.strip().lower())
    if found is not None:
        return int(found[1]) if int(found[1]) <= 50 else None
    name = unit.strip().lower()
    return 30 if name in _GIGABYTES else _MEGABYTES.get(name)


class _Reader:
    def __init__(self, root: Element, directory: Path, image_format: DiskFormat) -> None:
        self.carried = Carried()
        self.media: list[Medium] = []
        self._directory, self._format = directory, image_format
        self._files = {
            file.attribute("id"): file
            for section in _children(root, "References")
            for file in _children(section, "File")
        }
        self.sizes = {
            file.attributes.get("href", ""): _number(file.attributes.get("size", ""))
            for file in self._files.values()
        }
        self._disks = {
            disk.attributes.get("diskId", ""): disk
            for section in _children(root, "DiskSection")
            for disk in _children(section, "Disk")
        }
        system = self._system(root)
        self._name = self._called(system)
        for section in system.children:
            if section.tag not in _SATISFIED:
                self._lose_section(section)
        hardware = next(_children(system, "VirtualHardwareSection"), None)
        if hardware is None:
            raise ConfigError("the machine has no hardware", mend="export it again")
        self._hardware(system, hardware)

    def _system(self, root: Element) -> Element:
        systems = list(_children(root, "VirtualSystem"))
        for collection in _children(root, "VirtualSystemCollection"):
            systems += _children(collection, "VirtualSystem")
        if len(systems) != 1:
            raise ConfigError(
                f"an appliance of {len(systems)} machines", mend="export each of them alone"
            )
        for section in ("DeploymentOptionSection", "StringsSection"):
            for found in _children(root, section):
                self.carried.lose(f"line {found.line}: <{section}>", "the first choice is taken")
        return systems[0]

    def _called(self, system: Element) -> str:
        called = _text(system, "Name") or system.attributes.get("id", "")
        word = re.sub(r"[^A-Za-z0-9._-]+", "-", called).strip("-._")[:64]
        if word:
            self.carried.set("name", word, "<Name>")
        return word or "machine"

    def _lose_section(self, section: Element) -> None:
        why = {
            "ProductSection": "nobody tells the guest its properties",
            "EulaSection": "read the licence there",
        }
        if section.tag == "Machine":
            return  # VirtualBox's own description of the same
        properties = any(child.tag == "Property" for child in section.children)
        if section.tag != "ProductSection" or properties:
            reason = why.get(section.tag, "there is nothing like it")
            self.carried.lose(f"line {section.line}: <{section.tag}>", reason)

    def _hardware(self, system: Element, hardware: Element) -> None:
        own: dict[str, str] = {}
        for extra in _children(hardware, "ExtraConfig"):
            key, value = extra.attributes.get("key", ""), extra.attributes.get("value", "")
            if key.startswith("tetrarch."):
                own[key.removeprefix("tetrarch.")] = value
            elif key.startswith("guestinfo."):
                self.carried.add("guestinfo", f"{key.partition('.')[2]}={value}", key)
            else:
                self.carried.lose(f"{key}={value}", "VMware's own")
        kind = "".join(_text(found, "VirtualSystemType") for found in _children(hardware, "System"))
        platform = own.get("platform") or ("vmware" if "vmx-" in kind else "pc")
        self.carried.set("platform", platform, kind or "the machine's type")
        if own.get("firmware") != "none":
            efi = self._is_efi(system, hardware)
            self.carried.set("firmware", "ovmf" if efi else "seabios", "firmware")
        items = [
            child
            for child in hardware.children
            if child.tag in ("Item", "StorageItem", "EthernetPortItem")
        ]
        buses = {
            _text(item, "InstanceID"): self._bus(item)
            for item in items
            if _text(item, "ResourceType") in _CONTROLLERS
        }
        # In the order in which the controllers have them.
        drives = [item for item in items if _text(item, "ResourceType") in self._drive_types()]
        order = {controller: at for at, controller in enumerate(buses)}
        drives.sort(key=lambda item: self._place(item, order))
        own_buses = own.get("buses", "").split(",")
        for index, item in enumerate(one for one in drives if self._is_disk(one)):
            bus = own_buses[index] if index < len(own_buses) else ""
            chosen = bus if bus in _BUSES else buses.get(_text(item, "Parent"), "ahci")
            self._disk(item, chosen)
        for item in drives:
            if not self._is_disk(item):
                self._disc(item, buses.get(_text(item, "Parent"), "ahci"))
        cards = own.get("cards", "").split(",")
        for item in items:
            if _text(item, "ResourceType") == TYPES["ethernet"]:
                self._card(item, cards.pop(0) if cards else "")
            else:
                self._item(item)

    @staticmethod
    def _drive_types() -> frozenset[str]:
        return frozenset(TYPES[name] for name in ("cd", "dvd", "disk"))

    @staticmethod
    def _is_disk(item: Element) -> bool:
        return _text(item, "ResourceType") == TYPES["disk"]

    @staticmethod
    def _place(item: Element, order: dict[str, int]) -> tuple[int, int]:
        unit = _number(_text(item, "AddressOnParent"))
        return order.get(_text(item, "Parent"), len(order)), unit or 0

    def _is_efi(self, system: Element, hardware: Element) -> bool:
        for config in _children(hardware, "Config"):
            if config.attributes.get("key") == "firmware":
                return config.attributes.get("value", "").lower() == "efi"
        for machine in _children(system, "Machine"):  # VirtualBox's
            for inner in _children(machine, "Hardware"):
                for firmware in _children(inner, "Firmware"):
                    return firmware.attributes.get("type", "").upper().startswith("EFI")
        return False

    def _bus(self, item: Element) -> str:
        kind, subtype = _text(item, "ResourceType"), _text(item, "ResourceSubType").lower()
        if kind == TYPES["ide"]:
            return "ide"
        if kind == TYPES["storage"]:
            return "nvme" if "nvme" in subtype else "ahci"
        if subtype != "virtualscsi":
            self.carried.lose(
                f"controller {subtype or 'of SCSI'}", "its disks are at a PVSCSI controller"
            )
        return "pvscsi"

    def _item(self, item: Element) -> None:
        kind = _text(item, "ResourceType")
        where = _where(item)
        quantity = _text(item, "VirtualQuantity")
        if kind == TYPES["cpu"]:
            cores = _number(_text(item, "CoresPerSocket"))
            count = _number(quantity)
            topology = ""
            if count and cores and cores > 1 and count % cores == 0:
                topology = f",sockets={count // cores},cores={cores}"
            self.carried.set("cpus", f"{quantity or 1}{topology}", where)
        elif kind == TYPES["memory"]:
            shift = _shift(_text(item, "AllocationUnits"))
            number = _number(quantity)
            if shift is None or number is None:
                unit = _text(item, "AllocationUnits")
                self.carried.lose(where, f"{quantity} {unit} is no size")
            else:
                self.carried.set("memory", f"{-(-(number << shift) // 4096) * 4}K", where)
        elif kind not in _CONTROLLERS | self._drive_types() | _QUIET:
            if kind == TYPES["floppy"] and not _text(item, "HostResource"):
                return  # an empty drive
            name = _NAMES.get(kind, f"type {kind}")
            self.carried.lose(where, f"there is nothing like it ({name})")

    def _card(self, item: Element, own: str) -> None:
        model, where = _text(item, "ResourceSubType"), _where(item)
        carried = CARDS.get(own or model.lower())
        if not own and carried is None and model.lower() not in ("", "virtio"):
            self.carried.lose(f"{where}: {model}", "the card is virtio's")
        connection = _text(item, "Connection")
        if connection.lower() != "nat":
            network = f"{where}: network {connection}".rstrip()
            self.carried.lose(network, "the guest is behind the host's address; give it a tap")
        table: dict[str, Any] = {"user": True}
        if carried is not None:
            table["model"] = carried
        if address := _text(item, "Address"):
            table["mac"] = address
        self.carried.add("net", table, where)

    def _disk(self, item: Element, bus: str) -> None:
        resource, where = _text(item, "HostResource"), f"line {item.line}: disk"
        disk = self._disks.pop(resource.rpartition("/")[2], None)
        if not resource.startswith(("ovf:/disk/", "/disk/")) or disk is None:
            self.carried.lose(
                f"{where} {resource}", "the descriptor has no such disk, or has it twice"
            )
            return
        if disk.attributes.get("parentRef"):
            self.carried.lose(where, "it is the difference to another")
            return
        capacity, unit = (
            _number(disk.attributes.get("capacity", "")),
            disk.attributes.get("capacityAllocationUnits", "byte"),
        )
        shift = _shift(unit)
        size = 0 if capacity is None or shift is None else capacity << shift
        reference = disk.attributes.get("fileRef")
        href = self._href(reference, where) if reference else ""
        if href is None or not (href or size):
            return
        name = f"{self._name}-disk{sum(m.kind == 'disk' for m in self.media) + 1}"
        suffix = "img" if self._format == "raw" else self._format
        path = self._directory / f"{name}.{suffix}"
        self._medium(Medium("disk", href, size, path), bus, where)

    def _disc(self, item: Element, bus: str) -> None:
        resource, where = _text(item, "HostResource"), f"line {item.line}: CD-ROM"
        if not resource.startswith(("ovf:/file/", "/file/")):
            if resource:
                self.carried.lose(f"{where} {resource}", "a drive of the host")
            return
        href = self._href(resource.rpartition("/")[2], where)
        if not href:
            return
        name = f"{self._name}-disc{sum(m.kind == 'disc' for m in self.media) + 1}.iso"
        place = bus if bus in ("ide", "pvscsi") else "ahci"
        self._medium(Medium("disc", href, 0, self._directory / name), place, where)

    def _medium(self, medium: Medium, bus: str, where: str) -> None:
        if len(self.media) == _MEDIA_MAX:
            self.carried.lose(where, f"more than {_MEDIA_MAX} disks")
            return
        self.media.append(medium)
        option = "disk" if medium.kind == "disk" else "cdrom"
        self.carried.add(option, {"path": str(medium.path), "bus": bus}, where)

    def _href(self, reference: str, where: str) -> str | None:
        file = self._files.get(reference)
        href = "" if file is None else file.attributes.get("href", "")
        if file is None or not href:
            self.carried.lose(where, f"the descriptor has no file {reference}")
            return None
        # Each once: one small file could become any number of large disks.
        if any(medium.href == href for medium in self.media):
            self.carried.lose(where, f"{href} is another disk's already")
            return None
        if file.attributes.get("chunkSize"):
            raise ConfigError(f"{href} is in several parts", mend="export it without chunks")
        packed = file.attributes.get("compression", "identity")
        if packed not in ("", "identity"):
            raise ConfigError(f"{href} is packed by {packed}", mend="export it without compression")
        return href
