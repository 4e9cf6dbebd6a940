"""A machine of ours as an appliance: DMTF's DSP0243 in version 1, as VMware and VirtualBox take it.

Disks are VMDK streams. What those products know no word for, and is needed to have the same machine
again, stands in VMware's element for settings of its own, which others pass over.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from xml.sax.saxutils import escape, quoteattr

from tetrarch._files import ScratchDirectory, replaced_when_whole
from tetrarch.block import convert, info
from tetrarch.block.spec import DiskSpec
from tetrarch.errors import ConfigError
from tetrarch.foreign.carried import Carried, NotCarried
from tetrarch.foreign.ovf import TYPES

if TYPE_CHECKING:
    from tetrarch.machine.config import MachineConfig
    from tetrarch.net.spec import NetSpec

__all__ = ["export_ova"]

Progress = Callable[[int, int], None]
Transfer = Callable[[str, int, str], AbstractContextManager[Progress]]

_ENVELOPE: Final = "http://schemas.dmtf.org/ovf/envelope/1"
_CIM: Final = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2"
_STREAM: Final = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
#: Of tar's first format, whose numbers of sizes others read too.
_USTAR_MAX: Final = 8 << 30
_SCSI_SELF: Final = 7
_MIB: Final = 1 << 20

#: Where a guest of VMware's finds a disk: the type of the controller's item, and its kind.
_CONTROLLERS: Final = {
    "pvscsi": ("scsi", "VirtualSCSI", "SCSI Controller"),
    "ahci": ("storage", "vmware.sata.ahci", "SATA Controller"),
    "ide": ("ide", "", "IDE Controller"),
    "nvme": ("storage", "vmware.nvme.controller", "NVMe Controller"),
}
#: Drives at one controller.
_UNITS: Final = {"pvscsi": 15, "ahci": 30, "ide": 2, "nvme": 15}
#: Options whose meaning is in the descriptor.
_CARRIED: Final = frozenset(
    {"name", "memory", "cpus", "disk", "cdrom", "net", "firmware", "platform", "guestinfo"}
)


class _File(NamedTuple):
    name: str
    path: Path
    capacity: int | None
    """Of a disk."""


def export_ova(config: MachineConfig, target: Path, transfer: Transfer) -> list[NotCarried]:
    """Writes the archive, and gives what is not in it. Raises ConfigError and ImageError."""
    # What every file system and every reader of manifests takes.
    name = config.name or re.sub(r"[^A-Za-z0-9._-]+", "-", target.stem).strip("-.") or "machine"
    lost = Carried()
    parent = target.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{parent} is no directory", mend="make it before")
    with ScratchDirectory(prefix=".tetrarch-", dir=parent) as folder:
        writer = _Writer(config, name, lost)
        disks = _disks(config, name, Path(folder), lost, transfer)
        discs = [
            _File(f"{name}-disc{number}.iso", spec.path, None)
            for number, spec in enumerate(config.cdrom, 1)
        ]
        for option in sorted(config.model_fields_set - _CARRIED):
            if getattr(config, option) is not None:
                lost.lose(option, "an appliance has no word for it")
        text = writer.descriptor([file for _, file in disks], [s for s, _ in disks], discs)
        _pack(target, name, text.encode(), [file for _, file in disks] + discs, transfer)
    return lost.lost


def _disks(
    config: MachineConfig, name: str, folder: Path, lost: Carried, transfer: Transfer
) -> list[tuple[DiskSpec, _File]]:
    made: list[tuple[DiskSpec, _File]] = []
    for spec in config.disk:
        if spec.vhost_user:
            lost.lose(str(spec), "another process has its data")
            continue
        size = info(spec.path, spec.format)["size"]
        file = _File(f"{name}-disk{len(made) + 1}.vmdk", folder / f"{len(made)}.vmdk", size)
        with transfer(file.name, size, "Packing") as progress:
            convert(
                spec.path,
                file.path,
                image_format="vmdk",
                source_format=spec.format,
                subformat="streamOptimized",
                progress=progress,
            )
        options = {
            "readonly": spec.readonly,
            "snapshot": spec.snapshot,
            "iops": spec.iops,
            "bps": spec.bps,
        }
        if any(options.values()):
            given = ", ".join(option for option, value in options.items() if value)
            lost.lose(f"{spec.path}: {given}", "an appliance's disk is just a disk")
        made.append((spec, file))
    return made


class _Writer:
    """The descriptor, item by item."""

    def __init__(self, config: MachineConfig, name: str, lost: Carried) -> None:
        self._config, self._name, self._lost = config, name, lost
        self._items: list[str] = []

    def descriptor(self, disks: list[_File], specs: list[DiskSpec], discs: list[_File]) -> str:
        self._processors()
        self._drives(disks, specs, discs)
        for number, spec in enumerate(self._config.net):
            self._card(spec, number)
        files = [*disks, *discs]
        references = "".join(
            f"    <File ovf:href={quoteattr(file.name)} ovf:id={quoteattr(f'file{number}')}"
            f' ovf:size="{file.path.stat().st_size}"/>\n'
            for number, file in enumerate(files, 1)
        )
        described = "".join(
            f'    <Disk ovf:capacity="{disk.capacity}" ovf:capacityAllocationUnits="byte"'
            f' ovf:diskId="vmdisk{number}" ovf:fileRef="file{number}" ovf:format="{_STREAM}"/>\n'
            for number, disk in enumerate(disks, 1)
        )
        networks = (
            '  <NetworkSection>\n    <Info>Networks</Info>\n    <Network ovf:name="NAT">\n'
            "      <Description>Behind the host's address</Description>\n    </Network>\n"
            "  </NetworkSection>\n"
            if self._config.net
            else ""
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f'<Envelope xmlns="{_ENVELOPE}" xmlns:ovf="{_ENVELOPE}"'
            f' xmlns:rasd="{_CIM}/CIM_ResourceAllocationSettingData"'
            f' xmlns:vssd="{_CIM}/CIM_VirtualSystemSettingData"'
            ' xmlns:vmw="http://www.vmware.com/schema/ovf"'
            ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">\n'
            f"  <References>\n{references}  </References>\n"
            f"  <DiskSection>\n    <Info>Disks</Info>\n{described}  </DiskSection>\n"
            f"{networks}"
            f"  <VirtualSystem ovf:id={quoteattr(self._name)}>\n"
            "    <Info>A virtual machine</Info>\n"
            f"    <Name>{escape(self._name)}</Name>\n"
            # 102 is CIM_OperatingSystem's "Other 64-Bit"; the word beside it is VMware's.
            '    <OperatingSystemSection ovf:id="102" vmw:osType="otherGuest64">\n'
            "      <Info>The guest's system</Info>\n    </OperatingSystemSection>\n"
            "    <VirtualHardwareSection>\n      <Info>Hardware</Info>\n"
            f"      <System>\n{self._system()}      </System>\n"
            f"{''.join(self._items)}{self._settings(specs)}"
            "    </VirtualHardwareSection>\n  </VirtualSystem>\n</Envelope>\n"
        )

    def _system(self) -> str:
        values = {
            "ElementName": "Virtual Hardware Family",
            "InstanceID": "0",
            "VirtualSystemIdentifier": self._name,
            # The first that knows NVMe.
            "VirtualSystemType": "vmx-13",
        }
        return "".join(
            f"        <vssd:{tag}>{escape(value)}</vssd:{tag}>\n" for tag, value in values.items()
        )

    def _settings(self, specs: list[DiskSpec]) -> str:
        firmware = self._config.firmware
        image = "" if firmware is None else str(firmware).partition(",")[0]
        if image not in ("", "seabios", "ovmf"):
            self._lost.lose(f"firmware {image}", "an appliance has BIOS or UEFI")
        own: dict[str, str] = {"tetrarch.platform": self._config.platform}
        if firmware is None:
            own["tetrarch.firmware"] = "none"
        if specs:
            own["tetrarch.buses"] = ",".join(spec.bus for spec in specs)
        if self._config.net:
            own["tetrarch.cards"] = ",".join(spec.model for spec in self._config.net)
        for variable in self._config.guestinfo:
            key, _, value = variable.partition("=")
            own[f"guestinfo.{key}"] = value
        kind = "efi" if "ovmf" in image.lower() else "bios"
        return (
            f'      <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="{kind}"/>\n'
        ) + "".join(
            f'      <vmw:ExtraConfig ovf:required="false" vmw:key={quoteattr(key)}'
            f" vmw:value={quoteattr(value)}/>\n"
            for key, value in own.items()
        )

    def _item(self, values: dict[str, str | int], more: str = "") -> int:
        """The number by which others name it. The tags stand in the order of the alphabet."""
        number = len(self._items) + 1
        values = {**values, "InstanceID": number}
        lines = "".join(
            f"        <rasd:{tag}>{escape(str(values[tag]))}</rasd:{tag}>\n"
            for tag in sorted(values)
        )
        self._items.append(f"      <Item>\n{lines}{more}      </Item>\n")
        return number

    def _processors(self) -> None:
        cpus, memory = self._config.cpus, self._config.memory
        threads = cpus.cores * cpus.threads
        cores = threads if cpus.count % threads == 0 else 1
        if cpus.threads > 1 or cpus.count % threads or cpus.count // threads != cpus.sockets:
            self._lost.lose(f"cpus={cpus}", "an appliance has CPUs and how many are in a socket")
        self._item(
            {
                "AllocationUnits": "hertz * 10^6",
                "ElementName": f"{cpus.count} virtual CPU(s)",
                "ResourceType": TYPES["cpu"],
                "VirtualQuantity": cpus.count,
            },
            f'        <vmw:CoresPerSocket ovf:required="false">{cores}</vmw:CoresPerSocket>\n',
        )
        megabytes = -(-memory // _MIB)
        if memory % _MIB:
            self._lost.lose(f"memory of {memory} bytes", f"it is {megabytes} MiB there")
        self._item(
            {
                "AllocationUnits": "byte * 2^20",
                "ElementName": f"{megabytes} MB of memory",
                "ResourceType": TYPES["memory"],
                "VirtualQuantity": megabytes,
            }
        )

    def _drives(self, disks: list[_File], specs: list[DiskSpec], discs: list[_File]) -> None:
        controllers: dict[tuple[str, int], int] = {}
        counts: dict[str, int] = {}
        drives = [(spec.bus, f"ovf:/disk/vmdisk{n}", "disk") for n, spec in enumerate(specs, 1)]
        for number, spec in enumerate(self._config.cdrom):
            drives.append((spec.bus, f"ovf:/file/file{len(disks) + number + 1}", "cd"))
        for number, (own, resource, kind) in enumerate(drives, 1):
            bus = "pvscsi" if own == "virtio" else own
            index, unit = divmod(counts.get(bus, 0), _UNITS[bus])
            counts[bus] = counts.get(bus, 0) + 1
            if (bus, index) not in controllers:
                controllers[bus, index] = self._controller(bus, index)
            if bus == "pvscsi" and unit >= _SCSI_SELF:
                unit += 1  # the controller's own number
            name = f"Hard Disk {number}" if kind == "disk" else f"CD-ROM {number}"
            self._item(
                {
                    "AddressOnParent": unit,
                    "ElementName": name,
                    "HostResource": resource,
                    "Parent": controllers[bus, index],
                    "ResourceType": TYPES[kind],
                }
            )

    def _controller(self, bus: str, index: int) -> int:
        kind, subtype, name = _CONTROLLERS[bus]
        values: dict[str, str | int] = {
            "Address": index,
            "ElementName": f"{name} {index}",
            "ResourceType": TYPES[kind],
        }
        return self._item(values | ({"ResourceSubType": subtype} if subtype else {}))

    def _card(self, spec: NetSpec, number: int) -> None:
        if spec.kind != "user":
            self._lost.lose(f"net {spec.kind}", "its card is at a network called NAT")
        if spec.forward:
            self._lost.lose(f"net {spec}", "an appliance has no forwarded ports")
        address = {} if spec.mac is None else {"Address": spec.mac.hex(":")}
        self._item(
            {
                "AutomaticAllocation": "true",
                "Connection": "NAT",
                "ElementName": f"Ethernet {number + 1}",
                "ResourceSubType": "E1000" if spec.model == "e1000" else "VmxNet3",
                "ResourceType": TYPES["ethernet"],
                **address,
            }
        )


def _pack(
    target: Path, name: str, descriptor: bytes, files: list[_File], transfer: Transfer
) -> None:
    """The descriptor first, then the manifest, then the files in their order (DSP0243, 6.3)."""
    lines = [f"SHA256({name}.ovf)= {hashlib.sha256(descriptor).hexdigest()}\n"]
    for file in files:
        with file.path.open("rb") as data:
            lines.append(
                f"SHA256({file.name})= {hashlib.file_digest(data, 'sha256').hexdigest()}\n"
            )
    manifest = "".join(lines).encode()
    large = any(file.path.stat().st_size >= _USTAR_MAX for file in files)
    kind = tarfile.GNU_FORMAT if large else tarfile.USTAR_FORMAT
    try:
        with (
            replaced_when_whole(target) as out,
            tarfile.open(fileobj=out, mode="w", format=kind) as archive,
        ):
            for member, text in ((f"{name}.ovf", descriptor), (f"{name}.mf", manifest)):
                archive.addfile(_member(member, len(text)), io.BytesIO(text))
            for file in files:
                size = file.path.stat().st_size
                with file.path.open("rb") as source, transfer(file.name, size, "Adding") as tell:
                    archive.addfile(_member(file.name, size), source)
                    tell(size, size)
    except OSError as error:
        where = error.filename or target
        raise ConfigError(f"{where}: {error.strerror}", mend="give a path with room") from error


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o644, int(time.time())
    return member
