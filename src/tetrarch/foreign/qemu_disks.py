"""QEMU's disks: -drive, -blockdev, -hda and the like, and the devices that have them."""

from __future__ import annotations

from typing import Any

from tetrarch.foreign.carried import Carried
from tetrarch.foreign.qemu_lines import QemuLines
from tetrarch.foreign.qemu_words import Option

__all__ = ["QemuDisks"]

_ON = ("on", "yes", "true", "y")
#: What says nothing of the disk that a guest sees.
_PLUMBING = frozenset(
    """addr aio auto-read-only bootindex bus cache.no-flush channel config-wce detect-zeroes discard
    disable-legacy disable-modern drive driver file.aio file.driver file.locking id if index
    iothread locking lun media node-name num-queues physical_block_size scsi-id share-rw target
    unit vectors write-cache""".split()  # noqa: SIM905 - a word a line would be a page
)
#: By how the device's name begins: the bus, and whether it is a CD.
_DEVICES = {
    "virtio-blk": ("virtio", False),
    "nvme": ("nvme", False),
    "ide-hd": ("", False),
    "ide-cd": ("", True),
    "scsi-hd": ("virtio", False),
    "scsi-cd": ("ahci", True),
    "usb-storage": ("virtio", False),
}
_LIMITS = {
    "iops": ("iops", "iops-total", "throttling.iops-total"),
    "bps": ("bps", "bps-total", "throttling.bps-total"),
}


