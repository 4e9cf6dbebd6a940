"""Fuzz targets of what describes a machine: our files, and those of other monitors.

An input is taken for changes to a whole description: words of it, or of others, put in anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.input import Input, damaged

from tetrarch import block
from tetrarch.block.spec import DiskFormat
from tetrarch.errors import ConfigError, ImageError
from tetrarch.foreign import (
    Carried,
    import_firecracker,
    import_libvirt,
    import_qemu,
    import_vmx,
    words_of_script,
)
from tetrarch.foreign.appliance import import_ova
from tetrarch.foreign.ovf import import_ovf
from tetrarch.machine.config_file import ConfigFile
from tetrarch.machine.config_text import lines_for, toml_text

CWD = Path("/cwd")
WORDS = [
    *("", "0", "1", "-1", "on", "off", "none", "x", "/x", "4096", "1G", "true", "9" * 25, "\0"),
    *("\udcff", "\x1b[2J", "\n", "é", "=", ",", ",,", ":", "{", "}", "[", "]", '"', "'", "#"),
    *("$X", "\\", "&amp;", "<", ">", "</", "/>", "<!DOCTYPE d>", "<a b='c'>", "]]>"),
]
VMX = """
config.version = "8"
displayName = "web|20server"
memsize = "2048"
numvcpus = "4"
cpuid.coresPerSocket = "2"
firmware = "efi"
scsi0.present = "TRUE"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "a.vmdk"
scsi0:0.mode = "independent-nonpersistent"
ide1:0.present = "TRUE"
ide1:0.deviceType = "cdrom-image"
ide1:0.fileName = "/d.iso"
ethernet0.present = "TRUE"
ethernet0.connectionType = "nat"
ethernet0.generatedAddress = "00:0c:29:aa:bb:cc"
floppy0.fileType = "file"
floppy0.fileName = "f.flp"
guestinfo.Role = "a=b"
svga.present = "TRUE"
svga.vramSize = "8388608"
RemoteDisplay.vnc.enabled = "TRUE"
RemoteDisplay.vnc.ip = "127.0.0.1"
RemoteDisplay.vnc.port = "5901"
"""
TOML = """
kernel = "k"  # [
memory = "1G"
disk = ["a.img,bus=nvme", '''b.img,readonly''']
append = \"\"\"
x\"\"\"
virtio_console = ["file=log,name=x"]
[[net]]
user = true
forward = ["2222:22"]
[[net]]
tap = "tap0"
mtu = 1400
[run]
timeout = 3.5
command = ["ls"]
"""
QEMU = """qemu-system-x86_64 -machine q35,accel=kvm -m 2G -smp cores=2 -kernel k -append 'a b'
-drive file=a,if=virtio,format=qcow2 -drive file=b,if=none,id=d -device nvme,drive=d
-blockdev driver=qcow2,node-name=q,file=f -blockdev driver=file,node-name=f,filename=/z
-device virtio-blk-pci,drive=q -netdev user,id=n,hostfwd=tcp::1-:2
-device virtio-net-pci,netdev=n,mac=52:54:00:12:34:56 -nic tap,ifname=t -net nic -net user
-chardev socket,id=c,path=/s,server=on -device virtserialport,chardev=c,name=p
-serial unix:/l,server -virtfs local,path=/d,mount_tag=t -device virtio-tablet-pci
-device '{"driver":"e1000","netdev":"n"}' -vga std -usb -S -no-reboot -cdrom c -name n"""
FIRECRACKER: dict[str, Any] = {
    "boot-source": {"kernel_image_path": "k", "boot_args": "a", "initrd_path": "i"},
    "drives": [
        {"drive_id": "r", "path_on_host": "/r", "is_root_device": True, "partuuid": "1-2"},
        {"drive_id": "s", "socket": "/s", "rate_limiter": {"ops": {"size": 9, "refill_time": 3}}},
    ],
    "machine-config": {"vcpu_count": 2, "mem_size_mib": 512, "smt": False},
    "network-interfaces": [
        {"iface_id": "n", "host_dev_name": "t", "guest_mac": "06:00:00:00:00:01"}
    ],
    "vsock": {"guest_cid": 3, "uds_path": "v"},
    "balloon": {"amount_mib": 0},
    "logger": None,
}
LIBVIRT = """<domain type='kvm'><name>n</name><memory unit='MiB'>64</memory><vcpu>2</vcpu>
<os><kernel>/k</kernel><cmdline>a</cmdline><type arch='x86_64'>hvm</type></os>
<on_reboot>restart</on_reboot>
<devices><disk type='file' device='disk'><driver type='qcow2' cache='none'/><source file='/d'/>
<target dev='vda' bus='virtio'/><iotune><total_iops_sec>5</total_iops_sec></iotune>
<readonly/></disk>
<disk type='block' device='cdrom'><source dev='/c'/></disk>
<interface type='bridge'><mac address='52:54:00:aa:bb:cc'/><source bridge='b'/>
<target dev='t'/></interface>
<interface type='user'><portForward proto='tcp'><range start='1' to='2'/></portForward></interface>
<serial type='unix'><source mode='bind' path='/s'/></serial>
<channel type='file'><source path='/p'/><target type='virtio' name='c'/></channel>
<filesystem><driver type='virtiofs'/><source dir='/s'/><target dir='t'/></filesystem>
<video><model type='vmvga' heads='1'/></video><graphics type='vnc' port='5901' autoport='no'>
<listen type='address' address='::1'/></graphics>
<input type='tablet' bus='virtio'/><memballoon model='none'/></devices></domain>"""


OVF = """<ovf:Envelope><References><File ovf:href="d.vmdk" ovf:id="f" ovf:size="7"/></References>
<DiskSection><Disk ovf:capacity="8" ovf:capacityAllocationUnits="byte * 2^20" ovf:diskId="d"
ovf:fileRef="f"/><Disk ovf:capacity="65536" ovf:diskId="e"/></DiskSection>
<VirtualSystem ovf:id="web"><Name>w</Name><ProductSection/>
<VirtualHardwareSection><System><VirtualSystemType>vmx-13</VirtualSystemType></System>
<Item><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>4</rasd:VirtualQuantity>
<vmw:CoresPerSocket>2</vmw:CoresPerSocket></Item>
<Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
<rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>64</rasd:VirtualQuantity></Item>
<Item><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceType>6</rasd:ResourceType></Item>
<Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/d</rasd:HostResource>
<rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
<Item><rasd:HostResource>ovf:/file/f</rasd:HostResource><rasd:ResourceType>15</rasd:ResourceType>
</Item><Item><rasd:AddressOnParent>1</rasd:AddressOnParent>
<rasd:HostResource>ovf:/disk/e</rasd:HostResource><rasd:Parent>3</rasd:Parent>
<rasd:ResourceType>17</rasd:ResourceType></Item><Item><rasd:Address>52:54:00:00:00:01</rasd:Address><rasd:Connection>VM</rasd:Connection>
<rasd:ResourceType>10</rasd:ResourceType></Item><vmw:Config vmw:key="firmware" vmw:value="efi"/>
<vmw:ExtraConfig vmw:key="guestinfo.a" vmw:value="b"/>
<vmw:ExtraConfig vmw:key="tetrarch.buses" vmw:value="nvme"/>
</VirtualHardwareSection></VirtualSystem></ovf:Envelope>"""


def _changed(source: Input, text: str) -> str:
    """With words put in, cut out and doubled."""
    for _ in range(source.number(1) % 8):
        at = source.number(2) % (len(text) + 1)
        match source.number(1) % 4:
            case 0:
                text = text[:at] + WORDS[source.number(1) % len(WORDS)] + text[at:]
            case 1:
                text = text[:at] + text[at + source.number(1) :]
            case 2:
                text = text[: at + source.number(1)] + text[at:]
            case _:
                text = text[:at] + source.text() + text[at:]
    return text


def _values(source: Input, value: Any) -> Any:
    """With other values at some places of a tree, and some places gone."""
    match source.number(1) % 32:
        case 0:
            return [None, True, 7, -1.5, "", [], {}, [{}], {"x": {}}][source.number(1) % 9]
        case 1:
            return WORDS[source.number(1) % len(WORDS)]
        case 2:
            return source.number(9) ** 60
    if isinstance(value, dict):
        kept = {key: _values(source, one) for key, one in value.items() if source.number(1) != 7}
        return kept | ({source.text(): 1} if source.number(1) == 9 else {})
    return [_values(source, one) for one in value] if isinstance(value, list) else value


def _check(take: Callable[[], Carried]) -> None:
    with contextlib.suppress(ConfigError):
        carried = take()
        lost = list(map(str, carried.lost))
        assert all(len(line) < 400 and "\n" not in line and "\x1b" not in line for line in lost)
        config = carried.finish(CWD)
        text = carried.toml(config, "a heading")
        with tempfile.NamedTemporaryFile("w", suffix=".toml", newline="") as file:
            file.write(text)
            file.flush()
            assert ConfigFile.read(Path(file.name)).config == config


def qemu(data: bytes) -> None:
    source = Input(data)
    words = [
        _changed(source, word) if source.number(1) % 16 == 0 else word
        for word in QEMU.split()
        if source.number(1) % 16 != 1
    ]
    if source.number(1) % 2:
        _check(lambda: import_qemu(words_of_script(_changed(source, " ".join(words)))))
    else:
        _check(lambda: import_qemu(words))


def firecracker(data: bytes) -> None:
    source = Input(data)
    text = json.dumps(_values(source, FIRECRACKER))
    _check(lambda: import_firecracker(_changed(source, text)))


def libvirt(data: bytes) -> None:
    source = Input(data)
    _check(lambda: import_libvirt(_changed(source, LIBVIRT)))


def vmx(data: bytes) -> None:
    source = Input(data)
    _check(lambda: import_vmx(_changed(source, VMX)))


def ovf(data: bytes) -> None:
    source = Input(data)

    def take() -> Carried:
        found = import_ovf(_changed(source, OVF), CWD)
        # Nothing is written under a name that a stranger chose.
        assert all(medium.path.parent == CWD for medium in found.media)
        return found.carried

    _check(take)


@functools.cache
def _appliance() -> dict[str, bytes]:
    """The files of one, by their names."""
    with tempfile.TemporaryDirectory() as folder:
        raw, packed = Path(folder, "d.img"), Path(folder, "d.vmdk")
        raw.write_bytes(b"\7" * 1000 + bytes((1 << 20) - 1000))
        block.convert(raw, packed, subformat="streamOptimized")
        disk = packed.read_bytes()
    descriptor = OVF.replace('ovf:size="7"', f'ovf:size="{len(disk)}"')
    return {"web.ovf": descriptor.encode(), "d.vmdk": disk}


@contextlib.contextmanager
def _quietly(title: str, total: int, verb: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, of: None


def ova(data: bytes) -> None:
    """An archive and what is in it; nothing lies there after one that is refused."""
    source = Input(data)
    files = dict(_appliance())
    choice = source.number(1)
    if choice & 1:
        changed = _changed(source, files["web.ovf"].decode())
        files["web.ovf"] = changed.encode(errors="surrogateescape")
    if choice & 2:
        files["d.vmdk"] = damaged(source, files["d.vmdk"])
    if choice & 4:
        sums = (f"SHA256({name})= {hashlib.sha256(one).hexdigest()}" for name, one in files.items())
        files["web.mf"] = _changed(source, "\n".join(sums)).encode(errors="surrogateescape")
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name if choice & 0x78 else source.text())
            member.size = len(content)
            if choice & 0xF0 == 0x10:
                member.type = source.bytes(1)
            archive.addfile(member, io.BytesIO(content))
    image = whole.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        path, disks = Path(folder, "web.ova"), Path(folder, "disks")
        disks.mkdir()
        path.write_bytes(image if choice & 0x80 else damaged(source, image))
        kind: DiskFormat = "raw" if choice & 8 else "qcow2"
        try:
            found = import_ova(path, disks, kind, _quietly)
        except (ConfigError, ImageError) as error:
            assert "\n" not in str(error), error  # noqa: PT017
            assert not list(disks.iterdir())
        else:
            assert {medium.path for medium in found.media} == set(disks.iterdir())
        assert {one.name for one in Path(folder).iterdir()} == {"web.ova", "disks"}


def config_file(data: bytes) -> None:
    """A file for --config; one that is taken says the same when it is written again."""
    source = Input(data)
    text = _changed(source, TOML)
    with tempfile.NamedTemporaryFile("wb", suffix=".toml") as file:
        file.write(text.encode(errors="surrogateescape"))
        file.flush()
        path = Path(file.name)
        try:
            read = ConfigFile.read(path)
            written = toml_text(lines_for(read.config, {}), [], "")
        except ConfigError as error:
            assert str(path) in str(error) or "is no text" in str(error)  # noqa: PT017
            return
        path.write_text(written, newline="")
        assert ConfigFile.read(path).config == read.config