class QemuDisks:
    def __init__(self, carried: Carried, lines: QemuLines, ide: str) -> None:
        """``ide`` is what the machine's IDE drives are here."""
        self._carried = carried
        self._lines = lines
        self._ide = ide
        self._snapshot = False
        self._waiting: dict[str, tuple[dict[str, str], str]] = {}
        """Drives with ``if=none`` and block nodes, and where they stand, by name."""
        self._disks: list[tuple[dict[str, Any], str]] = []
        self._flash: list[tuple[str, dict[str, str], str]] = []
        """Chips with firmware, by their units."""

    def option(self, option: Option) -> bool:
        """Whether it is one of these."""
        match option.name:
            case "drive":
                self._drive(option)
            case "blockdev":
                keys = option.keys("driver")
                self._waiting[keys.get("node-name", "")] = (keys, str(option))
            case "hda" | "hdb" | "hdc" | "hdd":
                self._take({"file": option.value or ""}, self._ide, str(option))
            case "cdrom":
                self._take_cd({"file": option.value or ""}, self._ide, str(option))
            case "fda" | "fdb":
                self._take_floppy({"file": option.value or ""}, str(option))
            case "pflash":
                keys = {"file": option.value or ""}
                self._flash.append((str(len(self._flash)), keys, str(option)))
            case "snapshot":
                self._snapshot = True
            case _:
                return False
        return True

    def device(self, kind: str, keys: dict[str, str], source: str) -> bool:
        if kind.startswith("vhost-user-blk"):
            self._served(keys.get("chardev", ""), source)
            return True
        if kind == "floppy" and "drive" in keys:
            drive, _ = self._waiting.pop(keys.pop("drive"), (None, ""))
            self._take_floppy({} if drive is None else self._resolved(drive), source)
            return True
        found = next((name for name in _DEVICES if kind.startswith(name)), None)
        if found is None or "drive" not in keys:
            # A controller has no drive; the disks bring theirs.
            return kind.startswith(("virtio-scsi", "ich9-ahci", "nvme", "piix3-ide", "ahci"))
        bus, cd = _DEVICES[found]
        if found in ("scsi-hd", "usb-storage"):
            self._carried.lose(source, "it is a virtio disk")
        drive, _ = self._waiting.pop(keys.pop("drive"), (None, ""))
        if drive is None:
            self._carried.lose(source, "its drive is missing")
        else:
            take = self._take_cd if cd else self._take
            take({**keys, **self._resolved(drive)}, bus or self._ide, source)
        return True

    def finish(self) -> None:
        for keys, source in self._waiting.values():
            # One that only another node is made of was taken with it.
            if "filename" not in keys or "if" in keys:
                self._carried.lose(source, "no device has it")
        for _, keys, source in sorted(self._flash, key=lambda chip: chip[0]):
            if keys.get("format", "raw") == "raw" and (path := _path(keys)):
                self._carried.add_firmware(path, source)
            else:
                self._carried.lose(source, "firmware and its variables are raw files")
        for table, source in self._disks:
            if self._snapshot:
                table["snapshot"] = True
            self._carried.add("disk", table, source)

    def _served(self, chardev: str, source: str) -> None:
        socket = self._lines.socket(chardev)
        if socket is None:
            self._carried.lose(source, "its chardev is no socket with a path")
        else:
            self._disks.append(({"vhost-user": socket}, source))

    def _drive(self, option: Option) -> None:
        keys = option.keys()
        cd = keys.get("media") == "cdrom"
        match keys.get("if", "ide"):
            case "none":
                self._waiting[keys.get("id", "")] = (keys, str(option))
            case "ide" if cd:
                self._take_cd(keys, self._ide, str(option))
            case "ide":
                self._take(keys, self._ide, str(option))
            case "floppy":
                self._take_floppy(keys, str(option))
            case "virtio":
                self._take(keys, "virtio", str(option))
            case "scsi":
                self._carried.lose(f"{option}: if=scsi", "it is a virtio disk")
                self._take(keys, "virtio", str(option))
            case "pflash":
                unit = keys.get("unit", str(len(self._flash)))
                self._flash.append((unit, keys, str(option)))
            case other:
                self._carried.lose(str(option), f"there is no {other}")

    def _resolved(self, keys: dict[str, str]) -> dict[str, str]:
        """A block node with the node of its file."""
        under, _ = self._waiting.pop(keys.get("file", ""), (None, ""))
        if under is not None:
            keys = {**under, **keys, "file.filename": under.get("filename", "")}
            if under.get("cache.direct") in _ON:
                keys["cache.direct"] = "on"
        return keys

    def _take_cd(self, keys: dict[str, str], bus: str, source: str) -> None:
        path = _path(keys)
        if path:
            self._carried.add(
                "cdrom", {"path": path, "bus": "ide" if bus == "ide" else "ahci"}, source
            )
        else:
            self._carried.lose(source, "an empty drive cannot be")

    def _take_floppy(self, keys: dict[str, str], source: str) -> None:
        if not (path := _path(keys)):
            self._carried.lose(source, "an empty drive cannot be")
            return
        if keys.get("format", keys.get("driver", "raw")) not in ("raw", "file"):
            self._carried.lose(source, "a floppy disk's image is raw")
            return
        readonly = keys.get("readonly", keys.get("read-only", "off")) in _ON
        table: dict[str, Any] = {"path": path, **({"readonly": True} if readonly else {})}
        self._carried.add("floppy", table, source)

    def _take(self, keys: dict[str, str], bus: str, source: str) -> None:
        table: dict[str, Any] = {"path": _path(keys)}
        if ":" in table["path"].partition("/")[0]:
            self._carried.lose(source, "an image is a file or a block device")
            return
        image_format = keys.pop("format", keys.get("driver", ""))
        if image_format in ("raw", "qcow2", "vmdk"):
            table["format"] = image_format
        elif image_format and "filename" not in keys and "file.filename" not in keys:
            self._carried.lose(f"{source}: format={image_format}", "there are raw, qcow2 and vmdk")
        table["bus"] = bus
        for name in ("readonly", "read-only"):
            if keys.pop(name, "off") in _ON:
                table["readonly"] = True
        if keys.pop("snapshot", "off") in _ON:
            table["snapshot"] = True
        direct = keys.pop("cache.direct", "off")
        if keys.pop("cache", "") in ("none", "directsync") or direct in _ON:
            table["cache"] = "none"
        if keys.pop("werror", "") in ("stop", "enospc"):
            table["werror"] = "stop"
        for option, names in _LIMITS.items():
            for name in names:
                if (value := keys.pop(name, None)) is not None:
                    table[option] = value
        self._disks.append((table, source))
        left = {key: value for key, value in keys.items() if key not in _PLUMBING}
        self._carried.lose_keys(f"disk {table['path']}", left)


def _path(keys: dict[str, str]) -> str:
    named = [keys.pop(name, "") for name in ("filename", "file.filename", "file")]
    return next(filter(None, named), "")
